"""What GPTQ leaves on the table: each integer, then each scale, moved to where the output's error is least.

GPTQ rounds a column while those after it can still make up for it. Once all are fixed, some integers are no
longer the best for what their row has become. Coordinate descent (QuantEase, Behdin et al., arXiv:2309.01885)
goes over them again: with D = W - Q and R = D H, the best value of column j, all others fixed, is
q_j + r_j / h_jj. The scale of a group with integers c follows by least squares: s + <c, r> / <c, H c>. No
step raises the error.
"""

import torch

from .columns import descend_columns
from .rtn import storable_scale

# Columns between two matrix products where a group is all of a row.
_CHUNK = 128


def descend(
    target: torch.Tensor,
    hessian: torch.Tensor,
    c: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    *,
    size: int,
    scale_dtype: torch.dtype,
) -> torch.Tensor:
    """One sweep over all columns and groups, in place. The columns of the weight are rows here.

    Args:
        target: fp32 ``[K, N]``, W^T with contiguous groups.
        hessian: fp32 ``[K, K]``, with a positive diagonal.
        c: fp32 ``[K, N]``, the integers q - z.
        scale, zero: fp32 ``[G, N]``.
        size: columns of a group.
        scale_dtype: to which scales are rounded.

    Returns:
        fp32 ``[K, N]``, W^T - Q^T.
    """
    k = len(target)
    difference = target - c * scale.repeat_interleave(size, dim=0)[:k]
    step = min(size, _CHUNK) if size == k else size
    for start in range(0, k, step):
        part, group = slice(start, min(start + step, k)), start // size
        block = hessian[part, part]
        gradient = hessian[part] @ difference
        descend_columns(gradient, block, scale[group], zero[group], c[part])
        if size < k:
            _rescale(c[part], gradient, block, scale[group], scale_dtype)
        difference[part] = target[part] - c[part] * scale[group]
    return difference


def _rescale(
    c: torch.Tensor, gradient: torch.Tensor, block: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype
) -> None:
    """Move the scales ``[N]`` of a group to the least squares, in place, where their dtype has it nearer."""
    slope = (c * gradient).sum(0)
    curvature = (c * (block @ c)).sum(0)
    best = scale + slope / torch.where(curvature == 0, 1, curvature)
    move = torch.where(best == 0, scale, storable_scale(best, dtype)) - scale
    scale += torch.where(move * (move * curvature - 2 * slope) < 0, move, 0)
