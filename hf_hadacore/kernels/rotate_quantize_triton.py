"""Triton kernel of `rotate_quantize`: RoPE, a constant, Hadamard transform and 8-bit cast in one pass.

A head is two halves of D/2 elements: RoPE wants them apart, and H_D = H_2 ⊗ H_(D/2) makes a transform
two products with a small matrix and a butterfly in fp32. Orders that are no power of two are four products
with the quarters of H_D. The matrix comes from the L1 cache while x is on its way from memory.

Prefixes: p_ pointer, b_ values in registers, o_ offsets, m_ mask, i_ index, s_ stride.
"""

import math
from functools import cache

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from ..hadamard_matrices import hadamard_matrix
from .launcher import has_pdl, pdl_options, run
from .rotate_quantize_checks import bits_of
from .rotate_quantize_schedules import HOPPER_MEMORY, Schedule, choose
from .rotate_quantize_tiles import (
    angles_of,
    half_of,
    magnitude,
    matrices,
    place_of_token,
    rotated,
    scales_of,
    to_8_bits,
    token_of_place,
    turned,
)
from .w4a16_launch import processors_of

# Heads that are longer do not fit into one tile.
MAX_HEAD_SIZE = 256
# Whatever the tokens of one tile can be grouped by.
MAX_BLOCK_SIZE = 128


