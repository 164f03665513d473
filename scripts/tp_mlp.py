"""An int4 MLP split over ranks, as in "TP-aware dequantization" (arXiv:2402.04925).

Both matrices were quantized with act-order: their input channels are stored in an order in which groups are
contiguous, W1 in the order P1 and W2 in the order P2, so that y = x[:, P1] W1^T and z = y[:, P2] W2^T. The
rows of W1 are split over the ranks, and so are the columns of W2.

Naive (Algorithm 2): a rank needs channels of y that others have computed, since P2 mixes all of them:
all-gather y, permute it, take the own chunk, multiply, all-reduce. TP-aware (Algorithm 3): the rows of W1 are
put in the order P2 beforehand, so that a rank computes just the channels that its part of W2 reads: multiply
twice, all-reduce. P1 is read within the first product in both.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist

from hf_hadacore import int4
from hf_hadacore.int4 import Int4Weight
from hf_hadacore.kernels.gated_activation import gated_activation
from hf_hadacore.kernels.w4a16 import w4a16_linear
from hf_hadacore.kernels.w4a16_tiled import prefers_tiles, w4a16_tiled
from hf_hadacore.kernels.w4a16_tiles import to_tiles

GROUP = 128
DTYPE = torch.float16


class Shape(NamedTuple):
    """Of an MLP.

    Attributes:
        hidden: H.
        intermediate: I.
        is_gated: whether it is silu(x G^T) * (x U^T) that W2 reads; the paper's has one first matrix and no
            activation.
    """

    hidden: int
    intermediate: int
    is_gated: bool = False


SHAPES = {
    "llama-70b": Shape(8192, 28672),
    "granite-20b": Shape(6144, 24576),
    "llama-70b-gated": Shape(8192, 28672, is_gated=True),
}
# For a machine without a GPU.
SMALL = {"small": Shape(512, 1024), "small-gated": Shape(512, 1024, is_gated=True)}


class Problem:
    """The whole MLP, random, the same on every rank.

    Attributes:
        first: one weight ``[I, H]``, or gate and up; their rows are in natural order.
        second: ``[H, I]``.
        p1, p2: int32 ``[H]`` and ``[I]``.
    """

    def __init__(self, shape: Shape, device: torch.device):
        self.shape = shape
        self.generator = torch.Generator(device).manual_seed(shape.hidden + shape.intermediate)
        h, i, _ = shape
        self.first = [self._weight(i, h) for _ in range(1 + shape.is_gated)]
        self.second = self._weight(h, i)
        self.p1, self.p2 = (torch.randperm(k, device=device, generator=self.generator).int() for k in (h, i))

    def _weight(self, n: int, k: int) -> Int4Weight:
        device = self.generator.device
        packed = torch.empty((n, k // int4.NIBBLES_PER_WORD), dtype=torch.int32, device=device)
        packed.random_(-(2**31), 2**31 - 1, generator=self.generator)
        scale = torch.empty((n, k // GROUP), device=device).uniform_(0.5, 1.5, generator=self.generator)
        # Outputs are as large as inputs.
        return Int4Weight(packed, (scale / (4.6 * k**0.5)).to(DTYPE), None, GROUP)

    def tokens(self, count: int) -> torch.Tensor:
        """Random inputs ``[count, H]``."""
        return torch.randn(
            count, self.shape.hidden, device=self.generator.device, generator=self.generator
        ).to(DTYPE)

    def exact(self, x: torch.Tensor) -> torch.Tensor:
        """The MLP's output in float64, with the weights exactly as stored and nothing rounded between."""
        x = x.double().index_select(1, self.p1)
        y = [x @ weight.dequantize(torch.float64).T for weight in self.first]
        inner = torch.nn.functional.silu(y[0]) * y[1] if self.shape.is_gated else y[0]
        return inner.index_select(1, self.p2) @ self.second.dequantize(torch.float64).T


