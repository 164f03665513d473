"""Triton kernel of `rms_norm` and `add_rms_norm`; see `pointwise_parts` for when it reads what."""

import torch
import triton
import triton.language as tl

from .launcher import has_pdl, power_of_2, run
from .pointwise_parts import OPTIONS, as_rows, prefetch, scale_normed

# Rows that are longer do not fit into one program.
MAX_SIZE = 65536


@triton.jit(do_not_specialize=["rows"])
def _rms_norm_kernel(
    p_x,
    p_residual,
    p_weight,
    p_out,
    p_sum,
    rows,
    inner,
    s_outer,
    s_inner,
    eps,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    OFFSET: tl.constexpr,
    ROUND_FIRST: tl.constexpr,
    PDL: tl.constexpr,
):
    """out = norm(x [+ residual]) * weight, sum = x + residual.

    Row r of x lies at (r // inner) * s_outer + (r % inner) * s_inner; residual, out and sum are contiguous.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        prefetch(p_weight, N, BLOCK)
        tl.extra.cuda.gdc_wait()
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_n = tl.arange(0, BLOCK)
    m = (o_row < rows)[:, None] & (o_n < N)[None, :]
    o_x = (o_row // inner) * s_outer + (o_row % inner) * s_inner
    o_flat = o_row[:, None] * N + o_n[None, :]
    b_x = tl.load(p_x + o_x[:, None] + o_n[None, :], mask=m, other=0.0)
    b_weight = tl.load(p_weight + o_n, mask=o_n < N, other=0.0)
    dtype: tl.constexpr = p_out.dtype.element_ty
    if p_residual is not None:
        b_residual = tl.load(p_residual + o_flat, mask=m, other=0.0)
        b_x = (b_x.to(tl.float32) + b_residual.to(tl.float32)).to(dtype)
        tl.store(p_sum + o_flat, b_x, mask=m)
    b_wide = b_x.to(tl.float32)
    b_mean = tl.sum(b_wide * b_wide, axis=1) / N
    b_normed = b_wide * tl.rsqrt(b_mean + eps)[:, None]
    tl.store(p_out + o_flat, scale_normed(b_normed, b_weight[None, :], OFFSET, ROUND_FIRST, dtype), mask=m)


def launch(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    weight_offset: float,
    round_before_weight: bool,
    out: torch.Tensor,
    total: torch.Tensor | None,
) -> None:
    """Run the kernel of `hf_hadacore::rms_norm` and `hf_hadacore::add_rms_norm`.

    Args:
        x: ``[..., N]``, N <= MAX_SIZE.
        residual: of the same shape; None adds nothing.
        weight: ``[N]``.
        eps, weight_offset, round_before_weight: as in the op.
        out: contiguous, of the shape of x.
        total: like `out`, for x + residual; None where there is no residual.
    """
    if x.numel() == 0:
        return
    n = x.shape[-1]
    rows = x.numel() // n
    x, inner, s_outer, s_inner = as_rows(x)
    block = power_of_2(n)
    per_program = max(1, 1024 // block)
    pdl = has_pdl(x.device)
    run(
        _rms_norm_kernel,
        (x, residual if residual is None else residual.contiguous(), weight.contiguous(), out, total),
        (rows, inner, s_outer, s_inner, eps),
        (n, per_program, block, weight_offset, round_before_weight, pdl),
        (-(-rows // per_program), 1, 1),
        num_warps=min(16, max(4, block // 512)),
        **OPTIONS[pdl],
    )
