"""GPTQ (Frantar et al., arXiv:2210.17323): round column by column, and let later columns make up for errors.

The paper updates all later columns with the inverse Hessian after every rounding. Here is the same algorithm
without an inverse, as QuIP (Chee et al., arXiv:2307.13304, theorem 6) writes it. With H = U diag(v) U^T, U
upper triangular with ones on its diagonal, and D = W - Q the differences so far, column j is rounded from

    w_j + sum over i < j of D_i U_ij

which is what the paper's updates have made of it by then, and the error that remains in the layer's output
is sum_j v_j (that - q_j)^2: every column adds its own term. For a chunk of columns all that came before is
one matrix product; inside the chunk every column adds its part to those behind it.
"""

from functools import partial
from typing import NamedTuple

import torch

from .. import int4
from ..errors import QuantizationError
from ..int4 import Int4Weight
from .columns import round_columns
from .coordinate_descent import descend
from .hessian import FactorizedHessian, damped, factorize
from .output_error import OutputError, output_error
from .rtn import fit_groups

# Columns between two matrix products where groups do not say it.
_CHUNK = 128


class GptqResult(NamedTuple):
    """The result of `gptq_quantize`.

    Attributes:
        weight: the int4 weight, on the weight's device.
        output_error: of each row.
        damping: that was needed, as a fraction of H's mean diagonal.
    """

    weight: Int4Weight
    output_error: OutputError
    damping: float

    @property
    def error(self) -> float:
        """tr(D H D^T) / tr(W H W^T), the relative squared error of the layer's output; 0 without any."""
        return self.output_error.relative()


def gptq_quantize(
    weight: torch.Tensor,
    hessian: torch.Tensor | FactorizedHessian,
    *,
    group_size: int,
    symmetric: bool,
    scale_dtype: torch.dtype | None = None,
    order: torch.Tensor | None = None,
    static_groups: bool = False,
    damping: float = 0.01,
    sweeps: int = 1,
    name: str = "weight",
) -> GptqResult:
    """Quantize a weight to int4 so that the layer's output changes least.

    Rows are independent: layers with one input can be quantized with one H (q/k/v; gate/up), be it one after
    the other with one `hessian.factorize`, or stacked along N in one call, which is faster on a GPU.

    Args:
        weight: fp32, fp16 or bf16 ``[N, K]``; K a multiple of 8.
        hessian: fp32 ``[K, K]``, see `hessian.Hessian`; or its factorization, which brings order and damping.
        group_size: g, or -1 for one group per row.
        symmetric: fix z at 8 and store no zeros; scales may then be negative.
        scale_dtype: of the scales; default that of the weight.
        order: int64 ``[K]``, the order in which columns are quantized; None is the natural one.
        static_groups: groups stay those of the natural order, whatever the order, and their grids are chosen
            before the first column is rounded. The result is in natural order. Otherwise groups are
            contiguous in ``order``, and the result multiplies ``x[..., order]``.
        damping: fraction of H's mean diagonal added to its diagonal; grows by itself while H is singular.
        sweeps: of coordinate descent over what GPTQ gives; 0 is the paper's algorithm.
        name: how errors call the weight.

    Raises:
        QuantizationError: weight or Hessian hold NaN or infinite values, shapes do not fit, or the Hessian
            is not positive semidefinite.
    """
    if weight.dim() != 2 or not int4.is_packable(weight.shape[1]):
        raise QuantizationError(
            f"{name}: expected [N, K] with K a multiple of 8, found shape {tuple(weight.shape)}"
        )
    if not isinstance(hessian, FactorizedHessian):
        hessian = factorize(hessian.to(weight.device), order=order, damping=damping, name=name)
    elif order is not None:
        raise QuantizationError(f"{name}: a factorized Hessian has its order already")
    k = weight.shape[1]
    if hessian.matrix.shape[0] != k:
        raise QuantizationError(f"{name}: {k} inputs and a Hessian of {hessian.matrix.shape[0]}")
    rows = weight.float()
    finite = rows.isfinite()
    if not finite.all():
        raise QuantizationError(f"{name}: {int((~finite).sum())} weights are NaN or infinite")
    scale_dtype = scale_dtype or weight.dtype
    order = torch.arange(k, device=weight.device) if hessian.order is None else hessian.order
    size = int4.effective_group_size(k, group_size)
    columns = _Columns(rows, hessian, order, group_size, static_groups)
    columns.quantize(symmetric, scale_dtype)
    c, target, difference = columns.c, columns.target, columns.difference
    if static_groups:
        c, target, difference = (
            torch.empty_like(t).index_copy_(0, order, t) for t in (c, target, difference)
        )
    if sweeps:
        h = damped(hessian.matrix, hessian.damping, None if static_groups else hessian.order)
    for _ in range(sweeps):
        difference = descend(target, h, c, columns.scale, columns.zero, size=size, scale_dtype=scale_dtype)
    q = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    q.copy_(c.T + int4.expand_groups(columns.zero.T, k, group_size))
    quantized = Int4Weight(
        int4.pack(q),
        columns.scale.T.to(scale_dtype).contiguous(),
        None if symmetric else columns.zero.T.to(torch.uint8).contiguous(),
        group_size,
    )
    if not static_groups:
        difference = torch.empty_like(difference).index_copy_(0, order, difference)
    return GptqResult(quantized, output_error(rows, difference.T, hessian.matrix), hessian.damping)


