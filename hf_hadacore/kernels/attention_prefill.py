"""8-bit attention of many queries on Hopper: warp-specialized, products beside softmax.

One warp fetches queries, keys and values by TMA into rings of shared memory; two or three warpgroups of 64
queries each use them: while the tensor cores work for one, another exponentiates (FlashAttention-3,
arXiv:2407.08608, section 3.1; without its barriers that make them take turns, which cost time here). What
differs from it: products of P and V are added up in fp32 block by block (the tensor core keeps only some 14
bits of an fp8 sum), P needs no shuffle (see `attention_softmax`), and every block of keys has scales of its
own.

Prefixes: p_ pointer, d_ TMA descriptor, b_ values in registers, o_ offsets, m_ mask, i_ index, s_ stride or
shared memory.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .attention_softmax import BLOCK_N, INT_BITS, LOG2_E, P_EXPONENT, ROWS, exp2, parts_layout, softmax
from .w4a16_gluon import copy_block_to_shared

# With 24 for the producer's they fill the register file.
_REGISTERS_OF_2 = gl.constexpr(240)
_REGISTERS_OF_3 = gl.constexpr(160)
PRODUCER_REGISTERS = gl.constexpr(24)
UNSPECIALIZED = ["tiles", "query_tiles", "queries", "keys", "blocks", "window"]


@gluon.jit
def _tile(i_round, query_tiles, heads, sequences, BLOCK_M: gl.constexpr):
    """Sequence, head and first query of a program's tile in a round.

    The last queries, which see most keys, come first. Programs take tiles in one order and then in the other:
    otherwise the first program would have the longest tile of every round.
    """
    programs = gl.num_programs(0)
    i_program = gl.program_id(0)
    i_tile = i_round * programs + gl.where(i_round % 2 == 0, i_program, programs - 1 - i_program)
    i_m = query_tiles - 1 - i_tile // (heads * sequences)
    i_head = i_tile % (heads * sequences)
    return i_head // heads, i_head % heads, i_m * BLOCK_M, i_m >= 0


@gluon.jit
def _visible(bounds, i_b, first_q, queries, keys, window, CAUSAL: gl.constexpr, BLOCK_M: gl.constexpr):
    """The keys that a query of a tile sees, those that all of its queries see, and the first query's column.

    As ``(first, end, first_of_all, end_of_all, column)``.
    """
    p_key_start, p_key_end, p_query_start = bounds
    first = 0
    end = keys
    column = keys - queries
    if p_key_start is not None:
        first = gl.load(p_key_start + i_b)
    if p_key_end is not None:
        end = gl.minimum(gl.load(p_key_end + i_b), keys)
    if p_query_start is not None:
        column = gl.load(p_query_start + i_b)
    column += first_q
    first_of_all = first
    end_of_all = end
    if CAUSAL:
        end = gl.minimum(end, column + gl.minimum(BLOCK_M, queries - first_q))
        end_of_all = gl.minimum(end_of_all, column + 1)
    if window > 0:
        first_of_all = gl.maximum(first, column + BLOCK_M - window)
        first = gl.maximum(first, column - window + 1)
    return gl.maximum(first, 0), end, first_of_all, end_of_all, column


@gluon.jit
def _produce(d_q, d_k, d_v, bounds, shared, barriers, sizes, KIND: gl.constexpr):
    """Fetch what the consumers read, in their order."""
    s_q, s_k, s_v = shared
    s_q_full, s_q_empty, s_k_full, s_k_empty, s_v_full, s_v_empty = barriers
    tiles, query_tiles, queries, keys, window, heads, kv_heads, sequences = sizes
    SLOTS: gl.constexpr = s_k.shape[0]
    D: gl.constexpr = s_k.shape[2]
    WARPGROUPS: gl.constexpr = s_q.shape[0] // 2
    BLOCK_M: gl.constexpr = WARPGROUPS * ROWS
    i_filled = 0
    i_read = 0
    for i_round in range(gl.cdiv(tiles, gl.num_programs(0))):
        i_b, i_h, first_q, is_tile = _tile(i_round, query_tiles, heads, sequences, BLOCK_M)
        first, end, _, _, _ = _visible(bounds, i_b, first_q, queries, keys, window, KIND[0], BLOCK_M)
        i_kv = i_b * kv_heads + i_h // (heads // kv_heads)
        i_row = (i_b * heads + i_h) * queries + first_q
        first_block = first // BLOCK_N
        count = gl.maximum(gl.cdiv(end, BLOCK_N) - first_block, 0)
        count = gl.where(is_tile, count, 0)
        if count > 0:
            slot = i_read & 1
            mbarrier.wait(s_q_empty.index(slot), (i_read >> 1) & 1 ^ 1)
            mbarrier.expect(s_q_full.index(slot), BLOCK_M * D)
            for i in gl.static_range(WARPGROUPS):
                s_rows = s_q.index(slot * WARPGROUPS + i)
                copy_block_to_shared(d_q, [i_row + i * ROWS, 0], s_q_full.index(slot), s_rows)
            i_read += 1
        for i in range(count):
            # From the last block to the first: those with a mask come first.
            i_key = (first_block + count - 1 - i) * BLOCK_N
            slot = i_filled % SLOTS
            phase = (i_filled // SLOTS) & 1
            mbarrier.wait(s_k_empty.index(slot), phase ^ 1)
            mbarrier.expect(s_k_full.index(slot), BLOCK_N * D)
            copy_block_to_shared(d_k, [i_kv * keys + i_key, 0], s_k_full.index(slot), s_k.index(slot))
            mbarrier.wait(s_v_empty.index(slot), phase ^ 1)
            mbarrier.expect(s_v_full.index(slot), BLOCK_N * D)
            copy_block_to_shared(d_v, [i_kv * D, i_key], s_v_full.index(slot), s_v.index(slot))
            i_filled += 1


@gluon.jit
def _logits(s_q, s_k, i, ACC: gl.constexpr, INT8: gl.constexpr):
    """Start Q K^T of a block of the ring. The bits of int8 sums are those of floats, + INT_BIAS."""
    SLOTS: gl.constexpr = s_k.shape[0]
    if INT8:
        b_init = gl.full((ROWS, BLOCK_N), INT_BITS, gl.int32, layout=ACC)
        return warpgroup_mma(s_q, s_k.index(i % SLOTS).permute((1, 0)), b_init, is_async=True)
    else:
        b_init = gl.zeros((ROWS, BLOCK_N), gl.float32, layout=ACC)
        return warpgroup_mma(s_q, s_k.index(i % SLOTS).permute((1, 0)), b_init, use_acc=False, is_async=True)


@gluon.jit
def _weighted(b_p, s_v, slot, V: gl.constexpr):
    """Start P V of a block of the ring."""
    D: gl.constexpr = s_v.shape[1]
    b_part = gl.zeros((ROWS, D), gl.float32, layout=V)
    return warpgroup_mma(b_p, s_v.index(slot).permute((1, 0)), b_part, use_acc=False, is_async=True)


@gluon.jit
def _add(b_out, b_decay, b_part):
    """The sum over all blocks so far, in units of the new maximum."""
    b_decay = gl.convert_layout(b_decay, gl.SliceLayout(1, b_out.type.layout))
    return b_out * gl.expand_dims(b_decay, 1) + b_part


@gluon.jit
def _consume(i_warpgroup, tensors, bounds, shared, barriers, sizes, blocks, factors, KIND: gl.constexpr):
    """One warpgroup's 64 queries of each tile."""
    p_q_scale, p_key_scale, p_value_scale, p_sinks, p_offset, p_out = tensors
    s_q, s_k, s_v = shared
    s_q_full, s_q_empty, s_k_full, s_k_empty, s_v_full, s_v_empty = barriers
    tiles, query_tiles, queries, keys, window, heads, kv_heads, sequences = sizes
    SLOTS: gl.constexpr = s_k.shape[0]
    D: gl.constexpr = s_k.shape[2]
    WARPGROUPS: gl.constexpr = s_q.shape[0] // 2
    BLOCK_M: gl.constexpr = WARPGROUPS * ROWS
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 32])
    V: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 32])
    OUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    # Blocks and tiles that this warpgroup has worked on.
    i_used = 0
    i_read = 0
    for i_round in range(gl.cdiv(tiles, gl.num_programs(0))):
        i_b, i_h, first_q, is_tile = _tile(i_round, query_tiles, heads, sequences, BLOCK_M)
        first, end, first_of_all, end_of_all, column = _visible(
            bounds, i_b, first_q, queries, keys, window, KIND[0], BLOCK_M
        )
        i_kv = i_b * kv_heads + i_h // (heads // kv_heads)
        p_key_scales = p_key_scale + i_kv.to(gl.int64) * (keys if KIND[1] else blocks)
        p_value_scales = p_value_scale + i_kv.to(gl.int64) * (keys if KIND[1] else blocks)
        first_block = first // BLOCK_N
        count = gl.maximum(gl.cdiv(end, BLOCK_N) - first_block, 0)
        count = gl.where(is_tile, count, 0)
        first_q += i_warpgroup * ROWS
        o_row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, S))
        # The keys that each query sees.
        o_column = column + i_warpgroup * ROWS + o_row
        o_first = gl.maximum(first, gl.where(window > 0, o_column - window + 1, 0))
        o_end = gl.minimum(end, gl.where(KIND[0], o_column + 1, keys))
        i_row = (i_b * heads + i_h).to(gl.int64) * queries + first_q
        m_row = (first_q + o_row < queries) & is_tile
        # Logits come in units of log2.
        b_q_scale = gl.load(p_q_scale + i_row + o_row, mask=m_row, other=1.0)
        if p_offset is not None:
            b_offset = gl.load(p_offset + i_row + o_row, mask=m_row, other=0.0) * LOG2_E
        else:
            b_offset = None
        seen = (first, end, o_first, o_end, first_of_all, end_of_all)
        b_none = gl.full((ROWS,), float("-inf"), gl.float32, layout=gl.SliceLayout(1, S))
        state = (b_none, b_none, b_none, gl.zeros((ROWS, 4), gl.float32, layout=parts_layout()))
        b_out = gl.zeros((ROWS, D), gl.float32, layout=V)
        if count > 0:
            i_block = first_block + count - 1
            s_queries = s_q.index((i_read & 1) * WARPGROUPS + i_warpgroup)
            mbarrier.wait(s_q_full.index(i_read & 1), (i_read >> 1) & 1)
            mbarrier.wait(s_k_full.index(i_used % SLOTS), (i_used // SLOTS) & 1)
            b_s = warpgroup_mma_wait(0, deps=(_logits(s_queries, s_k, i_used, S, KIND[3]),))
            mbarrier.arrive(s_k_empty.index(i_used % SLOTS), count=1)
            # P does not live from one round to the next: it would be carried byte by byte.
            for _ in range(count - 1):
                b_p, state, b_decay = softmax(
                    b_s,
                    b_q_scale,
                    b_offset,
                    state,
                    p_key_scales,
                    p_value_scales,
                    i_block,
                    seen,
                    factors,
                    KIND,
                    V,
                )
                i_block -= 1
                slot = i_used % SLOTS
                i_next = i_used + 1
                mbarrier.wait(s_v_full.index(slot), (i_used // SLOTS) & 1)
                mbarrier.wait(s_k_full.index(i_next % SLOTS), (i_next // SLOTS) & 1)
                b_part = _weighted(b_p, s_v, slot, V)
                b_next = _logits(s_queries, s_k, i_next, S, KIND[3])
                b_part = warpgroup_mma_wait(1, deps=(b_part,))
                mbarrier.arrive(s_v_empty.index(slot), count=1)
                b_out = _add(b_out, b_decay, b_part)
                b_s = warpgroup_mma_wait(0, deps=(b_next,))
                mbarrier.arrive(s_k_empty.index(i_next % SLOTS), count=1)
                i_used = i_next
            mbarrier.arrive(s_q_empty.index(i_read & 1), count=1)
            b_p, state, b_decay = softmax(
                b_s, b_q_scale, b_offset, state, p_key_scales, p_value_scales, i_block, seen, factors, KIND, V
            )
            slot = i_used % SLOTS
            mbarrier.wait(s_v_full.index(slot), (i_used // SLOTS) & 1)
            b_part = warpgroup_mma_wait(0, deps=(_weighted(b_p, s_v, slot, V),))
            mbarrier.arrive(s_v_empty.index(slot), count=1)
            b_out = _add(b_out, b_decay, b_part)
            i_used += 1
            i_read += 1
        _, _, b_unit, b_sum = state
        b_total = gl.convert_layout(gl.sum(b_sum, axis=1), gl.SliceLayout(1, S))
        if p_sinks is not None:
            # One more logit, in the units of the sums.
            b_total += exp2(gl.load(p_sinks + i_h) * LOG2_E + P_EXPONENT - b_unit)
        b_inverse = 1.0 / gl.where(b_total == 0.0, 1.0, b_total)
        b_out *= gl.expand_dims(gl.convert_layout(b_inverse, gl.SliceLayout(1, V)), 1)
        o_m = first_q + gl.arange(0, ROWS, layout=gl.SliceLayout(1, OUT))
        o_d = gl.arange(0, D, layout=gl.SliceLayout(0, OUT))
        o_out = (i_b.to(gl.int64) * queries + o_m) * (heads * D) + i_h * D
        gl.store(
            p_out + gl.expand_dims(o_out, 1) + gl.expand_dims(o_d, 0),
            gl.convert_layout(b_out.to(p_out.dtype.element_ty), OUT),
            mask=gl.expand_dims((o_m < queries) & is_tile, 1),
        )


@gluon.jit(do_not_specialize=UNSPECIALIZED)
def attention_kernel(
    d_q,
    d_k,
    d_v,
    p_q_scale,
    p_key_scale,
    p_value_scale,
    p_key_start,
    p_key_end,
    p_query_start,
    p_sinks,
    p_offset,
    p_out,
    tiles,
    query_tiles,
    queries,
    keys,
    blocks,
    window,
    heads,
    kv_heads,
    sequences,
    scale,
    softcap,
    D: gl.constexpr,
    WARPGROUPS: gl.constexpr,
    SLOTS: gl.constexpr,
    KIND: gl.constexpr,
):
    """out [B, queries, heads, D] = softmax(scale q k^T) v, a number of programs sharing all tiles.

    d_q: q [B heads queries, D], blocks of [64, D]; d_k: keys [B kv_heads keys, D], blocks of [BLOCK_N, D];
    d_v: values [B kv_heads D, keys rounded up to 16], blocks of [D, BLOCK_N]. KIND: whether the mask is
    causal; whether scales of keys and values are of tokens, [B kv_heads, keys], or of blocks, [B kv_heads,
    blocks]; whether there is a softcap; whether q and keys are int8. scale includes log2(e), as softcap does.
    """
    s_q = gl.allocate_shared_memory(d_q.dtype, [2 * WARPGROUPS, ROWS, D], d_q.layout)
    s_k = gl.allocate_shared_memory(d_k.dtype, [SLOTS, BLOCK_N, D], d_k.layout)
    s_v = gl.allocate_shared_memory(d_v.dtype, [SLOTS, D, BLOCK_N], d_v.layout)
    s_q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    s_q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    s_k_full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    s_k_empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    s_v_full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    s_v_empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(2):
        mbarrier.init(s_q_full.index(slot), count=1)
        mbarrier.init(s_q_empty.index(slot), count=WARPGROUPS)
    for slot in gl.static_range(SLOTS):
        mbarrier.init(s_k_full.index(slot), count=1)
        mbarrier.init(s_k_empty.index(slot), count=WARPGROUPS)
        mbarrier.init(s_v_full.index(slot), count=1)
        mbarrier.init(s_v_empty.index(slot), count=WARPGROUPS)
    bounds = (p_key_start, p_key_end, p_query_start)
    shared = (s_q, s_k, s_v)
    barriers = (s_q_full, s_q_empty, s_k_full, s_k_empty, s_v_full, s_v_empty)
    tensors = (p_q_scale, p_key_scale, p_value_scale, p_sinks, p_offset, p_out)
    sizes = (tiles, query_tiles, queries, keys, window, heads, kv_heads, sequences)
    factors = (scale, softcap)
    if WARPGROUPS == 2:
        gl.warp_specialize(
            [
                (_consume, (0, tensors, bounds, shared, barriers, sizes, blocks, factors, KIND)),
                (_consume, (1, tensors, bounds, shared, barriers, sizes, blocks, factors, KIND)),
                (_produce, (d_q, d_k, d_v, bounds, shared, barriers, sizes, KIND)),
            ],
            [4, 1],
            [_REGISTERS_OF_2, PRODUCER_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (0, tensors, bounds, shared, barriers, sizes, blocks, factors, KIND)),
                (_consume, (1, tensors, bounds, shared, barriers, sizes, blocks, factors, KIND)),
                (_consume, (2, tensors, bounds, shared, barriers, sizes, blocks, factors, KIND)),
                (_produce, (d_q, d_k, d_v, bounds, shared, barriers, sizes, KIND)),
            ],
            [4, 4, 1],
            [_REGISTERS_OF_3, _REGISTERS_OF_3, PRODUCER_REGISTERS],
        )