@triton.jit(do_not_specialize=["tiles", "tiles_of_program", "tokens", "heads", "token_tiles", "scales"])
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
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    LARGEST: tl.constexpr,
    SMALLEST: tl.constexpr,
    ROTATE: tl.constexpr,
    TRANSPOSE: tl.constexpr,
    INTERLEAVE: tl.constexpr,
    POWER_OF_2: tl.constexpr,
    ONE_HALF: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """TILE rows at a time: some tokens of HEADS heads. Tiles of the same tokens follow each other.

    x ``[batch, heads, tokens, D]`` of any strides but the last; cos, sin ``[batch or 1, tokens, D]``, or D/2
    if ONE_HALF; offset ``[batch or 1, heads, D]``; values ``[batch, heads, capacity, D]`` or, if TRANSPOSE,
    ``[batch, heads, D, capacity]``; scale ``[batch, heads, scales]``. PADDED is D/2 as a power of two. GROUP
    tokens share a scale; 0 stands for all of a head, whose maxima ``[batch, heads]`` (int32 bits) are
    collected where no values are wanted and read where they are, and count as SMALLEST (bits) at least.
    HEADS divides heads, and is 1 where heads are asked for one by one: TRANSPOSE, an offset, GROUP = 0.
    INTERLEAVE, which needs TRANSPOSE, loads rows in the order in which they are stored, so that a thread
    still stores 16 tokens at a time, but at a position, which need not be a multiple of 16.
    """
    HALF: tl.constexpr = D // 2
    TOKENS: tl.constexpr = TILE // HEADS
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    if ROTATE and STAGES > 1:
        b_matrices = matrices(p_matrix, p_sign, D, PADDED)
    i_start = tl.zeros((), tl.int64)
    if p_position is not None:
        i_start += tl.load(p_position)
    o_row = tl.arange(0, TILE)
    # Of a row: its head and token, counted from the tile's first.
    o_h = (o_row // TOKENS).to(tl.int64)
    o_t = o_row % TOKENS
    o_place = o_t
    if INTERLEAVE and p_position is None:
        o_t = token_of_place(o_place)
    o_d = tl.arange(0, PADDED)
    m_d = o_d < HALF
    i_first = tl.program_id(0) * tiles_of_program
    for i_tile in tl.range(
        i_first,
        i_first + 1 if STAGES == 1 else tl.minimum(i_first + tiles_of_program, tiles),
        num_stages=STAGES,
    ):
        i_h = i_tile % (heads // HEADS) * HEADS
        i_b = (i_tile // (heads // HEADS) // token_tiles).to(tl.int64)
        i_t = (i_tile // (heads // HEADS) % token_tiles).to(tl.int64) * TOKENS
        i_head = i_b * heads + i_h
        m_t = o_t < tokens - i_t
        m = m_t[:, None] & m_d[None, :]

        p_tile = p_x + i_b * s_xb + i_h.to(tl.int64) * s_xh + i_t * s_xt
        o_x = (o_h * s_xh + o_t.to(tl.int64) * s_xt)[:, None] + o_d[None, :]
        b_low = tl.load(p_tile + o_x, mask=m, other=0.0)
        b_high = tl.load(p_tile + o_x + HALF, mask=m, other=0.0)
        if p_cos is not None:
            o_c = i_b * s_cb + i_t * s_ct + o_t[:, None].to(tl.int64) * s_ct + o_d[None, :]
            b_angles = angles_of(p_cos, p_sin, o_c, m, HALF, ONE_HALF)
        if ROTATE and STAGES == 1:
            # While x is on its way.
            b_matrices = matrices(p_matrix, p_sign, D, PADDED)
        if p_cos is not None:
            b_low, b_high = turned(b_low, b_high, b_angles)
        if p_offset is not None:
            p_head = p_offset + i_b * s_ob + i_h * D
            b_low = b_low.to(tl.float32) - half_of(p_head, 0, D, PADDED)[None, :]
            b_high = b_high.to(tl.float32) - half_of(p_head, 1, D, PADDED)[None, :]
        if ROTATE:
            b_low, b_high = rotated(b_low, b_high, b_matrices, D, SPLIT)

        if GROUP == 0 and p_values is not None:
            b_maximum = tl.load(p_maximum + i_head)
        else:
            b_maximum = tl.max(tl.maximum(magnitude(b_low), magnitude(b_high)), axis=1)
            if GROUP != 1:
                # Beyond the last token the offset alone is left.
                b_maximum = tl.where(m_t, b_maximum, 0)
            if GROUP > 1:
                b_maximum = tl.max(tl.reshape(b_maximum, (TILE // GROUP, GROUP)), axis=1)
        if p_values is None:
            tl.atomic_max(p_maximum + i_head, tl.max(b_maximum, axis=0), sem="relaxed")
        else:
            NORM: tl.constexpr = D**-0.5 if ROTATE else 1.0
            b_scale, b_inverse = scales_of(b_maximum, SMALLEST, LARGEST, NORM, POWER_OF_2)
            i_to = i_start + i_t
            if p_position is not None:
                m_to = m_t & (o_t < scales - i_to)
            elif TRANSPOSE:
                # Rows end at multiples of 16, so that 16 tokens can be stored at a time.
                m_to = o_place < (tokens + 15) // 16 * 16 - i_t
            else:
                m_to = m_t
            p_scales = p_scale + i_head * scales
            if GROUP == 0:
                tl.store(p_scales, b_scale, mask=i_t == 0)
            elif GROUP == 1:
                tl.store(p_scales + o_h * scales + i_to + o_t, b_scale, mask=m_t & m_to)
                b_inverse = b_inverse[:, None]
            else:
                o_first = tl.arange(0, TILE // GROUP) * GROUP
                o_scale = (o_first // TOKENS).to(tl.int64) * scales + (i_t + o_first % TOKENS) // GROUP
                tl.store(p_scales + o_scale, b_scale, mask=o_first % TOKENS < tokens - i_t)
                b_inverse = tl.broadcast_to(b_inverse[:, None], (TILE // GROUP, GROUP))
                b_inverse = tl.reshape(b_inverse, (TILE,))[:, None]
            if TRANSPOSE:
                b_inverse = tl.where(m_t[:, None], b_inverse, 0.0)
            dtype: tl.constexpr = p_values.dtype.element_ty
            b_low = to_8_bits(b_low.to(tl.float32) * b_inverse, dtype)
            b_high = to_8_bits(b_high.to(tl.float32) * b_inverse, dtype)
            p_out = p_values + i_head * (capacity * D)
            if TRANSPOSE:
                o_column = o_place
                if INTERLEAVE and p_position is not None:
                    o_column = place_of_token(i_to + o_t) - i_to
                o = (p_out + i_to) + (o_d[:, None].to(tl.int64) * capacity + o_column[None, :])
                m = m_d[:, None] & m_to[None, :]
                tl.store(o, tl.trans(b_low), mask=m)
                tl.store(o + tl.full((), HALF, tl.int64) * capacity, tl.trans(b_high), mask=m)
            else:
                o = (p_out + i_to * D) + ((o_h * capacity + o_t)[:, None] * D + o_d[None, :])
                m = m_to[:, None] & m_d[None, :]
                tl.store(o, b_low, mask=m)
                tl.store(o + HALF, b_high, mask=m)


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
    interleave: bool = False,
    power_of_2: bool = False,
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
        interleave, power_of_2: as in `rotate_quantize`.
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
        schedule = choose(
            d,
            x.dtype,
            group=group,
            rotate=rotate,
            angles=0 if cos is None else cos.shape[2],
            has_large_memory=_has_large_memory(x.device),
        )
    tile = max(schedule.tile, group)
    heads_of_tile = 1
    if cos is not None and group and not transpose and offset is None:
        heads_of_tile = math.gcd(heads, schedule.heads, tile // group)
    token_tiles = -(-tokens // (tile // heads_of_tile))
    tiles = batch * (heads // heads_of_tile) * token_tiles
    tiles_of_program = 1
    if schedule.stages > 1:
        tiles_of_program = -(-tiles // (schedule.programs * _processors(x.device)))
    matrix, is_split = None, False
    if rotate:
        matrix, is_split = matrix_for(x, cos is not None or offset is not None)
    pdl = has_pdl(x.device)

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
                padded_half(d),
                tile,
                heads_of_tile,
                group,
                largest,
                bits_of(smallest),
                rotate,
                transpose,
                interleave,
                power_of_2,
                cos is not None and cos.shape[2] < d,
                is_split,
                schedule.stages,
                pdl,
            ),
            (-(-tiles // tiles_of_program), 1, 1),
            num_warps=schedule.num_warps,
            maxnreg=schedule.registers,
            **OPTIONS[pdl],
        )

    capacity = values.stride(2) if transpose else values.shape[2]
    if group:
        return launch_step(None, values)
    maximum = torch.zeros((batch, heads), dtype=torch.int32, device=x.device)
    launch_step(maximum, None)
    launch_step(maximum, values)


OPTIONS = pdl_options(enable_fp_fusion=True)


def _processors(device: torch.device) -> int:
    # Two are enough for the interpreter to give every program several tiles.
    return processors_of(device.index or 0) if device.type == "cuda" else 2


@cache
def _has_large_memory(device: torch.device) -> bool:
    if device.type != "cuda":
        return True
    properties = triton.runtime.driver.active.utils.get_device_properties(device.index or 0)
    return properties["max_shared_mem"] >= HOPPER_MEMORY


def padded_half(d: int) -> int:
    """Half of a head as a power of two that tensor cores take."""
    return max(16, 1 << (d // 2 - 1).bit_length())


def matrix_for(x: torch.Tensor, has_front: bool) -> tuple[torch.Tensor, bool]:
    """What heads are multiplied by, of the dtype in which they are.

    Args:
        x: ``[..., D]``.
        has_front: whether RoPE or an offset come first, which leave more than 16 bits.

    Returns:
        ``[1 or 4, P, P]`` with P = `padded_half`, and whether a value is split into two terms.
    """
    d = x.shape[-1]
    dtype, is_split = x.dtype, False
    if x.dtype == torch.float32 or (x.dtype == torch.float16 and has_front):
        # bf16 has the range of fp32, and two terms of it 16 bits. The interpreter cannot multiply bf16.
        dtype, is_split = (torch.float32, False) if x.device.type == "cpu" else (torch.bfloat16, True)
    return _matrix_on(x.device, d, padded_half(d), dtype), is_split


@cache
def _matrix_on(device: torch.device, d: int, padded: int, dtype: torch.dtype) -> torch.Tensor:
    """Quarters ``[in, out]`` of the transposed matrix, zeros around; of a power of two one is enough."""
    quarters = hadamard_matrix(d).T.unflatten(0, (2, d // 2)).unflatten(2, (2, d // 2)).transpose(1, 2)
    quarters = quarters.flatten(0, 1)[: 4 if d & (d - 1) else 1]
    missing = padded - d // 2
    return F.pad(quarters, (0, missing, 0, missing)).contiguous().to(device, dtype)
