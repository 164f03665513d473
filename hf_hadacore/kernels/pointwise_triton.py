"""Triton kernels of what stands between a model's matrix products: norms, gated activations, RoPE.

At a few tokens each of them takes as long as its launch, so each is one launch, and on GPUs that can (sm_90
and later) it is launched while the kernel before it still runs (programmatic dependent launch, PDL). Until
`gdc_wait` returns nothing is read or written; weights are only asked into the L2 cache, which is right
whatever is still being written. Every program waits, so that a kernel's end implies the end of all before it.

Intermediate values are rounded where transformers' eager code rounds them. Prefixes: p_ pointer, b_ values in
registers, o_ offsets, m_ mask, i_ index, s_ stride.
"""

import torch
import triton
import triton.language as tl

from .launcher import has_pdl, pdl_options, power_of_2, run

# Rows that are longer do not fit into one program.
MAX_NORM_SIZE = 65536


# A product and a sum contracted to one instruction would be rounded once where eager code rounds twice.
_OPTIONS = pdl_options(enable_fp_fusion=False)


@triton.jit
def prefetch_lines(p_lines):
    """Ask for the cache lines of 128 bytes at some addresses to be brought to L2."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; // $0", "=r,l", [p_lines], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _prefetch(p_values, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Ask for SIZE 16-bit (or wider) values to be brought to L2; BLOCK >= SIZE is a power of two."""
    LINES: tl.constexpr = 1 if BLOCK < 64 else BLOCK // 64
    prefetch_lines(p_values + tl.minimum(tl.arange(0, LINES) * 64, SIZE - 1))


@triton.jit
def _scale(b_normed, b_weight, OFFSET: tl.constexpr, ROUND_FIRST: tl.constexpr, dtype: tl.constexpr):
    """The last step of an RMSNorm, from fp32 to the model's dtype."""
    if ROUND_FIRST:
        b_normed = b_normed.to(dtype).to(tl.float32)
    return (b_normed * (OFFSET + b_weight.to(tl.float32))).to(dtype)


