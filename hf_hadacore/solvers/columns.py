"""The columns of a chunk, one after the other: what GPTQ and coordinate descent do besides products.

Each column is a few operations on vectors, which on a GPU end sooner than torch can launch them: there a
kernel goes through a whole chunk. The loops are what it computes, and do it everywhere else. Weights are
transposed, so that columns are contiguous in memory.
"""

from importlib.util import find_spec

import torch

from ..kernels.launcher import on_device
from .rtn import round_to_grid


def round_columns(
    current: torch.Tensor,
    target: torch.Tensor,
    factor: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    group: torch.Tensor,
    c: torch.Tensor,
    difference: torch.Tensor,
) -> None:
    """Round a chunk of C columns; each adds its difference times its row of the factor to those behind it.

    Args:
        current: fp32 ``[C, N]``, what is rounded; overwritten.
        target: fp32 ``[C, N]``, the weight.
        factor: fp32 ``[C, C]``, upper triangular.
        scale, zero: fp32 ``[G, N]``.
        group: int64 ``[C]``, of each column.
        c, difference: fp32 ``[C, N]``, the result: integers q - z, and the weight less what they stand for.
    """
    if _has_kernels(current):
        from ..kernels import gptq_columns

        with on_device(current.device):
            gptq_columns.round_columns(current, target, factor, scale, zero, group, c, difference)
    else:
        round_columns_reference(current, target, factor, scale, zero, group, c, difference)


def round_columns_reference(
    current: torch.Tensor,
    target: torch.Tensor,
    factor: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    group: torch.Tensor,
    c: torch.Tensor,
    difference: torch.Tensor,
) -> None:
    """`round_columns` in torch."""
    scale, zero = scale[group], zero[group]
    for j in range(len(current)):
        c[j] = round_to_grid(current[j], scale[j], zero[j])
        torch.addcmul(target[j], c[j], scale[j], value=-1, out=difference[j])
        current[j + 1 :].addr_(factor[j, j + 1 :], difference[j])


def descend_columns(
    gradient: torch.Tensor, hessian: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, c: torch.Tensor
) -> None:
    """Move the integers of a chunk of C columns of one group to their best values, one after the other.

    Args:
        gradient: fp32 ``[C, N]``, the chunk's part of H (W - Q)^T; kept up to date in place.
        hessian: fp32 ``[C, C]``, of the chunk, with a positive diagonal.
        scale, zero: fp32 ``[N]``.
        c: fp32 ``[C, N]``, the integers q - z; changed in place.
    """
    if _has_kernels(gradient):
        from ..kernels import gptq_columns

        with on_device(gradient.device):
            gptq_columns.descend_columns(gradient, hessian, scale, zero, c)
    else:
        descend_columns_reference(gradient, hessian, scale, zero, c)


def descend_columns_reference(
    gradient: torch.Tensor, hessian: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, c: torch.Tensor
) -> None:
    """`descend_columns` in torch."""
    diagonal = hessian.diagonal()
    for j in range(len(c)):
        best = torch.addcdiv(c[j] * scale, gradient[j], diagonal[j])
        new = round_to_grid(best, scale, zero)
        gradient.addr_(hessian[j], c[j].sub_(new).mul_(scale))
        c[j] = new


def _has_kernels(chunk: torch.Tensor) -> bool:
    return chunk.is_cuda and find_spec("triton") is not None
