"""8-bit attention of many queries on Hopper: warp-specialized, products beside softmax.

One warp fetches queries, keys and values by TMA into rings of shared memory; two warpgroups of 64 queries
each use them: while the tensor cores work for one, the other exponentiates (FlashAttention-3,
arXiv:2407.08608, section 3.1; without its barriers that make them take turns, which cost 3% here). What
differs from it: products of P and V are added up in fp32 block by block
(the tensor core keeps only some 14 bits of an fp8 sum), P needs no shuffle because the values' tokens lie in
the order in which the accumulator of Q K^T holds them, and every block of keys has scales of its own.

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

from .w4a16_gluon import copy_block_to_shared

# Queries of a warpgroup.
ROWS = gl.constexpr(64)
# Keys of a block, which share a scale where keys have one per block.
BLOCK_N = gl.constexpr(128)
# With 24 for the producer's they fill the register file.
_REGISTERS_OF_2 = gl.constexpr(240)
_REGISTERS_OF_3 = gl.constexpr(160)
PRODUCER_REGISTERS = gl.constexpr(24)
# P is at most 2^8: fp8 (e4m3) ends at 448.
_P_EXPONENT = gl.constexpr(8.0)
# An int32 sum that starts from these bits is the float 12582912 + sum, exactly, as long as |sum| < 2^22.
_INT_BITS = gl.constexpr(0x4B400000)
_INT_BIAS = gl.constexpr(12582912.0)
_ONE_OF_FOUR = gl.constexpr("""
{
.reg .f32 x, r, n, p;
.reg .b32 i;
ex2.approx.ftz.f32 $0, $4;
ex2.approx.ftz.f32 $1, $5;
ex2.approx.ftz.f32 $2, $6;
max.NaN.f32 x, $7, 0fC2FA0000;
add.rn.f32 r, x, 0f4B400000;
sub.rn.f32 n, r, 0f4B400000;
sub.rn.f32 x, x, n;
fma.rn.f32 p, x, 0f3D61FAF7, 0f3E786EAE;
fma.rn.f32 p, p, x, 0f3F31798D;
fma.rn.f32 p, p, x, 0f3F7FFB4B;
mov.b32 i, r;
shl.b32 i, i, 23;
add.s32 i, i, 0x3f800000;
mov.b32 n, i;
mul.rn.f32 $3, p, n;
}
""")
_TWO_OF_FOUR = gl.constexpr("""
{
.reg .f32 x, r, n, p;
.reg .b32 i;
ex2.approx.ftz.f32 $0, $4;
ex2.approx.ftz.f32 $1, $5;
max.NaN.f32 x, $6, 0fC2FA0000;
add.rn.f32 r, x, 0f4B400000;
sub.rn.f32 n, r, 0f4B400000;
sub.rn.f32 x, x, n;
fma.rn.f32 p, x, 0f3D61FAF7, 0f3E786EAE;
fma.rn.f32 p, p, x, 0f3F31798D;
fma.rn.f32 p, p, x, 0f3F7FFB4B;
mov.b32 i, r;
shl.b32 i, i, 23;
add.s32 i, i, 0x3f800000;
mov.b32 n, i;
mul.rn.f32 $2, p, n;
max.NaN.f32 x, $7, 0fC2FA0000;
add.rn.f32 r, x, 0f4B400000;
sub.rn.f32 n, r, 0f4B400000;
sub.rn.f32 x, x, n;
fma.rn.f32 p, x, 0f3D61FAF7, 0f3E786EAE;
fma.rn.f32 p, p, x, 0f3F31798D;
fma.rn.f32 p, p, x, 0f3F7FFB4B;
mov.b32 i, r;
shl.b32 i, i, 23;
add.s32 i, i, 0x3f800000;
mov.b32 n, i;
mul.rn.f32 $3, p, n;
}
""")
UNSPECIALIZED = ["tiles", "query_tiles", "queries", "keys", "blocks", "window"]


@gluon.jit
def _exp2(b_x):
    return gl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [b_x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def _exp2_of_block(b_x, POLYNOMIALS: gl.constexpr):
    """2^x of a block, POLYNOMIALS of every four by a polynomial: the unit for 2^x is what softmax waits for.

    The idea is FlashAttention-4's. x is the sum of an integer, which goes into the exponent, and a rest
    within 1/2, of which a cubic gives 2^x within 7.5e-5; fp8 keeps 6e-2. Below -125 it gives 2^-125; NaN
    stays NaN.
    """
    if POLYNOMIALS == 0:
        return _exp2(b_x)
    else:
        return gl.inline_asm_elementwise(
            _ONE_OF_FOUR if POLYNOMIALS == 1 else _TWO_OF_FOUR,
            "=f,=f,=f,=f,f,f,f,f",
            [b_x],
            dtype=gl.float32,
            is_pure=True,
            pack=4,
        )


@gluon.jit
def _exponent(scale):
    """k of 2^k, as a float; NaN of what is infinite or NaN."""
    bits = scale.to(gl.int32, bitcast=True)
    return gl.where(bits < 0x7F800000, (bits >> 23).to(gl.float32) - 127.0, float("nan"))


@gluon.jit
def _inverse(scale):
    """2^-k of 2^k."""
    return (0x7F000000 - scale.to(gl.int32, bitcast=True)).to(gl.float32, bitcast=True)


@gluon.jit
def _to_fp8(b_x):
    """e4m3, four neighbours at a time: Triton's own cast takes bytes apart and puts them together again."""
    return gl.inline_asm_elementwise(
        """
        {
        .reg .b16 low, high;
        cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
        cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
        mov.b32 $0, {low, high};
        }
        """,
        "=r,f,f,f,f",
        [b_x],
        dtype=gl.float8e4nv,
        is_pure=True,
        pack=4,
    )


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
def _visible(
    p_key_start,
    p_key_end,
    p_query_start,
    i_b,
    first_q,
    queries,
    keys,
    window,
    CAUSAL: gl.constexpr,
    BLOCK_M: gl.constexpr,
):
    """The keys that a query of a tile sees, those that all of its queries see, and the first query's column.

    As ``(first, end, first_of_all, end_of_all, column)``.
    """
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
def _produce(
    d_q,
    d_k,
    d_v,
    p_key_start,
    p_key_end,
    p_query_start,
    s_q,
    s_k,
    s_v,
    s_q_full,
    s_q_empty,
    s_k_full,
    s_k_empty,
    s_v_full,
    s_v_empty,
    tiles,
    query_tiles,
    queries,
    keys,
    window,
    heads,
    kv_heads,
    sequences,
    CAUSAL: gl.constexpr,
):
    """Fetch what the consumers read, in their order."""
    SLOTS: gl.constexpr = s_k.shape[0]
    D: gl.constexpr = s_k.shape[2]
    WARPGROUPS: gl.constexpr = s_q.shape[0] // 2
    BLOCK_M: gl.constexpr = WARPGROUPS * ROWS
    i_filled = 0
    i_read = 0
    for i_round in range(gl.cdiv(tiles, gl.num_programs(0))):
        i_b, i_h, first_q, is_tile = _tile(i_round, query_tiles, heads, sequences, BLOCK_M)
        first, end, _, _, _ = _visible(
            p_key_start, p_key_end, p_query_start, i_b, first_q, queries, keys, window, CAUSAL, BLOCK_M
        )
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
    """Start Q K^T of a block of the ring. The bits of int8 sums are those of floats, + _INT_BIAS."""
    SLOTS: gl.constexpr = s_k.shape[0]
    if INT8:
        b_init = gl.full((ROWS, BLOCK_N), _INT_BITS, gl.int32, layout=ACC)
        return warpgroup_mma(s_q, s_k.index(i % SLOTS).permute((1, 0)), b_init, is_async=True)
    else:
        b_init = gl.zeros((ROWS, BLOCK_N), gl.float32, layout=ACC)
        return warpgroup_mma(s_q, s_k.index(i % SLOTS).permute((1, 0)), b_init, use_acc=False, is_async=True)


