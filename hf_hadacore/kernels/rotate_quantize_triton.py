"""Triton kernel of `rotate_quantize`: RoPE, a constant, Hadamard transform and 8-bit cast in one pass.

A head is two halves of D/2 elements: RoPE wants them apart, and H_D = H_2 ⊗ H_(D/2) makes a transform
two products with a small matrix and a butterfly in fp32. The matrix is made once per program, which then goes
through many tiles of tokens. Orders that are no power of two are four products with the quarters of H_D.

Prefixes: p_ pointer, b_ values in registers, o_ offsets, m_ mask, i_ index, s_ stride.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..hadamard_matrices import hadamard_matrix
from .launcher import run
from .w4a16_launch import processors_of

# Heads that are longer do not fit into one tile.
MAX_HEAD_SIZE = 256
# Whatever the tokens of one tile can be grouped by.
MAX_BLOCK_SIZE = 128
# Adding 1.5 * 2^23 to a number leaves the nearest integer, ties to even, in its lowest bits.
_ROUND_TO_INTEGER = tl.constexpr(12582912.0)


@triton.jit
def _sylvester(SIZE: tl.constexpr, dtype: tl.constexpr):
    """The matrix of order SIZE, a power of two up to 128; smaller ones repeat themselves in it."""
    o = tl.arange(0, SIZE)
    # The sign is the parity of the common bits of row and column.
    b_common = o[:, None] & o[None, :]
    b_common ^= b_common >> 4
    b_common ^= b_common >> 2
    b_common ^= b_common >> 1
    return (1 - 2 * (b_common & 1)).to(dtype)


@triton.jit
def _quarter(p_matrix, I_IN: tl.constexpr, I_OUT: tl.constexpr, D: tl.constexpr, PADDED, dtype: tl.constexpr):
    """What half I_IN of a head contributes to half I_OUT: ``[in, out]``, with zeros around."""
    HALF: tl.constexpr = D // 2
    o = tl.arange(0, PADDED)
    m = (o < HALF)[:, None] & (o < HALF)[None, :]
    o_matrix = (I_OUT * HALF + o)[None, :] * D + I_IN * HALF + o[:, None]
    return tl.load(p_matrix + o_matrix, mask=m, other=0).to(dtype)


@triton.jit
def _half_of(p, I_HALF: tl.constexpr, D: tl.constexpr, PADDED: tl.constexpr):
    """Half of a vector ``[D]``, as fp32 ``[PADDED]`` with zeros behind."""
    o = tl.arange(0, PADDED)
    return tl.load(p + I_HALF * (D // 2) + o, mask=o < D // 2, other=0.0).to(tl.float32)


@triton.jit
def _product(b_x, b_matrix, b_sum, SPLIT: tl.constexpr):
    """x @ matrix + sum in fp32: [T, K] @ [K, N] -> [T, N].

    fp32 values are split into two terms, each exact in the matrix's 16-bit dtype.
    """
    b_high = b_x.to(b_matrix.dtype)
    b_sum = tl.dot(b_high, b_matrix, b_sum)
    if SPLIT:
        b_low = (b_x - b_high.to(tl.float32)).to(b_matrix.dtype)
        b_sum = tl.dot(b_low, b_matrix, b_sum)
    return b_sum


@triton.jit
def _magnitude(b):
    """Bits of |b|, which order as the values do and put NaN above infinity."""
    return b.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _to_8_bits(b, dtype: tl.constexpr):
    if dtype == tl.int8:
        return (b + _ROUND_TO_INTEGER).to(tl.int32, bitcast=True).to(tl.int8)
    return b.to(dtype)


@triton.jit
def _store(p, o_t, o_d, m_t, m_d, b, capacity, D: tl.constexpr, TRANSPOSE: tl.constexpr):
    """Store ``[T, D/2]`` into ``[capacity, D]``, or into its transpose."""
    if TRANSPOSE:
        o = o_d[:, None].to(tl.int64) * capacity + o_t[None, :]
        tl.store(p + o, tl.trans(b), mask=m_d[:, None] & m_t[None, :])
    else:
        o = o_t[:, None] * D + o_d[None, :]
        tl.store(p + o, b, mask=m_t[:, None] & m_d[None, :])


@triton.jit(do_not_specialize=["tiles", "tiles_of_program", "tokens", "heads", "token_tiles"])
def _rotate_quantize_kernel(
    p_x,
    p_cos,
    p_sin,
    p_offset,
    p_sign,
    p_matrix,
    p_maximum,
    p_position,
    p_values,
    p_scale,
    tiles,
    tiles_of_program,
    tokens,
    heads,
    token_tiles,
    capacity,
    scales,
    s_xb,
    s_xh,
    s_xt,
    s_cb,
    s_ct,
    s_ob,
    D: tl.constexpr,
    PADDED: tl.constexpr,
    TILE: tl.constexpr,
    GROUP: tl.constexpr,
    LARGEST: tl.constexpr,
    SMALLEST: tl.constexpr,
    ROTATE: tl.constexpr,
    TRANSPOSE: tl.constexpr,
    ONE_HALF: tl.constexpr,
    TERM: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """TILE tokens of a head at a time, the heads of some tokens one after the other: they share cos and sin.

    x ``[batch, heads, tokens, D]`` of any strides but the last; cos, sin ``[batch or 1, tokens, D]``, or D/2
    if ONE_HALF; offset ``[batch or 1, heads, D]``; values ``[batch, heads, capacity, D]`` or, if TRANSPOSE,
    ``[batch, heads, D, capacity]``; scale ``[batch, heads, scales]``. PADDED is D/2 as a power of two. GROUP
    tokens share a scale; 0 stands for all of a head, whose maxima ``[batch, heads]`` (int32 bits) are
    collected where no values are wanted and read where they are, and count as SMALLEST (bits) at least.
    """
    HALF: tl.constexpr = D // 2
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    if ROTATE:
        if p_matrix is None:
            b_low_matrix = _sylvester(PADDED, TERM)
            b_high_matrix = b_low_matrix
        else:
            b_low_matrix = _quarter(p_matrix, 0, 0, D, PADDED, TERM)
            b_high_matrix = _quarter(p_matrix, 1, 0, D, PADDED, TERM)
            b_low_matrix_2 = _quarter(p_matrix, 0, 1, D, PADDED, TERM)
            b_high_matrix_2 = _quarter(p_matrix, 1, 1, D, PADDED, TERM)
        if p_sign is not None:
            b_low_sign = _half_of(p_sign, 0, D, PADDED).to(TERM)[:, None]
            b_high_sign = _half_of(p_sign, 1, D, PADDED).to(TERM)[:, None]
            b_low_matrix *= b_low_sign
            b_high_matrix *= b_high_sign
            if p_matrix is not None:
                b_low_matrix_2 *= b_low_sign
                b_high_matrix_2 *= b_high_sign
    if PDL:
        tl.extra.cuda.gdc_wait()
    i_start = tl.zeros((), tl.int64)
    if p_position is not None:
        i_start += tl.load(p_position)
    o_tile = tl.arange(0, TILE)
    o_d = tl.arange(0, PADDED)
    m_d = o_d < HALF
    i_first = tl.program_id(0) * tiles_of_program
    if p_cos is not None:
        # All tiles of a program are of the same tokens.
        i_t = (i_first // heads % token_tiles).to(tl.int64) * TILE
        m = (o_tile < tokens - i_t)[:, None] & m_d[None, :]
        o_c = (i_first // heads // token_tiles).to(tl.int64) * s_cb + i_t * s_ct
        o_c += o_tile[:, None].to(tl.int64) * s_ct + o_d[None, :]
        b_cos_low = tl.load(p_cos + o_c, mask=m, other=0.0)
        b_sin_low = tl.load(p_sin + o_c, mask=m, other=0.0)
        b_cos_high = b_cos_low
        b_sin_high = b_sin_low
        if not ONE_HALF:
            b_cos_high = tl.load(p_cos + o_c + HALF, mask=m, other=0.0)
            b_sin_high = tl.load(p_sin + o_c + HALF, mask=m, other=0.0)
    # Conversions of cos and sin are not to be hoisted: the registers have no room for them.
    for i_tile in tl.range(
        i_first, tl.minimum(i_first + tiles_of_program, tiles), num_stages=STAGES, disable_licm=True
    ):
        i_h = i_tile % heads
        i_b = (i_tile // heads // token_tiles).to(tl.int64)
        i_t = (i_tile // heads % token_tiles).to(tl.int64) * TILE
        i_head = i_b * heads + i_h
        m_t = o_tile < tokens - i_t
        m = m_t[:, None] & m_d[None, :]

        p_tile = p_x + i_b * s_xb + i_h.to(tl.int64) * s_xh + i_t * s_xt
        o_x = o_tile[:, None].to(tl.int64) * s_xt + o_d[None, :]
        b_low = tl.load(p_tile + o_x, mask=m, other=0.0)
        b_high = tl.load(p_tile + o_x + HALF, mask=m, other=0.0)
        if p_cos is not None:
            b_first = b_low.to(tl.float32)
            b_second = b_high.to(tl.float32)
            b_low = b_first * b_cos_low.to(tl.float32) - b_second * b_sin_low.to(tl.float32)
            b_high = b_second * b_cos_high.to(tl.float32) + b_first * b_sin_high.to(tl.float32)
        if p_offset is not None:
            p_head = p_offset + i_b * s_ob + i_h * D
            b_low = b_low.to(tl.float32) - _half_of(p_head, 0, D, PADDED)[None, :]
            b_high = b_high.to(tl.float32) - _half_of(p_head, 1, D, PADDED)[None, :]
        if ROTATE:
            b_zero = tl.zeros((TILE, PADDED), tl.float32)
            b_from_low = _product(b_low, b_low_matrix, b_zero, SPLIT)
            if p_matrix is None:
                b_from_high = _product(b_high, b_high_matrix, b_zero, SPLIT)
                b_low = b_from_low + b_from_high
                b_high = b_from_low - b_from_high
            else:
                b_from_low_2 = _product(b_low, b_low_matrix_2, b_zero, SPLIT)
                b_low = _product(b_high, b_high_matrix, b_from_low, SPLIT)
                b_high = _product(b_high, b_high_matrix_2, b_from_low_2, SPLIT)

        if GROUP == 0 and p_values is not None:
            b_maximum = tl.load(p_maximum + i_head)
        else:
            b_maximum = tl.max(tl.maximum(_magnitude(b_low), _magnitude(b_high)), axis=1)
            if GROUP != 1:
                # Beyond the last token the offset alone is left.
                b_maximum = tl.where(m_t, b_maximum, 0)
            if GROUP > 1:
                b_maximum = tl.max(tl.reshape(b_maximum, (TILE // GROUP, GROUP)), axis=1)
        if p_values is None:
            tl.atomic_max(p_maximum + i_head, tl.max(b_maximum, axis=0), sem="relaxed")
        else:
            b_maximum = tl.maximum(b_maximum, SMALLEST).to(tl.float32, bitcast=True)
            NORM: tl.constexpr = D**-0.5 if ROTATE else 1.0
            b_scale = b_maximum * (NORM / LARGEST)
            b_inverse = tl.div_rn(LARGEST, b_maximum)
            i_to = i_start + i_t
            if p_position is not None:
                m_to = m_t & (o_tile < capacity - i_to)
            elif TRANSPOSE:
                # Rows end at multiples of 16, so that 16 tokens can be stored at a time.
                m_to = o_tile < (tokens + 15) // 16 * 16 - i_t
            else:
                m_to = m_t
            p_scales = p_scale + i_head * scales
            if GROUP == 0:
                tl.store(p_scales, b_scale, mask=i_t == 0)
            elif GROUP == 1:
                tl.store(p_scales + i_to + o_tile, b_scale, mask=m_t & m_to)
                b_inverse = b_inverse[:, None]
            else:
                o_group = tl.arange(0, TILE // GROUP)
                tl.store(p_scales + i_t // GROUP + o_group, b_scale, mask=o_group * GROUP < tokens - i_t)
                b_inverse = tl.broadcast_to(b_inverse[:, None], (TILE // GROUP, GROUP))
                b_inverse = tl.reshape(b_inverse, (TILE,))[:, None]
            if TRANSPOSE:
                b_inverse = tl.where(m_t[:, None], b_inverse, 0.0)
            dtype: tl.constexpr = p_values.dtype.element_ty
            b_low = _to_8_bits(b_low.to(tl.float32) * b_inverse, dtype)
            b_high = _to_8_bits(b_high.to(tl.float32) * b_inverse, dtype)
            p_out = p_values + i_head * (capacity * D)
            p_out += i_to * (1 if TRANSPOSE else D)
            _store(p_out, o_tile, o_d, m_to, m_d, b_low, capacity, D, TRANSPOSE)
            _store(p_out, o_tile, o_d + HALF, m_to, m_d, b_high, capacity, D, TRANSPOSE)


class Schedule(NamedTuple):
    """How the work is cut.

    Attributes:
        tile: tokens of a tile, at least those that share a scale.
        num_warps: of a program.
        stages: tiles of a program that are on their way from memory, and the one that is worked on.
        programs: of a processor, each of which goes through its share of the tiles.
    """

    tile: int
    num_warps: int
    stages: int
    programs: int


def choose(d: int, dtype: torch.dtype, has_rope: bool) -> Schedule:
    """The schedule for heads of d elements.

    Args:
        d: at most `MAX_HEAD_SIZE`.
        dtype: of x.
        has_rope: whether cos and sin are read too.
    """
    if d > 128:
        return Schedule(64, 8, 2, 1 if dtype == torch.float32 or has_rope else 2)
    if dtype == torch.float32 or has_rope:
        return Schedule(64, 4, 2, 3)
    return Schedule(64, 4, 3, 4)


def launch(
    x: torch.Tensor,
    values: torch.Tensor,
    scale: torch.Tensor,
    *,
    group: int,
    largest: float,
    smallest: float,
    rotate: bool,
    transpose: bool,
    offset: torch.Tensor | None = None,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    sign: torch.Tensor | None = None,
    position: torch.Tensor | None = None,
    schedule: Schedule | None = None,
) -> None:
    """Run the kernel; with a scale per head twice, first for the maxima.

    Args:
        x: fp16, bf16 or fp32 ``[B, H, S, D]``, S > 0, D <= `MAX_HEAD_SIZE` even; any strides, but the last
            dimension is copied where it is not contiguous.
        values: ``[B, H, capacity, D]``, or ``[B, H, D, capacity]`` if `transpose`, contiguous, or ``[B, H, D,
            S]`` of rows that lie a multiple of 16 apart; if no position is given, only such rows can be
            transposed, and are filled with zeros. fp32 instead of an 8-bit dtype leaves the rounding away.
        scale: fp32, contiguous, ``[B, H, capacity]``, ``[B, H, ceil(S / group)]`` or ``[B, H]``.
        group: tokens that share a scale; 0 for all of a head.
        largest: of the 8-bit dtype.
        smallest: a maximum that is below this counts as this.
        rotate: whether to apply the Hadamard transform.
        transpose: store the values token by token.
        offset: ``[B or 1, H, D]``, contiguous.
        cos, sin: ``[B or 1, S, D]``, or ``[B or 1, S, D/2]`` if both halves are the same; with the same
            strides, the last dimension contiguous.
        sign: ``[D]``.
        position: int64, one element: where the first token goes.
        schedule: how the work is cut, if not as usual.
    """
    batch, heads, tokens, d = x.shape
    if x.stride(3) != 1:
        x = x.contiguous()
    if schedule is None:
        schedule = choose(d, x.dtype, cos is not None)
    tile = max(schedule.tile, group)
    token_tiles = -(-tokens // tile)
    tiles = batch * heads * token_tiles
    tiles_of_program = -(-tiles // (schedule.programs * _processors(x.device)))
    if cos is not None:
        # cos and sin are loaded once.
        tiles_of_program = max(n for n in range(1, heads + 1) if heads % n == 0 and n <= tiles_of_program)
    is_wide = x.dtype == torch.float32 or cos is not None or offset is not None
    term, is_split = _term(x, is_wide)
    has_pdl = _has_pdl(x.device)

    def launch_step(maximum: torch.Tensor | None, values: torch.Tensor | None) -> None:
        run(
            _rotate_quantize_kernel,
            (x, cos, sin, offset, sign, matrix, maximum, position, values, scale),
            (
                tiles,
                tiles_of_program,
                tokens,
                heads,
                token_tiles,
                capacity,
                scale.shape[2] if group else 1,
                *x.stride()[:3],
                cos.stride(0) if cos is not None and cos.shape[0] > 1 else 0,
                cos.stride(1) if cos is not None else 0,
                heads * d if offset is not None and offset.shape[0] > 1 else 0,
            ),
            (
                d,
                max(16, 1 << (d // 2 - 1).bit_length()),
                tile,
                group,
                largest,
                _bits_of(smallest),
                rotate,
                transpose,
                cos is not None and cos.shape[2] < d,
                term,
                is_split,
                schedule.stages,
                has_pdl,
            ),
            (-(-tiles // tiles_of_program), 1, 1),
            num_warps=schedule.num_warps,
            **_OPTIONS[has_pdl],
        )

    capacity = values.stride(2) if transpose else values.shape[2]
    matrix = None if not rotate or d & (d - 1) == 0 else _matrix_on(x.device, d)
    if group:
        return launch_step(None, values)
    maximum = torch.zeros((batch, heads), dtype=torch.int32, device=x.device)
    launch_step(maximum, None)
    launch_step(maximum, values)


# A product and a sum contracted to one instruction would be rounded once where the reference rounds twice.
# Triton's interpreter does not know the launch option.
_OPTIONS: dict[bool, dict[str, Any]] = {
    False: {"enable_fp_fusion": False},
    True: {"enable_fp_fusion": False, "launch_pdl": True},
}


@cache
def _has_pdl(device: torch.device) -> bool:
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device) >= (9, 0)
    )


def _processors(device: torch.device) -> int:
    # Two are enough for the interpreter to give every program several tiles.
    return processors_of(device.index or 0) if device.type == "cuda" else 2


def _term(x: torch.Tensor, is_wide: bool) -> tuple[tl.dtype, bool]:
    """The dtype of what is multiplied, and whether a value is split into two of it."""
    if not is_wide:
        return (tl.float16 if x.dtype == torch.float16 else tl.bfloat16), False
    # bf16 has the range of fp32, and two terms of it 16 bits. The interpreter cannot multiply bf16.
    return (tl.bfloat16, True) if x.device.type == "cuda" else (tl.float32, False)


@cache
def _matrix_on(device: torch.device, d: int) -> torch.Tensor:
    return hadamard_matrix(d).to(device)


@cache
def _bits_of(value: float) -> int:
    return int(torch.tensor(value, dtype=torch.float32).view(torch.int32))
