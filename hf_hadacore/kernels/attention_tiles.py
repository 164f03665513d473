"""What a tile of `attention_triton` sees of the keys, and where its rows go.

Prefixes: p_ pointer, b_ values in registers, o_ offsets, m_ mask, i_ index.
"""

import math

import triton
import triton.language as tl

# The numerators are 2^8 p, the largest power of two that e4m3 has.
LOG2_P = tl.constexpr(8.0)
LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def bounds(p_start, p_end, p_position, i_b, length, queries):
    """Of a sequence: its first key, the end of its keys, and where its first query stands."""
    i_start = 0
    i_end = length
    i_position = length - queries
    # What another program writes must not stay in L1.
    if p_start is not None:
        i_start = tl.maximum(tl.load(p_start + i_b, cache_modifier=".cg"), 0)
    if p_end is not None:
        i_end = tl.minimum(tl.load(p_end + i_b, cache_modifier=".cg"), length)
    if p_position is not None:
        i_position = tl.load(p_position + i_b, cache_modifier=".cg")
    return i_start, i_end, i_position


@triton.jit
def blocks(
    i_start,
    i_end,
    i_position,
    i_first,
    i_last,
    window,
    i_split,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Blocks of a program among those seen by queries i_first ... i_last, and how many programs have some."""
    if CAUSAL:
        i_end = tl.minimum(i_end, i_position + i_last + 1)
    if WINDOW:
        i_start = tl.maximum(i_start, i_position + i_first - window + 1)
    i_block = i_start // BLOCK
    count = tl.maximum(tl.cdiv(i_end, BLOCK) - i_block, 0)
    # One program says that nothing is seen.
    active = tl.maximum(tl.minimum(count, SPLITS), 1)
    i_from = i_split * count // active
    return i_block + i_from, (i_split + 1) * count // active - i_from, active


@triton.jit
def store_rows(
    p_out,
    p_sinks,
    o_row,
    i_b,
    i_first,
    i_head,
    queries,
    m_row,
    b_acc,
    b_max,
    b_sum,
    HEADS: tl.constexpr,
    PACK: tl.constexpr,
    D: tl.constexpr,
    D_BLOCK: tl.constexpr,
):
    """Rows of the result, for heads from i_head on, from sums of values and of 2^(8 + t - max)."""
    o_token = o_row
    o_head = tl.zeros_like(o_row) + i_head
    if PACK > 1:
        o_token = o_row % queries
        o_head += o_row // queries
    if p_sinks is not None:
        b_sink = tl.load(p_sinks + o_head, mask=m_row, other=0.0) * LOG2_E
        b_sum += tl.exp2(b_sink - tl.where(b_max == float("-inf"), 0.0, b_max) + LOG2_P)
    b_out = b_acc / tl.where(b_sum == 0.0, 1.0, b_sum)[:, None]
    o_d = tl.arange(0, D_BLOCK)
    p_out += (i_b.to(tl.int64) * queries + i_first) * (HEADS * D)
    o_out = ((o_token - i_first) * HEADS + o_head) * D
    tl.store(
        p_out + (o_out[:, None] + o_d[None, :]),
        b_out.to(p_out.dtype.element_ty),
        mask=m_row[:, None] & (o_d < D)[None, :],
    )