@gluon.constexpr_function
def _lanes_layout():
    """Layout of four parts of each row, ``[ROWS, 4]``: one in each thread that has a piece of it."""
    return gl.DistributedLinearLayout(
        [[8, 0]], [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [64, 4]
    )


@gluon.jit
def _fold(b_x, IS_MAX: gl.constexpr):
    """Maxima or sums of what each thread has of a row, ``[ROWS, 4]``.

    As a tree: the compiler would make a chain of it, in which every step waits for the one before.
    """
    # Of the columns 8 i + 2 t + p thread t has two neighbours for each i.
    b_left, b_right = gl.split(gl.reshape(b_x, (ROWS, BLOCK_N // 2, 2)))
    b_x = gl.maximum(b_left, b_right) if IS_MAX else b_left + b_right
    for _ in gl.static_range(4):
        b_x = _fold_once(b_x, IS_MAX)
    return gl.convert_layout(b_x, _lanes_layout())


@gluon.jit
def _fold_once(b_x, IS_MAX: gl.constexpr):
    QUARTER: gl.constexpr = b_x.shape[1] // 8
    b_left, b_right = gl.split(gl.permute(gl.reshape(b_x, (ROWS, QUARTER, 2, 4)), (0, 1, 3, 2)))
    b_x = gl.maximum(b_left, b_right) if IS_MAX else b_left + b_right
    return gl.reshape(b_x, (ROWS, QUARTER * 4))


@gluon.jit
def _row_max(b_x):
    return gl.convert_layout(gl.max(_fold(b_x, True), axis=1), gl.SliceLayout(1, b_x.type.layout))


@gluon.jit
def _softmax(
    b_s,
    b_q_scale,
    b_offset,
    b_max,
    b_scaled_max,
    b_unit,
    b_sum,
    p_key_scales,
    p_value_scales,
    i_block,
    first,
    end,
    o_first,
    o_end,
    first_of_all,
    end_of_all,
    scale,
    softcap,
    PER_TOKEN: gl.constexpr,
    SOFTCAP: gl.constexpr,
    INT8: gl.constexpr,
    POLYNOMIALS: gl.constexpr,
    V: gl.constexpr,
):
    """P of a block as the operand of P V, new maxima and sums, and what older sums are to be scaled with.

    Sums are in units of 2^b_unit, P of a 2^8th of that.
    """
    ACC: gl.constexpr = b_s.type.layout
    i_key = i_block * BLOCK_N
    o_key = i_key + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, ACC))
    if PER_TOKEN:
        # What nobody sees may be anything.
        m_key = (o_key >= first) & (o_key < end)
        key_scale = gl.load(p_key_scales + o_key, mask=m_key, other=1.0)
        value_scale = gl.load(p_value_scales + o_key, mask=m_key, other=1.0)
    else:
        key_scale = gl.load(p_key_scales + i_block)
        value_scale = gl.load(p_value_scales + i_block)
    BIAS: gl.constexpr = _INT_BIAS if INT8 else 0.0
    if INT8:
        b_s = b_s.to(gl.float32, bitcast=True)
    IS_PLAIN: gl.constexpr = not PER_TOKEN and not SOFTCAP
    if not IS_PLAIN:
        # The logits themselves, in units of log2.
        b_s = (b_s - BIAS) * gl.expand_dims(b_q_scale * scale, 1)
        if PER_TOKEN:
            b_s *= gl.expand_dims(key_scale, 0)
        else:
            b_s *= key_scale
        if b_offset is not None:
            b_s += gl.expand_dims(b_offset, 1)
        if SOFTCAP:
            # tanh(x) = 1 - 2 / (1 + e^2x), e^2x as a power of two; softcap comes in units of log2.
            b_s = softcap - 2.0 * softcap / (1.0 + _exp2(b_s * (2.0 * 1.4426950408889634 / softcap)))
    if i_key < first_of_all or i_key + BLOCK_N > end_of_all:
        m = (gl.expand_dims(o_key, 0) >= gl.expand_dims(o_first, 1)) & (
            gl.expand_dims(o_key, 0) < gl.expand_dims(o_end, 1)
        )
        b_s = gl.where(m, b_s, float("-inf"))
    # Of a row: the largest logit, and the largest together with the logarithm of its value's scale.
    if IS_PLAIN:
        b_slope = b_q_scale * (key_scale * scale)
        b_top = (_row_max(b_s) - BIAS) * b_slope
        if b_offset is not None:
            b_top += b_offset
    else:
        b_top = _row_max(b_s)
    if PER_TOKEN:
        b_exponent = 0.0
        b_s += gl.expand_dims(_exponent(value_scale), 0)
        b_top_scaled = _row_max(b_s)
    else:
        b_exponent = _exponent(value_scale)
        b_top_scaled = b_top + b_exponent
    b_max = gl.maximum(b_max, b_top)
    b_scaled_max = gl.maximum(b_scaled_max, b_top_scaled)
    # P fits into fp8 whatever the scales are, and that of the largest logit is a power of two: it is exact.
    b_new_unit = b_max + gl.ceil(b_scaled_max - b_max)
    # Where nothing has been seen yet.
    b_new_unit = gl.where(b_max == float("-inf"), float("-inf"), b_new_unit)
    b_shift = _P_EXPONENT - gl.where(b_max == float("-inf"), 0.0, b_new_unit)
    b_decay = _exp2(b_unit + b_shift - _P_EXPONENT)
    b_shift += b_exponent
    if IS_PLAIN:
        if b_offset is not None:
            b_shift += b_offset
        b_p = b_s * gl.expand_dims(b_slope, 1) + gl.expand_dims(b_shift - BIAS * b_slope, 1)
    else:
        b_p = b_s + gl.expand_dims(b_shift, 1)
    b_p = _exp2_of_block(b_p, POLYNOMIALS)
    if PER_TOKEN:
        b_block_sum = _fold(b_p * gl.expand_dims(_inverse(value_scale), 0), False)
    else:
        b_block_sum = _fold(b_p, False) * _inverse(value_scale)
    b_sum_decay = gl.convert_layout(b_decay, gl.SliceLayout(1, b_sum.type.layout))
    b_sum = b_sum * gl.expand_dims(b_sum_decay, 1) + b_block_sum
    # Column 8 e + 2 t + p of each 16 goes to 4 t + 2 e + p: into the registers where it is already.
    b_p = gl.permute(gl.reshape(b_p, (ROWS, BLOCK_N // 16, 2, 4, 2)), (0, 1, 3, 2, 4))
    b_p = gl.convert_layout(gl.reshape(b_p, (ROWS, BLOCK_N)), gl.DotOperandLayout(0, V, 4))
    return _to_fp8(b_p), b_max, b_scaled_max, b_new_unit, b_sum, b_decay


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
def _consume(
    i_warpgroup,
    p_q_scale,
    p_key_scale,
    p_value_scale,
    p_key_start,
    p_key_end,
    p_query_start,
    p_sinks,
    p_offset,
    p_out,
    s_q,
    s_k,
    s_v,
    s_q_full,
    s_q_empty,
    s_k_full,
    s_k_empty,
    s_v_full,
    s_v_empty,
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
    CAUSAL: gl.constexpr,
    PER_TOKEN: gl.constexpr,
    SOFTCAP: gl.constexpr,
    INT8: gl.constexpr,
    POLYNOMIALS: gl.constexpr,
):
    """One warpgroup's 64 queries of each tile."""
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
            p_key_start, p_key_end, p_query_start, i_b, first_q, queries, keys, window, CAUSAL, BLOCK_M
        )
        i_kv = i_b * kv_heads + i_h // (heads // kv_heads)
        p_key_scales = p_key_scale + i_kv.to(gl.int64) * (keys if PER_TOKEN else blocks)
        p_value_scales = p_value_scale + i_kv.to(gl.int64) * (keys if PER_TOKEN else blocks)
        first_block = first // BLOCK_N
        count = gl.maximum(gl.cdiv(end, BLOCK_N) - first_block, 0)
        count = gl.where(is_tile, count, 0)
        first_q += i_warpgroup * ROWS
        o_row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, S))
        # The keys that each query sees.
        o_column = column + i_warpgroup * ROWS + o_row
        o_first = gl.maximum(first, gl.where(window > 0, o_column - window + 1, 0))
        o_end = gl.minimum(end, gl.where(CAUSAL, o_column + 1, keys))
        i_row = (i_b * heads + i_h).to(gl.int64) * queries + first_q
        m_row = (first_q + o_row < queries) & is_tile
        # Logits come in units of log2.
        b_q_scale = gl.load(p_q_scale + i_row + o_row, mask=m_row, other=1.0)
        if p_offset is not None:
            b_offset = gl.load(p_offset + i_row + o_row, mask=m_row, other=0.0) * 1.4426950408889634
        else:
            b_offset = None
        b_max = gl.full((ROWS,), float("-inf"), gl.float32, layout=gl.SliceLayout(1, S))
        b_scaled_max = b_max
        b_unit = b_max
        b_sum = gl.zeros((ROWS, 4), gl.float32, layout=_lanes_layout())
        b_out = gl.zeros((ROWS, D), gl.float32, layout=V)
        if count > 0:
            i_block = first_block + count - 1
            s_queries = s_q.index((i_read & 1) * WARPGROUPS + i_warpgroup)
            mbarrier.wait(s_q_full.index(i_read & 1), (i_read >> 1) & 1)
            mbarrier.wait(s_k_full.index(i_used % SLOTS), (i_used // SLOTS) & 1)
            b_s = warpgroup_mma_wait(0, deps=(_logits(s_queries, s_k, i_used, S, INT8),))
            mbarrier.arrive(s_k_empty.index(i_used % SLOTS), count=1)
            # P does not live from one round to the next: it would be carried byte by byte.
            for _ in range(count - 1):
                b_p, b_max, b_scaled_max, b_unit, b_sum, b_decay = _softmax(
                    b_s,
                    b_q_scale,
                    b_offset,
                    b_max,
                    b_scaled_max,
                    b_unit,
                    b_sum,
                    p_key_scales,
                    p_value_scales,
                    i_block,
                    first,
                    end,
                    o_first,
                    o_end,
                    first_of_all,
                    end_of_all,
                    scale,
                    softcap,
                    PER_TOKEN,
                    SOFTCAP,
                    INT8,
                    POLYNOMIALS,
                    V,
                )
                i_block -= 1
                slot = i_used % SLOTS
                i_next = i_used + 1
                mbarrier.wait(s_v_full.index(slot), (i_used // SLOTS) & 1)
                mbarrier.wait(s_k_full.index(i_next % SLOTS), (i_next // SLOTS) & 1)
                b_part = _weighted(b_p, s_v, slot, V)
                b_next = _logits(s_queries, s_k, i_next, S, INT8)
                b_part = warpgroup_mma_wait(1, deps=(b_part,))
                mbarrier.arrive(s_v_empty.index(slot), count=1)
                b_out = _add(b_out, b_decay, b_part)
                b_s = warpgroup_mma_wait(0, deps=(b_next,))
                mbarrier.arrive(s_k_empty.index(i_next % SLOTS), count=1)
                i_used = i_next
            mbarrier.arrive(s_q_empty.index(i_read & 1), count=1)
            b_p, b_max, b_scaled_max, b_unit, b_sum, b_decay = _softmax(
                b_s,
                b_q_scale,
                b_offset,
                b_max,
                b_scaled_max,
                b_unit,
                b_sum,
                p_key_scales,
                p_value_scales,
                i_block,
                first,
                end,
                o_first,
                o_end,
                first_of_all,
                end_of_all,
                scale,
                softcap,
                PER_TOKEN,
                SOFTCAP,
                INT8,
                POLYNOMIALS,
                V,
            )
            slot = i_used % SLOTS
            mbarrier.wait(s_v_full.index(slot), (i_used // SLOTS) & 1)
            b_part = warpgroup_mma_wait(0, deps=(_weighted(b_p, s_v, slot, V),))
            mbarrier.arrive(s_v_empty.index(slot), count=1)
            b_out = _add(b_out, b_decay, b_part)
            i_used += 1
            i_read += 1
        b_total = gl.convert_layout(gl.sum(b_sum, axis=1), gl.SliceLayout(1, S))
        if p_sinks is not None:
            # One more logit, in the units of the sums.
            b_total += _exp2(gl.load(p_sinks + i_h) * 1.4426950408889634 + _P_EXPONENT - b_unit)
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
    CAUSAL: gl.constexpr,
    PER_TOKEN: gl.constexpr,
    SOFTCAP: gl.constexpr,
    INT8: gl.constexpr,
    POLYNOMIALS: gl.constexpr,
):
    """out [B, queries, heads, D] = softmax(scale q k^T) v, a number of programs sharing all tiles.

    d_q: q [B heads queries, D], blocks of [64, D]; d_k: keys [B kv_heads keys, D], blocks of [BLOCK_N, D];
    d_v: values [B kv_heads D, keys rounded up to 16], blocks of [D, BLOCK_N]. Scales of keys and values [B
    kv_heads, keys] if PER_TOKEN, else [B kv_heads, blocks]. scale includes log2(e), as softcap does.
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
    if WARPGROUPS == 2:
        gl.warp_specialize(
            [
                (
                    _consume,
                    (
                        0,
                        p_q_scale,
                        p_key_scale,
                        p_value_scale,
                        p_key_start,
                        p_key_end,
                        p_query_start,
                        p_sinks,
                        p_offset,
                        p_out,
                        s_q,
                        s_k,
                        s_v,
                        s_q_full,
                        s_q_empty,
                        s_k_full,
                        s_k_empty,
                        s_v_full,
                        s_v_empty,
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
                        CAUSAL,
                        PER_TOKEN,
                        SOFTCAP,
                        INT8,
                        POLYNOMIALS,
                    ),
                ),
                (
                    _consume,
                    (
                        1,
                        p_q_scale,
                        p_key_scale,
                        p_value_scale,
                        p_key_start,
                        p_key_end,
                        p_query_start,
                        p_sinks,
                        p_offset,
                        p_out,
                        s_q,
                        s_k,
                        s_v,
                        s_q_full,
                        s_q_empty,
                        s_k_full,
                        s_k_empty,
                        s_v_full,
                        s_v_empty,
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
                        CAUSAL,
                        PER_TOKEN,
                        SOFTCAP,
                        INT8,
                        POLYNOMIALS,
                    ),
                ),
                (
                    _produce,
                    (
                        d_q,
                        d_k,
                        d_v,
                        p_key_start,
                        p_key_end,
                        p_query_start,
                        s_q,
                        s_k,
                        s_v,
                        s_q_full,
                        s_q_empty,
                        s_k_full,
                        s_k_empty,
                        s_v_full,
                        s_v_empty,
                        tiles,
                        query_tiles,
                        queries,
                        keys,
                        window,
                        heads,
                        kv_heads,
                        sequences,
                        CAUSAL,
                    ),
                ),
            ],
            [4, 1],
            [_REGISTERS_OF_2, PRODUCER_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (
                    _consume,
                    (
                        0,
                        p_q_scale,
                        p_key_scale,
                        p_value_scale,
                        p_key_start,
                        p_key_end,
                        p_query_start,
                        p_sinks,
                        p_offset,
                        p_out,
                        s_q,
                        s_k,
                        s_v,
                        s_q_full,
                        s_q_empty,
                        s_k_full,
                        s_k_empty,
                        s_v_full,
                        s_v_empty,
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
                        CAUSAL,
                        PER_TOKEN,
                        SOFTCAP,
                        INT8,
                        POLYNOMIALS,
                    ),
                ),
                (
                    _consume,
                    (
                        1,
                        p_q_scale,
                        p_key_scale,
                        p_value_scale,
                        p_key_start,
                        p_key_end,
                        p_query_start,
                        p_sinks,
                        p_offset,
                        p_out,
                        s_q,
                        s_k,
                        s_v,
                        s_q_full,
                        s_q_empty,
                        s_k_full,
                        s_k_empty,
                        s_v_full,
                        s_v_empty,
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
                        CAUSAL,
                        PER_TOKEN,
                        SOFTCAP,
                        INT8,
                        POLYNOMIALS,
                    ),
                ),
                (
                    _consume,
                    (
                        2,
                        p_q_scale,
                        p_key_scale,
                        p_value_scale,
                        p_key_start,
                        p_key_end,
                        p_query_start,
                        p_sinks,
                        p_offset,
                        p_out,
                        s_q,
                        s_k,
                        s_v,
                        s_q_full,
                        s_q_empty,
                        s_k_full,
                        s_k_empty,
                        s_v_full,
                        s_v_empty,
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
                        CAUSAL,
                        PER_TOKEN,
                        SOFTCAP,
                        INT8,
                        POLYNOMIALS,
                    ),
                ),
                (
                    _produce,
                    (
                        d_q,
                        d_k,
                        d_v,
                        p_key_start,
                        p_key_end,
                        p_query_start,
                        s_q,
                        s_k,
                        s_v,
                        s_q_full,
                        s_q_empty,
                        s_k_full,
                        s_k_empty,
                        s_v_full,
                        s_v_empty,
                        tiles,
                        query_tiles,
                        queries,
                        keys,
                        window,
                        heads,
                        kv_heads,
                        sequences,
                        CAUSAL,
                    ),
                ),
            ],
            [4, 4, 1],
            [_REGISTERS_OF_3, _REGISTERS_OF_3, PRODUCER_REGISTERS],
        )
