"""Triton kernel of `rope` and `rope_into_cache`, norms of the heads included.

See `pointwise_parts` for when it reads what.
"""

import torch
import triton
import triton.language as tl

from .launcher import has_pdl, power_of_2, run
from .pointwise_parts import OPTIONS, prefetch, scale_normed


@triton.jit
def _normed(
    b_lo,
    b_hi,
    b_weight_lo,
    b_weight_hi,
    eps,
    D: tl.constexpr,
    OFFSET: tl.constexpr,
    ROUND_FIRST: tl.constexpr,
):
    """The RMSNorm of heads that are given as two halves ``[heads, D/2]``."""
    dtype: tl.constexpr = b_lo.dtype
    b_lo = b_lo.to(tl.float32)
    b_hi = b_hi.to(tl.float32)
    b_inverse = tl.rsqrt((tl.sum(b_lo * b_lo, axis=1) + tl.sum(b_hi * b_hi, axis=1)) / D + eps)[:, None]
    b_lo = scale_normed(b_lo * b_inverse, b_weight_lo, OFFSET, ROUND_FIRST, dtype)
    b_hi = scale_normed(b_hi * b_inverse, b_weight_hi, OFFSET, ROUND_FIRST, dtype)
    return b_lo, b_hi


@triton.jit
def _store_rotated(p_out, o_out, m, b_lo, b_hi, b_cos_lo, b_cos_hi, b_sin_lo, b_sin_hi, D: tl.constexpr):
    """Store ``x * cos + rotate_half(x) * sin``; each product is rounded, as it is in eager code."""
    dtype: tl.constexpr = b_lo.dtype
    b_lo = b_lo.to(tl.float32)
    b_hi = b_hi.to(tl.float32)
    b_first = (b_lo * b_cos_lo).to(dtype).to(tl.float32) - (b_hi * b_sin_lo).to(dtype).to(tl.float32)
    b_second = (b_hi * b_cos_hi).to(dtype).to(tl.float32) + (b_lo * b_sin_hi).to(dtype).to(tl.float32)
    tl.store(p_out + o_out, b_first.to(dtype), mask=m)
    tl.store(p_out + o_out + D // 2, b_second.to(dtype), mask=m)


@triton.jit(do_not_specialize=["tokens"])
def _rope_kernel(
    p_q,
    p_k,
    p_v,
    p_cos,
    p_sin,
    p_q_weight,
    p_k_weight,
    p_q_out,
    p_keys,
    p_values,
    p_position,
    tokens,
    capacity,
    s_qb,
    s_qt,
    s_kb,
    s_kt,
    s_vb,
    s_vt,
    s_cb,
    eps,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    Q_BLOCK: tl.constexpr,
    KV_BLOCK: tl.constexpr,
    D_BLOCK: tl.constexpr,
    OFFSET: tl.constexpr,
    ROUND_FIRST: tl.constexpr,
    PDL: tl.constexpr,
):
    """One token: [norm,] rotate and store q and k, copy v.

    q, k, v ``[batch, tokens, heads, D]``, heads adjacent; cos, sin ``[batch or 1, tokens, D]``; q_out like q,
    contiguous; keys, values ``[batch, KV_HEADS, capacity, D]``. Token t is stored at position + t, or at t
    where no position is given. D_BLOCK is D/2 rounded up to a power of two.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        if p_q_weight is not None:
            prefetch(p_q_weight, D, 2 * D_BLOCK)
            prefetch(p_k_weight, D, 2 * D_BLOCK)
        tl.extra.cuda.gdc_wait()
    i_token = tl.program_id(0).to(tl.int64)
    i_b = i_token // tokens
    i_t = i_token % tokens
    o_d = tl.arange(0, D_BLOCK)
    m_d = o_d < D // 2
    o_qh = tl.arange(0, Q_BLOCK)
    o_kh = tl.arange(0, KV_BLOCK)
    m_q = (o_qh < Q_HEADS)[:, None] & m_d[None, :]
    m_k = (o_kh < KV_HEADS)[:, None] & m_d[None, :]
    o_q = o_qh[:, None] * D + o_d[None, :]
    o_k = o_kh[:, None] * D + o_d[None, :]

    # All loads come first, so that their latencies overlap.
    p_q += i_b * s_qb + i_t * s_qt
    b_q_lo = tl.load(p_q + o_q, mask=m_q, other=0.0)
    b_q_hi = tl.load(p_q + o_q + D // 2, mask=m_q, other=0.0)
    p_k += i_b * s_kb + i_t * s_kt
    b_k_lo = tl.load(p_k + o_k, mask=m_k, other=0.0)
    b_k_hi = tl.load(p_k + o_k + D // 2, mask=m_k, other=0.0)
    o_c = i_b * s_cb + i_t * D + o_d
    b_cos_lo = tl.load(p_cos + o_c, mask=m_d, other=0.0).to(tl.float32)[None, :]
    b_cos_hi = tl.load(p_cos + o_c + D // 2, mask=m_d, other=0.0).to(tl.float32)[None, :]
    b_sin_lo = tl.load(p_sin + o_c, mask=m_d, other=0.0).to(tl.float32)[None, :]
    b_sin_hi = tl.load(p_sin + o_c + D // 2, mask=m_d, other=0.0).to(tl.float32)[None, :]
    if p_q_weight is not None:
        b_qw_lo = tl.load(p_q_weight + o_d, mask=m_d, other=0.0)[None, :]
        b_qw_hi = tl.load(p_q_weight + o_d + D // 2, mask=m_d, other=0.0)[None, :]
        b_kw_lo = tl.load(p_k_weight + o_d, mask=m_d, other=0.0)[None, :]
        b_kw_hi = tl.load(p_k_weight + o_d + D // 2, mask=m_d, other=0.0)[None, :]
    i_position = i_t
    if p_position is not None:
        i_position += tl.load(p_position)
    if p_v is not None:
        p_v += i_b * s_vb + i_t * s_vt
        b_v_lo = tl.load(p_v + o_k, mask=m_k, other=0.0)
        b_v_hi = tl.load(p_v + o_k + D // 2, mask=m_k, other=0.0)

    if p_q_weight is not None:
        b_q_lo, b_q_hi = _normed(b_q_lo, b_q_hi, b_qw_lo, b_qw_hi, eps, D, OFFSET, ROUND_FIRST)
        b_k_lo, b_k_hi = _normed(b_k_lo, b_k_hi, b_kw_lo, b_kw_hi, eps, D, OFFSET, ROUND_FIRST)
    o_out = i_token * (Q_HEADS * D) + o_q
    _store_rotated(p_q_out, o_out, m_q, b_q_lo, b_q_hi, b_cos_lo, b_cos_hi, b_sin_lo, b_sin_hi, D)
    # What lies beyond the cache's end is dropped: there is no memory for it.
    m_k = (o_kh < tl.where(i_position < capacity, KV_HEADS, 0))[:, None] & m_d[None, :]
    o_out = ((i_b * KV_HEADS + o_kh[:, None]) * capacity + i_position) * D + o_d[None, :]
    _store_rotated(p_keys, o_out, m_k, b_k_lo, b_k_hi, b_cos_lo, b_cos_hi, b_sin_lo, b_sin_hi, D)
    if p_v is not None:
        tl.store(p_values + o_out, b_v_lo, mask=m_k)
        tl.store(p_values + o_out + D // 2, b_v_hi, mask=m_k)


def _as_heads(x: torch.Tensor) -> tuple[torch.Tensor, int, int]:
    """``[B, T, heads, D]`` with the heads of a token adjacent (a copy only where they are not), s_b, s_t."""
    strides = x.stride()
    if strides[3] != 1 or (strides[2] != x.shape[3] and x.shape[2] != 1):
        x = x.contiguous()
        strides = x.stride()
    return x, strides[0], strides[1]


def launch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    eps: float,
    weight_offset: float,
    round_before_weight: bool,
    q_out: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor | None,
    position: torch.Tensor | None,
) -> None:
    """Run the kernel of `hf_hadacore::rope` and `hf_hadacore::rope_into_cache`.

    Args:
        q: ``[B, T, Hq, D]``, any strides.
        k, v: ``[B, T, Hkv, D]``, any strides; v is None where there is no cache.
        cos, sin: ``[B or 1, T, D]``.
        q_weight, k_weight: ``[D]`` of a norm per head; None for no norm.
        eps, weight_offset, round_before_weight: of the norm, as in `rms_norm`.
        q_out: ``[B, T, Hq, D]``, contiguous.
        keys, values: ``[B, Hkv, capacity, D]``, contiguous.
        position: int64, one element: of the first token; None means 0.
    """
    batch, tokens, q_heads, d = q.shape
    if batch * tokens == 0:
        return
    kv_heads = k.shape[2]
    q, s_qb, s_qt = _as_heads(q)
    k, s_kb, s_kt = _as_heads(k)
    s_vb = s_vt = 0
    if v is not None:
        v, s_vb, s_vt = _as_heads(v)
    elements = (q_heads + 2 * kv_heads) * d
    pdl = has_pdl(q.device)
    run(
        _rope_kernel,
        (q, k, v, cos.contiguous(), sin.contiguous(), q_weight, k_weight, q_out, keys, values, position),
        (
            tokens,
            keys.shape[2],
            s_qb,
            s_qt,
            s_kb,
            s_kt,
            s_vb,
            s_vt,
            tokens * d if cos.shape[0] > 1 else 0,
            eps,
        ),
        (
            q_heads,
            kv_heads,
            d,
            power_of_2(q_heads),
            power_of_2(kv_heads),
            power_of_2(d // 2),
            weight_offset,
            round_before_weight,
            pdl,
        ),
        (batch * tokens, 1, 1),
        num_warps=4 if elements <= 2048 else 8 if elements <= 8192 else 16,
        **OPTIONS[pdl],
    )
