"""x[..., order] of activations, in one launch that is over before the product needs it.

Int4 weights in act-order read their inputs in an order of their own. Inside the product every program would
gather its slice again, once for each block of rows of the weight; gathered first, each element moves once.
"""

import torch
import triton
import triton.language as tl

from .launcher import has_pdl, pdl_options, run

_BLOCK = 1024
# For more rows torch's own kernel is faster: here every row reads the order anew.
MAX_ROWS = 16
_OPTIONS = pdl_options()


@triton.jit(do_not_specialize=["s_row"])
def _gather_kernel(p_x, p_order, p_out, s_row, K: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """out [rows, K] = x[:, order]; grid (rows, ceil(K / BLOCK))."""
    i_row = tl.program_id(0).to(tl.int64)
    o_k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    # Nobody changes an order: it may be read before the previous kernel has ended.
    b_order = tl.load(p_order + o_k, mask=o_k < K, other=0)
    if PDL:
        tl.extra.cuda.gdc_wait()
    b_x = tl.load(p_x + i_row * s_row + b_order, mask=o_k < K)
    tl.store(p_out + i_row * K + o_k, b_x, mask=o_k < K)


def gather_columns(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """x[..., order].

    Args:
        x: ``[..., K]`` on the current CUDA device, any strides.
        order: int32 ``[K]``, contiguous.

    Returns:
        ``[..., K]``, contiguous.
    """
    k = x.shape[-1]
    count = x.numel() // k
    if count > MAX_ROWS:
        return x.index_select(-1, order)
    out = x.new_empty(x.shape)
    rows = x if x.is_contiguous() else x.reshape(-1, k)
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    s_row = k if rows.is_contiguous() else rows.stride(0)
    pdl = has_pdl(x.device)
    run(
        _gather_kernel,
        (rows, order, out),
        (s_row,),
        (k, _BLOCK, pdl),
        (count, -(-k // _BLOCK), 1),
        num_warps=4,
        **_OPTIONS[pdl],
    )
    return out