class _Product:
    """x[..., input_perm] W^T by the kernel that this device's int4 layers use."""

    def __init__(self, weight: Int4Weight, input_perm: torch.Tensor | None = None):
        self.op: Callable[..., torch.Tensor] = w4a16_linear
        n = weight.packed.shape[0]
        if prefers_tiles(weight.packed.device, n, weight.in_features, GROUP):
            self.op = w4a16_tiled
            scale = weight.scale.mT.contiguous().mT
            weight = weight._replace(packed=to_tiles(weight.packed), scale=scale)
        self.weight, self.input_perm = weight, input_perm

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        packed, scale, zero, group_size = self.weight
        return self.op(x, packed, scale, zero, self.input_perm, None, group_size=group_size)

    @property
    def nbytes(self) -> int:
        return self.weight.packed.nbytes + self.weight.scale.nbytes

    def copy(self) -> "_Product":
        """One with weights at another address."""
        twin = object.__new__(_Product)
        packed, scale = self.weight.packed.clone(), self.weight.scale.clone()
        twin.op, twin.input_perm = self.op, self.input_perm
        twin.weight = self.weight._replace(packed=packed, scale=scale)
        return twin


class Share:
    """What one rank holds of a problem.

    Args:
        problem: the whole.
        rank, world: whose share.
        is_aware: whether the rows of W1 are in the order P2.
    """

    def __init__(self, problem: Problem, rank: int, world: int, is_aware: bool):
        self.rank, self.world, self.p2 = rank, world, problem.p2
        self.is_gated = problem.shape.is_gated
        size = problem.shape.intermediate // world
        chunk = slice(rank * size, (rank + 1) * size)
        rows: torch.Tensor | slice = problem.p2[chunk].long() if is_aware else chunk
        parts = [(weight.packed[rows], weight.scale[rows]) for weight in problem.first]
        packed, scale = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        self.first = _Product(Int4Weight(packed, scale, None, GROUP), problem.p1)
        words, groups = (
            slice(chunk.start // unit, chunk.stop // unit) for unit in (int4.NIBBLES_PER_WORD, GROUP)
        )
        second = problem.second
        packed, scale = second.packed[:, words].contiguous(), second.scale[:, groups].contiguous()
        self.second = _Product(Int4Weight(packed, scale, None, GROUP))

    @property
    def nbytes(self) -> int:
        """Of the weights."""
        return self.first.nbytes + self.second.nbytes

    def copy(self) -> "Share":
        """One with weights at another address, to leave the cache behind."""
        twin = object.__new__(Share)
        twin.__dict__ |= self.__dict__ | {"first": self.first.copy(), "second": self.second.copy()}
        return twin

    def inner(self, x: torch.Tensor) -> torch.Tensor:
        """The channels of the intermediate activation whose rows of W1 this rank holds: ``[M, I/p]``."""
        y = self.first(x)
        if not self.is_gated:
            return y
        gate, up = y.chunk(2, dim=-1)
        return gated_activation(gate, up)


def all_reduce(x: torch.Tensor) -> torch.Tensor:
    """The sum over ranks, in place, by the default process group's backend."""
    dist.all_reduce(x)
    return x


def permuted_chunk(parts: torch.Tensor, p2: torch.Tensor, rank: int, world: int) -> torch.Tensor:
    """The rank's chunk of ``y[:, P2]``.

    Args:
        parts: ``[world * M, I/p]``, the ranks' chunks of y one below the other, as an all-gather leaves them.
        p2: ``[I]``.
        rank, world: of the chunk.
    """
    m, size = parts.shape[0] // world, parts.shape[1]
    y = parts.view(world, m, size).transpose(0, 1).reshape(m, world * size)
    return y.index_select(1, p2).chunk(world, dim=1)[rank]


def naive(share: Share, x: torch.Tensor) -> torch.Tensor:
    """Algorithm 2: ``[M, H]``."""
    parts = y = share.inner(x)
    if share.world > 1:
        parts = y.new_empty(share.world * y.shape[0], y.shape[1])
        dist.all_gather_into_tensor(parts, y)
    z = share.second(permuted_chunk(parts, share.p2, share.rank, share.world))
    return all_reduce(z) if share.world > 1 else z


def aware(
    share: Share, x: torch.Tensor, reduce: Callable[[torch.Tensor], torch.Tensor] = all_reduce
) -> torch.Tensor:
    """Algorithm 3: ``[M, H]``.

    Args:
        share: made with `is_aware`.
        x: ``[M, H]``.
        reduce: gives the sum over ranks.
    """
    z = share.second(share.inner(x))
    return reduce(z) if share.world > 1 else z
