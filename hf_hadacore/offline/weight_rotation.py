"""Rotations folded into a model's weights, so that outliers are spread before rounding.

QuaRot (arXiv:2404.00456) turns the residual stream x of a transformer into x R, with R orthogonal. What
writes to the stream is multiplied by R behind its outputs, what reads from it by R^T before its inputs. An
RMSNorm without gains does not see the difference, and so the model computes what it did:

    embedding E R,   writer  y = (h W^T + b) R,   reader  y = norm(x R) (W diag(g) R)^T.

The gains g of a norm stand between x and the readers; they move into the readers' weights, and 1 remains.
SpinQuant (arXiv:2405.16406) calls this R1, and R2 a rotation of every head's values: of the rows of v_proj
and, for each of the query heads that read them, the columns of o_proj. It passes through attention, which
sums rows. Both are Hadamard matrices here, R1 with random signs, and nothing is left to do at run time,
unless embedding and head share a tensor: only the head takes the last norm's gains, so that after R1 they
need two tensors, or stay as they are and the stream is rotated between them (`modules.stream_rotation`).

Which Parameters these are is found in `rotation_search`.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch

from ..kernels.hadamard import hadamard_transform
from ..modules.stream_rotation import StreamRotation, rotation_signs

ROTATIONS = ("none", "r1", "r2", "r1r2")

_PART_ELEMENTS = 1 << 24


class AxisRotation(NamedTuple):
    """The rotation of one axis of a Parameter.

    Attributes:
        axis: of the Parameter.
        block: elements that are rotated together; None is the whole axis, and R1 with its signs.
        start: index of the first element that is rotated.
    """

    axis: int
    block: int | None = None
    start: int = 0


class ParameterChange(NamedTuple):
    """What happens to a Parameter.

    Attributes:
        rotations: one after the other.
        norm: the Parameter of a norm whose gains it takes over before it is rotated; None: none.
        gain_axis: the axis that they belong to.
    """

    rotations: tuple[AxisRotation, ...] = ()
    norm: str | None = None
    gain_axis: int = -1


class WeightRotation:
    """What happens to every Parameter of a model; made by `rotation_search.plan_rotation`.

    Args:
        kind: of `ROTATIONS`.
        changes: by the name of the Parameter.
        norms: Parameters whose gains move into other weights -> what is added to them (1 for Gemma).
        stream: what is left to do at run time.

    Attributes:
        kind, changes, norms, stream: as given.
    """

    def __init__(
        self,
        kind: str,
        changes: dict[str, ParameterChange],
        norms: dict[str, float],
        stream: StreamRotation | None = None,
    ):
        self.kind, self.changes, self.norms, self.stream = kind, changes, norms, stream
        self._gains: dict[str, torch.Tensor] = {}

    def set_gains(self, values: Mapping[str, torch.Tensor]) -> None:
        """Note the gains that will be folded; needed before `rotate`.

        Args:
            values: the Parameters of `norms`, ``[H]``.
        """
        self._gains = {name: values[name].detach().float() + offset for name, offset in self.norms.items()}

    def rotate(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """The new value of a Parameter.

        Args:
            name: of the Parameter.
            value: its value, of any floating-point dtype.

        Returns:
            A new tensor of the same shape, dtype and device, computed in fp32 and rounded once; the value
            itself if nothing changes.
        """
        value = value.detach()
        if name in self.norms:
            return torch.full_like(value, 1 - self.norms[name])
        change = self.changes.get(name)
        if change is None:
            return value
        if any(rotation.axis == 0 for rotation in change.rotations):
            return self._changed(value, change).to(value.dtype).contiguous()
        # Large tensors, such as embeddings, in parts: fp32 needs a multiple of their memory.
        result = torch.empty_like(value, memory_format=torch.contiguous_format)
        rows = max(1, _PART_ELEMENTS * len(value) // value.numel())
        for part, changed in zip(value.split(rows), result.split(rows), strict=True):
            changed.copy_(self._changed(part, change))
        return result

    def _changed(self, value: torch.Tensor, change: ParameterChange) -> torch.Tensor:
        result = value.float()
        if change.norm is not None:
            gains = self._gains[change.norm].to(value.device)
            result = (result.transpose(change.gain_axis, -1) * gains).transpose(change.gain_axis, -1)
        for rotation in change.rotations:
            result = _rotate_axis(result, rotation)
        return result


def _rotate_axis(value: torch.Tensor, rotation: AxisRotation) -> torch.Tensor:
    length = value.shape[rotation.axis] - rotation.start
    part = value.narrow(rotation.axis, rotation.start, length).transpose(rotation.axis, -1)
    sign = None if rotation.block else rotation_signs(length).to(value.device)
    rotated = hadamard_transform(part, sign=sign, block_size=rotation.block).transpose(rotation.axis, -1)
    if not rotation.start:
        return rotated
    return torch.cat((value.narrow(rotation.axis, 0, rotation.start), rotated), dim=rotation.axis)
