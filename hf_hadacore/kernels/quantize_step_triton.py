"""Triton kernel of `quantize_step_into_cache`: what comes before attention in a decoding step.

Each head of a sequence, be it of q, k or v, has a program, which does to a few rows what `rotate_quantize`
does. The matrix comes while the kernel before is still at work, whose results are then waited for; attention,
which comes next, starts early and waits in the same way.

Prefixes: p_ pointer, b_ values in registers, o_ offsets, m_ mask, i_ index, s_ stride.
"""

import torch
import triton
import triton.language as tl

from .launcher import has_pdl, run
from .rotate_quantize_checks import bits_of, whole_rows
from .rotate_quantize_tiles import (
    angles_of,
    half_of,
    magnitude,
    matrices,
    place_of_token,
    rotated,
    scales_of,
    to_8_bits,
    turned,
)
from .rotate_quantize_triton import OPTIONS, matrix_for, padded_half

# Rows of the smallest product of tensor cores.
_TILE = 16


@triton.jit
def _both(b_x, b_y):
    """The same, of one dtype, from memory.

    Triton moves conversions of layouts, which go through shared memory and wait, up to the loads: the second
    would be asked for when the first has come. It does not move them across what may have side effects.
    """
    if b_x.dtype == tl.float32:
        return tl.inline_asm_elementwise(
            "mov.b32 $0, $2; mov.b32 $1, $3;",
            "=r,=r,r,r",
            [b_x, b_y],
            dtype=(tl.float32, tl.float32),
            is_pure=False,
            pack=1,
        )
    else:
        return tl.inline_asm_elementwise(
            "mov.b32 $0, $2; mov.b32 $1, $3;",
            "=r,=r,r,r",
            [b_x, b_y],
            dtype=(b_x.dtype, b_x.dtype),
            is_pure=False,
            pack=2,
        )


@triton.jit
def _quantize_head(
    p_x,
    p_cos,
    p_sin,
    p_offset,
    p_matrix,
    p_position,
    p_values,
    p_scale,
    tokens,
    room,
    columns,
    s_xt,
    s_ct,
    D: tl.constexpr,
    PADDED: tl.constexpr,
    TILE: tl.constexpr,
    LARGEST: tl.constexpr,
    SMALLEST: tl.constexpr,
    ONE_HALF: tl.constexpr,
    SPLIT: tl.constexpr,
    IS_VALUE: tl.constexpr,
    PDL: tl.constexpr,
):
    """TILE tokens at most of one head, to which all pointers but those of the matrix and position point.

    Values are ``[room, D]`` or, if IS_VALUE, interleaved ``[D, columns]`` with scales that are powers of two.
    """
    HALF: tl.constexpr = D // 2
    if p_matrix is not None:
        # It was there before all kernels.
        b_matrices = matrices(p_matrix, None, D, PADDED)
    if PDL:
        tl.extra.cuda.gdc_wait()
    i_to = tl.zeros((), tl.int64)
    if p_position is not None:
        i_to += tl.load(p_position)
    o_t = tl.arange(0, TILE)
    m_t = o_t < tokens
    o_d = tl.arange(0, PADDED)
    m_d = o_d < HALF
    m = m_t[:, None] & m_d[None, :]
    o_x = o_t[:, None].to(tl.int64) * s_xt + o_d[None, :]
    if p_offset is not None:
        b_offset_low = half_of(p_offset, 0, D, PADDED)
        b_offset_high = half_of(p_offset, 1, D, PADDED)
    if p_cos is not None:
        o_c = o_t[:, None].to(tl.int64) * s_ct + o_d[None, :]
        b_angles = angles_of(p_cos, p_sin, o_c, m, HALF, ONE_HALF)
    b_low = tl.load(p_x + o_x, mask=m, other=0.0)
    b_high = tl.load(p_x + o_x + HALF, mask=m, other=0.0)
    if PDL:
        b_low, b_high = _both(b_low, b_high)
        if p_offset is not None:
            b_offset_low, b_offset_high = _both(b_offset_low, b_offset_high)
    if p_cos is not None:
        b_low, b_high = turned(b_low, b_high, b_angles)
    if p_offset is not None:
        b_low = b_low.to(tl.float32) - b_offset_low[None, :]
        b_high = b_high.to(tl.float32) - b_offset_high[None, :]
    if p_matrix is not None:
        b_low, b_high = rotated(b_low, b_high, b_matrices, D, SPLIT)

    NORM: tl.constexpr = 1.0 if p_matrix is None else D**-0.5
    b_maximum = tl.max(tl.maximum(magnitude(b_low), magnitude(b_high)), axis=1)
    b_scale, b_inverse = scales_of(b_maximum, SMALLEST, LARGEST, NORM, IS_VALUE)
    m_to = m_t & (o_t < room - i_to)
    tl.store(p_scale + i_to + o_t, b_scale, mask=m_to)
    dtype: tl.constexpr = p_values.dtype.element_ty
    b_low = to_8_bits(b_low.to(tl.float32) * b_inverse[:, None], dtype)
    b_high = to_8_bits(b_high.to(tl.float32) * b_inverse[:, None], dtype)
    if IS_VALUE:
        p_values += o_d[:, None].to(tl.int64) * columns + place_of_token(i_to + o_t)[None, :]
        m = m_d[:, None] & m_to[None, :]
        tl.store(p_values, tl.trans(b_low), mask=m)
        tl.store(p_values + tl.full((), HALF, tl.int64) * columns, tl.trans(b_high), mask=m)
    else:
        p_values += (i_to + o_t)[:, None] * D + o_d[None, :]
        m = m_to[:, None] & m_d[None, :]
        tl.store(p_values, b_low, mask=m)
        tl.store(p_values + HALF, b_high, mask=m)


