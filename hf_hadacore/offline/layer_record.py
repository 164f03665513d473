"""What the report of an offline run says about each weight."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from .. import int4
from ..int4 import Int4Weight

_ERROR_CHUNK_ELEMENTS = 1 << 24  # 64 MB in fp32: the error of a weight is summed over chunks of rows


class CalibrationRecord(NamedTuple):
    """What calibration adds to the record of a weight; of fused experts the mean over all of them.

    Attributes:
        solver: "gptq", or "rtn" where too few tokens came by.
        tokens: calibration tokens that the weight has seen.
        output_error: ``|x w - x w'|^2 / |x w|^2`` over those tokens.
        damping: the fraction of the Hessian's mean diagonal that was added; None without a Hessian.
        experts_without_calibration: those of fused experts that "rtn" quantized; None if there are none.
    """

    solver: str
    tokens: int
    output_error: float
    damping: float | None = None
    experts_without_calibration: list[int] | None = None


class LayerRecord(NamedTuple):
    """What the report says about one quantized weight.

    Attributes:
        name: the Parameter.
        shape: of the full-precision weight, output-major.
        group_size: g; -1 is one group per row.
        symmetric: whether no zeros are stored.
        bits_per_weight: scales and zeros included.
        relative_error: ``|w - w'| / |w|`` in the L2 norm; None where w is not known.
        calibration: what calibration adds; None without.
    """

    name: str
    shape: list[int]
    group_size: int
    symmetric: bool
    bits_per_weight: float
    relative_error: float | None
    calibration: CalibrationRecord | None = None

    def as_json(self) -> dict[str, Any]:
        """The fields that have a value, with those of `calibration` among them."""
        fields = {**self._asdict(), **(self.calibration._asdict() if self.calibration else {})}
        del fields["calibration"]
        return {
            name: float(f"{value:.5g}") if isinstance(value, float) else value
            for name, value in fields.items()
            if value is not None
        }


def make_record(
    name: str, value: torch.Tensor | None, weight: Int4Weight, calibration: CalibrationRecord | None = None
) -> LayerRecord:
    """The record of a weight.

    Args:
        name: the Parameter.
        value: floating point ``[..., N, K]``; None if it is not known.
        weight: its int4 form, columns in the same order.
        calibration: what calibration adds.
    """
    tensors = (weight.packed, weight.scale, weight.zero)
    stored = sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)
    return LayerRecord(
        name=name,
        shape=[*weight.packed.shape[:-1], weight.in_features],
        group_size=weight.group_size,
        symmetric=weight.zero is None,
        bits_per_weight=round(8 * stored / (weight.packed.numel() * int4.NIBBLES_PER_WORD), 4),
        relative_error=None if value is None else relative_error(value, weight),
        calibration=calibration,
    )


def relative_error(value: torch.Tensor, weight: Int4Weight) -> float:
    """``|w - w'| / |w|`` of a quantized weight in the L2 norm, without a full-size temporary.

    Args:
        value: floating point ``[..., N, K]``.
        weight: its int4 form.

    Returns:
        The error; 0 for a weight that is zero and stays so.
    """
    rows = value.reshape(-1, value.shape[-1])
    packed, scale = weight.packed.flatten(0, -2), weight.scale.flatten(0, -2)
    zero = None if weight.zero is None else weight.zero.flatten(0, -2)
    step = max(1, _ERROR_CHUNK_ELEMENTS // max(1, rows.shape[-1]))
    squared_error = squared_norm = 0.0
    for begin in range(0, rows.shape[0], step):
        part = slice(begin, begin + step)
        restored = int4.dequantize(
            packed[part],
            scale[part],
            None if zero is None else zero[part],
            group_size=weight.group_size,
            dtype=torch.float32,
        )
        exact = rows[part].float()
        squared_error += restored.sub_(exact).square_().sum(dtype=torch.float64).item()
        squared_norm += exact.square().sum(dtype=torch.float64).item()
    return (squared_error / squared_norm) ** 0.5 if squared_norm else 0.0


def mean_record(name: str, records: Sequence[LayerRecord]) -> LayerRecord:
    """One record of fused experts, from theirs: errors are means, damping is the largest.

    Args:
        name: the Parameter.
        records: of the experts' weights, in their order, with calibration.
    """
    parts = [record.calibration for record in records if record.calibration is not None]
    without = [expert for expert, part in enumerate(parts) if part.solver == "rtn"]
    return records[0]._replace(
        name=name,
        shape=[len(records), *records[0].shape],
        relative_error=sum(record.relative_error or 0.0 for record in records) / len(records),
        calibration=CalibrationRecord(
            solver="rtn" if len(without) == len(parts) else "gptq",
            tokens=sum(part.tokens for part in parts),
            output_error=sum(part.output_error for part in parts) / len(parts),
            damping=max((part.damping for part in parts if part.damping is not None), default=None),
            experts_without_calibration=without or None,
        ),
    )
