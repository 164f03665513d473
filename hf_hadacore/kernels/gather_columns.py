"""x[..., order] of activations, in one launch that is over before the product needs it.

Int4 weights in act-order read their inputs in an order of their own. Inside the product every program would
gather its slice again, once for each block of rows of the weight; gathered first, each element moves once.
"""

import torch
import triton
import triton.language as tl

from .launcher import has_pdl, pdl_options, run

_BLOCK = 1024
# Up to so many rows a program has a block of one, beyond it a whole one, which then stays in the L1 cache.
_FEW_ROWS = 64
# Programs of the product take the room of those of more rows, if they are let in before.
_MAX_ROWS_OVERLAPPED = 16
_OPTIONS = pdl_options()


@triton.jit(do_not_specialize=["s_row"])
def _gather_kernel(
    p_x,
    p_order,
    p_out,
    s_row,
    K: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
    PDL: tl.constexpr,
):
    """out [rows, K] = x[:, order]; grid (rows, ceil(K / (BLOCKS BLOCK)))."""
    i_row = tl.program_id(0).to(tl.int64)
    o_block = tl.program_id(1) * (BLOCKS * BLOCK) + tl.arange(0, BLOCK)
    if PDL and OVERLAPS:
        tl.extra.cuda.gdc_launch_dependents()
    # Nobody changes an order: it may be read before the previous kernel has ended.
    b_order = tl.load(p_order + o_block, mask=o_block < K, other=0)
    if PDL:
        tl.extra.cuda.gdc_wait()
    for i in tl.static_range(BLOCKS):
        if i > 0:
            b_order = tl.load(p_order + o_block, mask=o_block < K, other=0)
        b_x = tl.load(p_x + i_row * s_row + b_order, mask=o_block < K)
        tl.store(p_out + i_row * K + o_block, b_x, mask=o_block < K)
        o_block += BLOCK


def gather_columns(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """x[..., order].

    Args:
        x: ``[..., K]`` on the current CUDA device, any strides.
        order: int32 ``[K]``, contiguous.

    Returns:
        ``[..., K]``, contiguous.
    """
    k = x.shape[-1]
    out = x.new_empty(x.shape)
    rows = x if x.is_contiguous() else x.reshape(-1, k)
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    count = out.numel() // k
    blocks = 1 if count <= _FEW_ROWS else -(-k // _BLOCK)
    s_row = k if rows.is_contiguous() else rows.stride(0)
    pdl = has_pdl(x.device)
    run(
        _gather_kernel,
        (rows, order, out),
        (s_row,),
        (k, blocks, _BLOCK, count <= _MAX_ROWS_OVERLAPPED, pdl),
        (count, -(-k // (blocks * _BLOCK)), 1),
        num_warps=4,
        **_OPTIONS[pdl],
    )
    return out
