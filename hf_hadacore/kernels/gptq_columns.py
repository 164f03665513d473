"""A chunk of columns of GPTQ or of coordinate descent in one launch: its columns one after the other.

The rows of a weight do not depend on each other. A program holds a chunk of a few of them in registers, takes
one column after the other out of it, and adds what its rounding does to the others. In torch each column is
a handful of launches that are over sooner than the next one starts.

Operations are rounded as torch rounds them on CUDA, where a product and the sum it goes into are two, so that
results are those of the loops in `solvers.columns` bit for bit; `scripts/check_gptq_gpu.py` compares them.
Weights are transposed, as there: their columns are rows of memory.
"""

import torch
import triton
import triton.language as tl

from .launcher import power_of_2, run

# Of a program. Every warp holds an eighth of the chunk's columns: 16 registers a thread, for 128 columns.
_ROWS = 32
_WARPS = 8


@triton.jit
def _column(b_chunk, o_c, i_column):
    """One column ``[ROWS]`` of a chunk ``[CHUNK, ROWS]`` in registers: a sum with zeros, which is exact."""
    return tl.sum(tl.where((o_c == i_column)[:, None], b_chunk, 0.0), axis=0)


@triton.jit
def _round_to_grid(b_value, b_scale, b_zero):
    """The integers q - z nearest to w / s, halves to even."""
    # 1.5 * 2^23: fp32 numbers around it are the integers. Beyond 2^22 it rounds wrong, to what is clamped.
    b_rounded = (tl.div_rn(b_value, b_scale) + 12582912.0) - 12582912.0
    return tl.minimum(tl.maximum(b_rounded, -b_zero), 15.0 - b_zero)


# Were it known that rows are a multiple of 16, threads would hold four neighbours and divide four times.
@triton.jit(do_not_specialize=["rows", "columns"])
def _round_kernel(
    p_current,
    p_target,
    p_factor,
    p_scale,
    p_zero,
    p_group,
    p_c,
    p_difference,
    rows,
    columns,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """c and difference ``[columns, rows]`` of current and target, both alike; factor ``[columns, columns]``.

    Scale and zero are ``[groups, rows]``, group is int64 ``[columns]``. Grid ``(ceil(rows / ROWS),)``.
    """
    o_n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m_n = o_n < rows
    o_c = tl.arange(0, CHUNK)
    m_c = o_c < columns
    b_current = tl.load(p_current + o_c[:, None] * rows + o_n, mask=m_c[:, None] & m_n, other=0.0)
    # Two stages: a column's operands are on their way while the one before is rounded.
    for j in tl.range(columns, num_stages=2):
        o_group = tl.load(p_group + j) * rows + o_n
        b_scale = tl.load(p_scale + o_group, mask=m_n, other=1.0)
        b_zero = tl.load(p_zero + o_group, mask=m_n, other=0.0)
        b_target = tl.load(p_target + j * rows + o_n, mask=m_n, other=0.0)
        b_factor = tl.load(p_factor + j * columns + o_c, mask=m_c, other=0.0)
        b_c = _round_to_grid(_column(b_current, o_c, j), b_scale, b_zero)
        b_difference = b_target - b_c * b_scale
        # Columns up to this one change as well, but nobody looks at them any more.
        b_current += b_factor[:, None] * b_difference
        tl.store(p_c + j * rows + o_n, b_c, mask=m_n)
        tl.store(p_difference + j * rows + o_n, b_difference, mask=m_n)


@triton.jit(do_not_specialize=["rows", "columns"])
def _descend_kernel(
    p_gradient,
    p_hessian,
    p_scale,
    p_zero,
    p_c,
    p_new,
    rows,
    columns,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """New integers, and the gradient in place, of a chunk with one scale and zero ``[rows]``.

    Gradient, c and new are ``[columns, rows]``, the Hessian is ``[columns, columns]``. New is not c: warps
    that share a column read c when others may have stored already. Grid ``(ceil(rows / ROWS),)``.
    """
    o_n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m_n = o_n < rows
    o_c = tl.arange(0, CHUNK)
    m_c = o_c < columns
    o_chunk = o_c[:, None] * rows + o_n
    m_chunk = m_c[:, None] & m_n
    b_gradient = tl.load(p_gradient + o_chunk, mask=m_chunk, other=0.0)
    b_scale = tl.load(p_scale + o_n, mask=m_n, other=1.0)
    b_zero = tl.load(p_zero + o_n, mask=m_n, other=0.0)
    for j in tl.range(columns, num_stages=2):
        b_c = tl.load(p_c + j * rows + o_n, mask=m_n, other=0.0)
        b_hessian = tl.load(p_hessian + j * columns + o_c, mask=m_c, other=0.0)
        diagonal = tl.load(p_hessian + j * columns + j)
        b_best = b_c * b_scale + tl.div_rn(_column(b_gradient, o_c, j), diagonal)
        b_new = _round_to_grid(b_best, b_scale, b_zero)
        b_gradient += b_hessian[:, None] * ((b_c - b_new) * b_scale)
        tl.store(p_new + j * rows + o_n, b_new, mask=m_n)
    tl.store(p_gradient + o_chunk, b_gradient, mask=m_chunk)


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
    """`solvers.columns.round_columns` on the current CUDA device.

    Args:
        current, target: fp32 ``[C, N]``, contiguous.
        factor: fp32 ``[C, C]``.
        scale, zero: fp32 ``[G, N]``, contiguous.
        group: int64 ``[C]``.
        c, difference: fp32 ``[C, N]``, contiguous; every element is written.
    """
    _launch(_round_kernel, (current, target, factor.contiguous(), scale, zero, group, c, difference))


def descend_columns(
    gradient: torch.Tensor, hessian: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, c: torch.Tensor
) -> None:
    """`solvers.columns.descend_columns` on the current CUDA device.

    Args:
        gradient, c: fp32 ``[C, N]``, contiguous; changed in place.
        hessian: fp32 ``[C, C]``.
        scale, zero: fp32 ``[N]``, contiguous.
    """
    new = torch.empty_like(c)
    _launch(_descend_kernel, (gradient, hessian.contiguous(), scale, zero, c, new))
    c.copy_(new)


def _launch(kernel: triton.JITFunction, tensors: tuple[torch.Tensor, ...]) -> None:
    """Launch a kernel for chunks of the first tensor's shape."""
    columns, rows = tensors[0].shape
    run(
        kernel,
        tensors,
        (rows, columns),
        (power_of_2(columns), _ROWS),
        (-(-rows // _ROWS), 1, 1),
        num_warps=_WARPS,
        # torch's products are rounded before they are added.
        enable_fp_fusion=False,
    )
