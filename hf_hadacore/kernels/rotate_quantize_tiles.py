"""What rotate_quantize's kernel does to a tile: RoPE, products with the matrix, the 8-bit cast.

Prefixes: p_ pointer, b_ values in registers, o_ offsets, i_ index.
"""

import triton
import triton.language as tl

# Adding 1.5 * 2^23 to a number leaves the nearest integer, ties to even, in its lowest bits.
_ROUND_TO_INTEGER = tl.constexpr(12582912.0)


@triton.jit
def half_of(p, I_HALF: tl.constexpr, D: tl.constexpr, PADDED: tl.constexpr):
    """Half of a vector ``[D]``, as fp32 ``[PADDED]`` with zeros behind."""
    o = tl.arange(0, PADDED)
    return tl.load(p + I_HALF * (D // 2) + o, mask=o < D // 2, other=0.0).to(tl.float32)


@triton.jit
def matrices(p_matrix, p_sign, D: tl.constexpr, PADDED: tl.constexpr):
    """How each half of x, signs included, goes into the first and the second sum."""
    o = tl.arange(0, PADDED)
    p = p_matrix + o[:, None] * PADDED + o[None, :]
    b_low = tl.load(p)
    b_low_2, b_high, b_high_2 = b_low, b_low, b_low
    if D & (D - 1):
        PART: tl.constexpr = PADDED * PADDED
        b_low_2, b_high, b_high_2 = tl.load(p + PART), tl.load(p + 2 * PART), tl.load(p + 3 * PART)
    if p_sign is not None:
        b_sign = half_of(p_sign, 0, D, PADDED).to(b_low.dtype)[:, None]
        b_low, b_low_2 = b_low * b_sign, b_low_2 * b_sign
        b_sign = half_of(p_sign, 1, D, PADDED).to(b_low.dtype)[:, None]
        b_high, b_high_2 = b_high * b_sign, b_high_2 * b_sign
    return b_low, b_low_2, b_high, b_high_2


@triton.jit
def product(b_x, b_matrix, b_sum, SPLIT: tl.constexpr):
    """x @ matrix + sum in fp32: [T, K] @ [K, N] -> [T, N].

    To SPLIT means that fp32 values become two bf16 terms; the first is cut off, which is exact and cheap.
    """
    if SPLIT:
        b_x = b_x.to(tl.float32)
        b_first = (b_x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
        b_sum = tl.dot(b_first.to(b_matrix.dtype), b_matrix, b_sum)
        b_x = b_x - b_first
    return tl.dot(b_x.to(b_matrix.dtype), b_matrix, b_sum)


@triton.jit
def turn(b_x, b_cos, b_y, b_sin, MINUS: tl.constexpr):
    """x * cos + y * sin, or - y * sin.

    bf16 takes two elements an instruction, and rounds x * cos and the sum.
    """
    if b_x.dtype == tl.bfloat16 and b_cos.dtype == tl.bfloat16:
        # -0 leaves the sign of a product as it is.
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 zero, sine, product;
            mov.b32 zero, 0x80008000;
            """
            + ("neg.bf16x2 sine, $4;" if MINUS else "mov.b32 sine, $4;")
            + """
            fma.rn.bf16x2 product, $1, $2, zero;
            fma.rn.bf16x2 $0, $3, sine, product;
            }""",
            "=r,r,r,r,r",
            [b_x, b_cos, b_y, b_sin],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=2,
        )
    else:
        b_sin = b_sin.to(tl.float32)
        if MINUS:
            b_sin = -b_sin
        return b_x.to(tl.float32) * b_cos.to(tl.float32) + b_y.to(tl.float32) * b_sin


@triton.jit
def angles_of(p_cos, p_sin, o, m, HALF: tl.constexpr, ONE_HALF: tl.constexpr):
    """cos and sin of both halves, which are the same with ONE_HALF."""
    b_cos_low = tl.load(p_cos + o, mask=m, other=0.0)
    b_sin_low = tl.load(p_sin + o, mask=m, other=0.0)
    b_cos_high = b_cos_low
    b_sin_high = b_sin_low
    if not ONE_HALF:
        b_cos_high = tl.load(p_cos + o + HALF, mask=m, other=0.0)
        b_sin_high = tl.load(p_sin + o + HALF, mask=m, other=0.0)
    return b_cos_low, b_sin_low, b_cos_high, b_sin_high


@triton.jit
def turned(b_low, b_high, b_angles):
    """Both halves after RoPE with what `angles_of` gives."""
    b_first = turn(b_low, b_angles[0], b_high, b_angles[1], True)
    return b_first, turn(b_high, b_angles[2], b_low, b_angles[3], False)


@triton.jit
def rotated(b_low, b_high, b_matrices, D: tl.constexpr, SPLIT: tl.constexpr):
    """Both halves of H x in fp32, with what `matrices` gives."""
    b_zero = tl.zeros((b_low.shape[0], b_low.shape[1]), tl.float32)
    b_from_low = product(b_low, b_matrices[0], b_zero, SPLIT)
    if D & (D - 1):
        b_from_low_2 = product(b_low, b_matrices[1], b_zero, SPLIT)
        b_low = product(b_high, b_matrices[2], b_from_low, SPLIT)
        b_high = product(b_high, b_matrices[3], b_from_low_2, SPLIT)
    else:
        b_from_high = product(b_high, b_matrices[2], b_zero, SPLIT)
        b_low = b_from_low + b_from_high
        b_high = b_from_low - b_from_high
    return b_low, b_high


@triton.jit
def magnitude(b):
    """Bits of |b|, which order as the values do and put NaN above infinity."""
    return b.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def up_to_power_of_2(b):
    """Powers of two, not below positive normal fp32 numbers; NaN and infinity stay."""
    b_bits = b.to(tl.int32, bitcast=True)
    b_up = (b_bits + 0x7FFFFF) & 0x7F800000
    return tl.where(b_bits < 0x7F800000, b_up, b_bits).to(tl.float32, bitcast=True)


@triton.jit
def scales_of(
    b_maximum, SMALLEST: tl.constexpr, LARGEST: tl.constexpr, NORM: tl.constexpr, POWER_OF_2: tl.constexpr
):
    """Scales of what has these magnitudes (bits; SMALLEST at least), and what it is multiplied by."""
    b_maximum = tl.maximum(b_maximum, SMALLEST).to(tl.float32, bitcast=True)
    b_scale = b_maximum * (NORM / LARGEST)
    if POWER_OF_2:
        b_scale = up_to_power_of_2(b_scale)
        return b_scale, tl.div_rn(NORM, b_scale)
    else:
        return b_scale, tl.div_rn(LARGEST, b_maximum)


@triton.jit
def token_of_place(o):
    """Which of interleaved tokens stands at a place, counted from a multiple of 16."""
    return o // 16 * 16 + o % 4 // 2 * 8 + o % 16 // 4 * 2 + o % 2


@triton.jit
def place_of_token(o):
    """The place of one of interleaved tokens, counted from a multiple of 16."""
    return o // 16 * 16 + o % 8 // 2 * 4 + o % 16 // 8 * 2 + o % 2


@triton.jit
def to_8_bits(b, dtype: tl.constexpr):
    if dtype == tl.int8:
        return (b + _ROUND_TO_INTEGER).to(tl.int32, bitcast=True).to(tl.int8)
    return b.to(dtype)