class _Columns:
    """The columns of a weight on their way. They are rows here: loops over them touch contiguous memory.

    Attributes:
        c: fp32 ``[K, N]``, the integers q - z, in the order of quantization, as all that has K rows here.
        difference: fp32 ``[K, N]``, W - Q.
        scale, zero: fp32 ``[G, N]``.
    """

    def __init__(
        self,
        rows: torch.Tensor,
        hessian: FactorizedHessian,
        order: torch.Tensor,
        group_size: int,
        static_groups: bool,
    ):
        k = rows.shape[1]
        size = int4.effective_group_size(k, group_size)
        self.rows, self.hessian, self.order, self.group_size = rows, hessian, order, group_size
        self.target = rows.T[order].contiguous()
        self.c = torch.empty_like(self.target)
        self.difference = torch.empty_like(self.target)
        self.scale = rows.new_empty(int4.num_groups(k, group_size), len(rows))
        self.zero = torch.empty_like(self.scale)
        # Where one chunk is not one group, grids cannot wait for the updates.
        self.are_grids_first = static_groups or size == k
        self.chunk = _CHUNK if self.are_grids_first else size
        self.groups = (order if static_groups else torch.arange(k, device=rows.device)) // size

    def quantize(self, symmetric: bool, scale_dtype: torch.dtype) -> None:
        """Round all columns."""
        grid = partial(fit_groups, symmetric=symmetric, scale_dtype=scale_dtype, by_magnitude=False)
        if self.are_grids_first:
            importance = torch.empty_like(self.hessian.variance)
            importance[self.order] = self.hessian.variance
            scale, zero = grid(self.rows, group_size=self.group_size, importance=importance)
            self.scale.copy_(scale.T)
            self.zero.copy_(zero.T)
        k = len(self.target)
        for start in range(0, k, self.chunk):
            part = slice(start, min(start + self.chunk, k))
            update = self.hessian.factor[:start, part].T @ self.difference[:start]
            if not self.are_grids_first:
                updated = self._updated(part, update)
                scale, zero = grid(updated.T, group_size=-1, importance=self.hessian.variance[part])
                self.scale[start // self.chunk], self.zero[start // self.chunk] = scale[:, 0], zero[:, 0]
            self._round(part, update)

    def _updated(self, part: slice, update: torch.Tensor) -> torch.Tensor:
        """``[chunk, N]``: what the paper's updates have made of a chunk when its first column is rounded.

        `update` counts on the chunk's columns staying what they were. The weights that cost nothing more are
        those x for which (x - w) U = update.
        """
        factor = self.hessian.factor[part, part]
        moved = torch.linalg.solve_triangular(factor.T, update, upper=False, unitriangular=True)
        return moved.add_(self.target[part])

    def _round(self, part: slice, update: torch.Tensor) -> None:
        """Round the columns of a chunk, one after the other."""
        round_columns(
            update.add_(self.target[part]),
            self.target[part],
            self.hessian.factor[part, part],
            self.scale,
            self.zero,
            self.groups[part],
            self.c[part],
            self.difference[part],
        )
