"""Softmax of a block of logits, as they come from Hopper's tensor cores, to the operand of the next product.

A thread of a warpgroup has 8 i + 2 t + p of a row's columns, for all i, two p and its own t. The values'
tokens lie in such an order (see `attention.interleave_tokens`) that these very elements are what the thread
has of the fp8 operand P.

Prefixes: p_ pointer, b_ values in registers, o_ offsets, m_ mask, i_ index.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# Queries of a warpgroup.
ROWS = gl.constexpr(64)
# Keys of a block, which share a scale where keys have one per block.
BLOCK_N = gl.constexpr(128)
LOG2_E = gl.constexpr(1.4426950408889634)
# P is at most 2^8: fp8 (e4m3) ends at 448.
P_EXPONENT = gl.constexpr(8.0)
# An int32 sum that starts from these bits is the float 12582912 + sum, exactly, as long as |sum| < 2^22.
INT_BITS = gl.constexpr(0x4B400000)
INT_BIAS = gl.constexpr(12582912.0)
_EXP2_OF_FOUR = gl.constexpr("""
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


@gluon.jit
def exp2(b_x):
    return gl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [b_x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def _exp2_of_block(b_x):
    """2^x of a block, one of four by a polynomial: the unit for 2^x is what softmax waits for.

    The idea is FlashAttention-4's. x is the sum of an integer, which goes into the exponent, and a rest
    within 1/2, of which a cubic gives 2^x within 7.5e-5; fp8 keeps 6e-2. Below -125 it gives 2^-125; NaN
    stays NaN.
    """
    return gl.inline_asm_elementwise(
        _EXP2_OF_FOUR, "=f,=f,=f,=f,f,f,f,f", [b_x], dtype=gl.float32, is_pure=True, pack=4
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


@gluon.constexpr_function
def parts_layout():
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
    return gl.convert_layout(b_x, parts_layout())


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
def softmax(
    b_s,
    b_q_scale,
    b_offset,
    state,
    p_key_scales,
    p_value_scales,
    i_block,
    seen,
    factors,
    KIND: gl.constexpr,
    V: gl.constexpr,
):
    """P of a block as the operand of P V, new maxima and sums, and what older sums are to be scaled with.

    Sums are in units of 2^b_unit, P of a 2^8th of that.
    """
    b_max, b_scaled_max, b_unit, b_sum = state
    first, end, o_first, o_end, first_of_all, end_of_all = seen
    scale, softcap = factors
    PER_TOKEN: gl.constexpr = KIND[1]
    SOFTCAP: gl.constexpr = KIND[2]
    INT8: gl.constexpr = KIND[3]
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
    BIAS: gl.constexpr = INT_BIAS if INT8 else 0.0
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
            b_s = softcap - 2.0 * softcap / (1.0 + exp2(b_s * (2.0 * LOG2_E / softcap)))
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
    b_shift = P_EXPONENT - gl.where(b_max == float("-inf"), 0.0, b_new_unit)
    b_decay = exp2(b_unit + b_shift - P_EXPONENT)
    b_shift += b_exponent
    if IS_PLAIN:
        if b_offset is not None:
            b_shift += b_offset
        b_p = b_s * gl.expand_dims(b_slope, 1) + gl.expand_dims(b_shift - BIAS * b_slope, 1)
    else:
        b_p = b_s + gl.expand_dims(b_shift, 1)
    b_p = _exp2_of_block(b_p)
    if PER_TOKEN:
        b_block_sum = _fold(b_p * gl.expand_dims(_inverse(value_scale), 0), False)
    else:
        b_block_sum = _fold(b_p, False) * _inverse(value_scale)
    b_sum_decay = gl.convert_layout(b_decay, gl.SliceLayout(1, b_sum.type.layout))
    b_sum = b_sum * gl.expand_dims(b_sum_decay, 1) + b_block_sum
    # Column 8 e + 2 t + p of each 16 goes to 4 t + 2 e + p: into the registers where it is already.
    b_p = gl.permute(gl.reshape(b_p, (ROWS, BLOCK_N // 16, 2, 4, 2)), (0, 1, 3, 2, 4))
    b_p = gl.convert_layout(gl.reshape(b_p, (ROWS, BLOCK_N)), gl.DotOperandLayout(0, V, 4))
    return _to_fp8(b_p), (b_max, b_scaled_max, b_new_unit, b_sum), b_decay