@triton.jit(do_not_specialize=["rows"])
def _rms_norm_kernel(
    p_x,
    p_residual,
    p_weight,
    p_out,
    p_sum,
    rows,
    inner,
    s_outer,
    s_inner,
    eps,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    OFFSET: tl.constexpr,
    ROUND_FIRST: tl.constexpr,
    PDL: tl.constexpr,
):
    """out = norm(x [+ residual]) * weight, sum = x + residual.

    Row r of x lies at (r // inner) * s_outer + (r % inner) * s_inner; residual, out and sum are contiguous.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        _prefetch(p_weight, N, BLOCK)
        tl.extra.cuda.gdc_wait()
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_n = tl.arange(0, BLOCK)
    m = (o_row < rows)[:, None] & (o_n < N)[None, :]
    o_x = (o_row // inner) * s_outer + (o_row % inner) * s_inner
    o_flat = o_row[:, None] * N + o_n[None, :]
    b_x = tl.load(p_x + o_x[:, None] + o_n[None, :], mask=m, other=0.0)
    b_weight = tl.load(p_weight + o_n, mask=o_n < N, other=0.0)
    dtype: tl.constexpr = p_out.dtype.element_ty
    if p_residual is not None:
        b_residual = tl.load(p_residual + o_flat, mask=m, other=0.0)
        b_x = (b_x.to(tl.float32) + b_residual.to(tl.float32)).to(dtype)
        tl.store(p_sum + o_flat, b_x, mask=m)
    b_wide = b_x.to(tl.float32)
    b_mean = tl.sum(b_wide * b_wide, axis=1) / N
    b_normed = b_wide * tl.rsqrt(b_mean + eps)[:, None]
    tl.store(p_out + o_flat, _scale(b_normed, b_weight[None, :], OFFSET, ROUND_FIRST, dtype), mask=m)


def _as_rows(x: torch.Tensor) -> tuple[torch.Tensor, int, int, int]:
    """``[..., N]`` as rows of N contiguous elements: x, inner, s_outer, s_inner of `_rms_norm_kernel`."""
    if x.is_contiguous():
        return x, 1, x.shape[-1], 0
    dims: list[tuple[int, int]] = []
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if size == 1:
            continue
        if dims and dims[-1][1] == size * stride:
            dims[-1] = (dims[-1][0] * size, stride)
        else:
            dims.append((size, stride))
    if len(dims) > 2 or x.stride(-1) != 1:
        return x.contiguous(), 1, x.shape[-1], 0
    if len(dims) < 2:
        return x, 1, dims[0][1] if dims else 0, 0
    return x, dims[1][0], dims[0][1], dims[1][1]


def rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    weight_offset: float,
    round_before_weight: bool,
    out: torch.Tensor,
    total: torch.Tensor | None,
) -> None:
    """Run the kernel of `hf_hadacore::rms_norm` and `hf_hadacore::add_rms_norm`.

    Args:
        x: ``[..., N]``, N <= MAX_NORM_SIZE.
        residual: of the same shape; None adds nothing.
        weight: ``[N]``.
        eps, weight_offset, round_before_weight: as in the op.
        out: contiguous, of the shape of x.
        total: like `out`, for x + residual; None where there is no residual.
    """
    if x.numel() == 0:
        return
    n = x.shape[-1]
    rows = x.numel() // n
    x, inner, s_outer, s_inner = _as_rows(x)
    block = power_of_2(n)
    per_program = max(1, 1024 // block)
    pdl = has_pdl(x.device)
    run(
        _rms_norm_kernel,
        (x, residual if residual is None else residual.contiguous(), weight.contiguous(), out, total),
        (rows, inner, s_outer, s_inner, eps),
        (n, per_program, block, weight_offset, round_before_weight, pdl),
        (-(-rows // per_program), 1, 1),
        num_warps=min(16, max(4, block // 512)),
        **_OPTIONS[pdl],
    )


@triton.jit(do_not_specialize=["blocks"])
def _gated_activation_kernel(
    p_gate,
    p_up,
    p_out,
    N,
    blocks,
    s_gate,
    s_up,
    IS_GELU: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """out = act(gate) * up; rows of gate and up lie s_gate and s_up apart, out is contiguous."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    i_row = tl.program_id(0).to(tl.int64) // blocks
    o_n = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    m = o_n < N
    b_gate = tl.load(p_gate + i_row * s_gate + o_n, mask=m, other=0.0).to(tl.float32)
    b_up = tl.load(p_up + i_row * s_up + o_n, mask=m, other=0.0).to(tl.float32)
    # Both are gate * sigmoid(...): 0.5 (1 + tanh u) = sigmoid(2u), with 2u = 2 sqrt(2/pi) (g + 0.044715 g^3).
    b_logit = b_gate
    if IS_GELU:
        b_logit = 1.5957691216057308 * (b_gate + 0.044715 * b_gate * b_gate * b_gate)
    b_act = (b_gate / (1.0 + tl.exp(-b_logit))).to(p_out.dtype.element_ty).to(tl.float32)
    tl.store(p_out + i_row * N + o_n, (b_act * b_up).to(p_out.dtype.element_ty), mask=m)


def gated_activation(gate: torch.Tensor, up: torch.Tensor, is_gelu: bool, out: torch.Tensor) -> None:
    """Run the kernel of `hf_hadacore::gated_activation`.

    Args:
        gate, up: ``[..., N]``, each with its own strides.
        is_gelu: GELU (tanh) instead of SiLU.
        out: contiguous, of the same shape.
    """
    if out.numel() == 0:
        return
    n = out.shape[-1]
    gate, inner, s_gate, _ = _as_rows(gate)
    if inner != 1:
        gate, s_gate = gate.contiguous(), n
    up, inner, s_up, _ = _as_rows(up)
    if inner != 1:
        up, s_up = up.contiguous(), n
    block = 1024
    blocks = -(-n // block)
    pdl = has_pdl(out.device)
    run(
        _gated_activation_kernel,
        (gate, up, out),
        (n, blocks, s_gate, s_up),
        (is_gelu, block, pdl),
        (out.numel() // n * blocks, 1, 1),
        num_warps=4,
        **_OPTIONS[pdl],
    )


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
    b_lo = _scale(b_lo * b_inverse, b_weight_lo, OFFSET, ROUND_FIRST, dtype)
    b_hi = _scale(b_hi * b_inverse, b_weight_hi, OFFSET, ROUND_FIRST, dtype)
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
            _prefetch(p_q_weight, D, 2 * D_BLOCK)
            _prefetch(p_k_weight, D, 2 * D_BLOCK)
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


def rope(
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
        **_OPTIONS[pdl],
    )