@triton.jit(do_not_specialize=["tokens", "room"])
def _quantize_step_kernel(
    p_q,
    p_k,
    p_v,
    p_cos,
    p_sin,
    p_constant,
    p_q_matrix,
    p_k_matrix,
    p_position,
    p_query,
    p_keys,
    p_values,
    p_query_scale,
    p_key_scale,
    p_value_scale,
    tokens,
    room,
    columns,
    s_qb,
    s_qh,
    s_qt,
    s_kb,
    s_kh,
    s_kt,
    s_vb,
    s_vh,
    s_vt,
    s_cb,
    s_ct,
    s_ob,
    D: tl.constexpr,
    PADDED: tl.constexpr,
    TILE: tl.constexpr,
    HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    PER_SEQUENCE: tl.constexpr,
    LARGEST_KEY: tl.constexpr,
    LARGEST_VALUE: tl.constexpr,
    SMALLEST: tl.constexpr,
    ONE_HALF: tl.constexpr,
    Q_SPLIT: tl.constexpr,
    K_SPLIT: tl.constexpr,
    PDL: tl.constexpr,
):
    """Programs: heads of q, of k and of v of a sequence, then of the next; PER_SEQUENCE has positions."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    i_head = (tl.program_id(0) % (HEADS + 2 * KEY_HEADS)).to(tl.int64)
    i_b = (tl.program_id(0) // (HEADS + 2 * KEY_HEADS)).to(tl.int64)
    if PER_SEQUENCE:
        p_position += i_b
    if p_cos is not None:
        p_cos += i_b * s_cb
        p_sin += i_b * s_cb
    if i_head < HEADS:
        i_row = (i_b * HEADS + i_head) * tokens
        _quantize_head(
            p_q + i_b * s_qb + i_head * s_qh,
            p_cos,
            p_sin,
            None,
            p_q_matrix,
            None,
            p_query + i_row * D,
            p_query_scale + i_row,
            tokens,
            tokens,
            columns,
            s_qt,
            s_ct,
            D,
            PADDED,
            TILE,
            LARGEST_KEY,
            SMALLEST,
            ONE_HALF,
            Q_SPLIT,
            False,
            PDL,
        )
    elif i_head < HEADS + KEY_HEADS:
        i_head -= HEADS
        i_row = (i_b * KEY_HEADS + i_head) * room
        if p_constant is not None:
            p_constant += i_b * s_ob + i_head * D
        _quantize_head(
            p_k + i_b * s_kb + i_head * s_kh,
            p_cos,
            p_sin,
            p_constant,
            p_k_matrix,
            p_position,
            p_keys + i_row * D,
            p_key_scale + i_row,
            tokens,
            room,
            columns,
            s_kt,
            s_ct,
            D,
            PADDED,
            TILE,
            LARGEST_KEY,
            SMALLEST,
            ONE_HALF,
            K_SPLIT,
            False,
            PDL,
        )
    else:
        i_head -= HEADS + KEY_HEADS
        i_row = i_b * KEY_HEADS + i_head
        _quantize_head(
            p_v + i_b * s_vb + i_head * s_vh,
            None,
            None,
            None,
            None,
            p_position,
            p_values + i_row * D * columns,
            p_value_scale + i_row * room,
            tokens,
            room,
            columns,
            s_vt,
            s_ct,
            D,
            PADDED,
            TILE,
            LARGEST_VALUE,
            SMALLEST,
            ONE_HALF,
            False,
            True,
            PDL,
        )


def fits(q: torch.Tensor) -> bool:
    """Whether `launch` can do it, if `rotate_quantize` has a kernel.

    Args:
        q: ``[B, Hq, S, D]``.
    """
    tokens, d = q.shape[2:]
    # A program holds the matrix in registers, and has four parts of it if D is not a power of two.
    return tokens <= _TILE and (d <= 128 or d & (d - 1) == 0)


def launch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    key_scale: torch.Tensor,
    value_scale: torch.Tensor,
    position: torch.Tensor,
    query: torch.Tensor,
    query_scale: torch.Tensor,
    *,
    largest_key: float,
    largest_value: float,
    smallest: float,
    constant: torch.Tensor | None = None,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
) -> None:
    """Run the kernel on the current device.

    Args:
        q, k, v, keys, values, key_scale, value_scale, position: as in `quantize_step_into_cache`. The last
            dimension of q, k and v is copied where it is not contiguous. fp32 keys and values instead of
            8-bit ones leave the rounding away.
        query: ``[B, Hq, S, D]`` in the dtype of keys, contiguous.
        query_scale: fp32 ``[B, Hq, S]``, contiguous.
        largest_key, largest_value: of the 8-bit dtypes.
        smallest: a maximum that is below this counts as this.
        constant: ``[B or 1, Hkv, D]``, contiguous.
        cos, sin: as there, with the same strides, the last dimension contiguous.
    """
    batch, heads, tokens, d = q.shape
    key_heads, room = key_scale.shape[1:]
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    q_matrix, q_split = matrix_for(q, cos is not None)
    k_matrix, k_split = matrix_for(k, cos is not None or constant is not None)
    pdl = has_pdl(q.device)
    run(
        _quantize_step_kernel,
        (
            q,
            k,
            v,
            cos,
            sin,
            constant,
            q_matrix,
            k_matrix,
            position,
            query,
            keys,
            values,
            query_scale,
            key_scale,
            value_scale,
        ),
        (
            tokens,
            room,
            whole_rows(room),
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            cos.stride(0) if cos is not None and cos.shape[0] > 1 else 0,
            cos.stride(1) if cos is not None else 0,
            key_heads * d if constant is not None and constant.shape[0] > 1 else 0,
        ),
        (
            d,
            padded_half(d),
            _TILE,
            heads,
            key_heads,
            position.numel() > 1,
            largest_key,
            largest_value,
            bits_of(smallest),
            cos is not None and cos.shape[2] < d,
            q_split,
            k_split,
            pdl,
        ),
        (batch * (heads + 2 * key_heads), 1, 1),
        num_warps=4 if d <= 128 else 8,
        **OPTIONS[pdl],
    )
