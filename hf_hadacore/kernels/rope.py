"""Rotary position embedding of q and k, with the norms of their heads and the write into a static cache.

Rotation of halves as in transformers' Llama: ``x * cos + rotate_half(x) * sin``. `rope_reference` says what
is computed, with every rounding of eager code; on CUDA only the fp32 sums of the norms have another order.
"""

import torch

from ..errors import FormatError
from .rms_norm import rms_norm_reference

_NORM = "Tensor? q_weight, Tensor? k_weight, float eps, float weight_offset, bool round_before_weight"

torch.library.define(
    "hf_hadacore::rope", f"(Tensor q, Tensor k, Tensor cos, Tensor sin, {_NORM}) -> (Tensor, Tensor)"
)
torch.library.define(
    "hf_hadacore::rope_into_cache",
    f"(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, {_NORM}, Tensor(a!) keys, Tensor(b!) values,"
    " Tensor position) -> Tensor",
)


def rope(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    *,
    eps: float = 0.0,
    weight_offset: float = 0.0,
    round_before_weight: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalize the heads of q and k, if they have norms, and rotate them.

    Not differentiable; `rope_reference` is.

    Args:
        q: fp16, bf16 or fp32 ``[B, T, Hq, D]``, any strides, D even.
        k: ``[B, T, Hkv, D]``, any strides.
        cos, sin: ``[B or 1, T, D]``, of the dtype of q.
        q_weight, k_weight: ``[D]``, the weights of an RMSNorm over each head; both or neither.
        eps, weight_offset, round_before_weight: of that norm, as in `rms_norm`.

    Returns:
        q as ``[B, Hq, T, D]``, the transpose of a contiguous ``[B, T, Hq, D]``, and k as a contiguous
        ``[B, Hkv, T, D]``.

    Raises:
        FormatError: a shape or dtype does not fit.
    """
    return torch.ops.hf_hadacore.rope(
        q, k, cos, sin, q_weight, k_weight, eps, weight_offset, round_before_weight
    )


def rope_into_cache(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    position: torch.Tensor,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    *,
    eps: float = 0.0,
    weight_offset: float = 0.0,
    round_before_weight: bool = True,
) -> torch.Tensor:
    """`rope`, with k and v written into a static cache.

    The position is read on the device, so that a CUDA graph can be replayed. Tokens beyond the capacity are
    dropped on CUDA; the CPU raises IndexError.

    Args:
        q, k, cos, sin, q_weight, k_weight, eps, weight_offset, round_before_weight: as in `rope`.
        v: ``[B, T, Hkv, D]``, any strides.
        keys, values: ``[B, Hkv, capacity, D]``, contiguous, written at position ... position + T - 1.
        position: int64, one element.

    Returns:
        q as in `rope`.

    Raises:
        FormatError: a shape or dtype does not fit, or the cache is not contiguous.
    """
    return torch.ops.hf_hadacore.rope_into_cache(
        q, k, v, cos, sin, q_weight, k_weight, eps, weight_offset, round_before_weight, keys, values, position
    )


def rope_reference(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    weight_offset: float,
    round_before_weight: bool,
) -> torch.Tensor:
    """The specification for q or k, in plain torch.

    Args:
        x: ``[B, T, heads, D]``.
        cos, sin, weight, eps, weight_offset, round_before_weight: as in `rope`.

    Returns:
        ``[B, T, heads, D]``.
    """
    if weight is not None:
        x = rms_norm_reference(x, weight, eps, weight_offset, round_before_weight)
    first, second = x.chunk(2, dim=-1)
    rotated = torch.cat((-second, first), dim=-1)
    return x * cos.unsqueeze(2) + rotated * sin.unsqueeze(2)


def _check(q, k, v, cos, sin, q_weight, k_weight, keys=None, values=None, position=None) -> None:
    if q.dim() != 4 or k.dim() != 4 or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise FormatError(
            f"q and k: expected [B, T, Hq, D] and [B, T, Hkv, D], found {tuple(q.shape)} and {tuple(k.shape)}"
        )
    batch, tokens, kv_heads, d = k.shape
    if d % 2:
        raise FormatError(f"q: rotation needs an even head dimension, found {d}")
    expected = {"k": (k, k.shape)}
    for name, tensor in (("cos", cos), ("sin", sin)):
        expected[name] = (tensor, (batch if cos.shape[0] == batch else 1, tokens, d))
    if q_weight is not None or k_weight is not None:
        expected |= {"q_weight": (q_weight, (d,)), "k_weight": (k_weight, (d,))}
    if keys is not None:
        shape = (batch, kv_heads, keys.shape[2] if keys.dim() == 4 else -1, d)
        expected |= {"v": (v, k.shape), "keys": (keys, shape), "values": (values, shape)}
        if not (keys.is_contiguous() and values.is_contiguous()):
            raise FormatError("keys and values: expected contiguous tensors")
        if position.numel() != 1 or position.dtype != torch.int64:
            raise FormatError(
                f"position: expected one int64 element, found {position.dtype} {tuple(position.shape)}"
            )
    for name, (tensor, shape) in expected.items():
        if tensor is None or tensor.shape != shape or tensor.dtype != q.dtype:
            found = None if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"
            raise FormatError(f"{name}: expected {q.dtype} {tuple(shape)}, found {found}")


@torch.library.register_fake("hf_hadacore::rope")
def _fake(q, k, cos, sin, q_weight, k_weight, eps, weight_offset, round_before_weight):
    _check(q, k, None, cos, sin, q_weight, k_weight)
    batch, tokens, kv_heads, d = k.shape
    return q.new_empty(q.shape).transpose(1, 2), k.new_empty((batch, kv_heads, tokens, d))


@torch.library.register_fake("hf_hadacore::rope_into_cache")
def _cache_fake(
    q, k, v, cos, sin, q_weight, k_weight, eps, weight_offset, round_before_weight, keys, values, position
):
    _check(q, k, v, cos, sin, q_weight, k_weight, keys, values, position)
    return q.new_empty(q.shape).transpose(1, 2)


def _rotate_both(q, k, cos, sin, q_weight, k_weight, *norm):
    q = rope_reference(q, cos, sin, q_weight, *norm)
    k = rope_reference(k, cos, sin, k_weight, *norm)
    return q.contiguous().transpose(1, 2), k.transpose(1, 2).contiguous()


@torch.library.impl("hf_hadacore::rope", "default")
def _anywhere(q, k, cos, sin, q_weight, k_weight, eps, weight_offset, round_before_weight):
    _check(q, k, None, cos, sin, q_weight, k_weight)
    return _rotate_both(q, k, cos, sin, q_weight, k_weight, eps, weight_offset, round_before_weight)


@torch.library.impl("hf_hadacore::rope_into_cache", "default")
def _cache_anywhere(
    q, k, v, cos, sin, q_weight, k_weight, eps, weight_offset, round_before_weight, keys, values, position
):
    _check(q, k, v, cos, sin, q_weight, k_weight, keys, values, position)
    q, k = _rotate_both(q, k, cos, sin, q_weight, k_weight, eps, weight_offset, round_before_weight)
    positions = torch.arange(k.shape[2], device=k.device) + position
    keys.index_copy_(2, positions, k)
    values.index_copy_(2, positions, v.transpose(1, 2))
    return q


@torch.library.impl("hf_hadacore::rope", "cuda")
def _cuda(q, k, cos, sin, q_weight, k_weight, eps, weight_offset, round_before_weight):
    from . import pointwise_triton

    _check(q, k, None, cos, sin, q_weight, k_weight)
    batch, tokens, kv_heads, d = k.shape
    q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    k_out = torch.empty((batch, kv_heads, tokens, d), dtype=k.dtype, device=k.device)
    norm = (q_weight, k_weight, eps, weight_offset, round_before_weight)
    with torch.cuda.device(q.device.index):
        pointwise_triton.rope(q, k, None, cos, sin, *norm, q_out, k_out, None, None)
    return q_out.transpose(1, 2), k_out


@torch.library.impl("hf_hadacore::rope_into_cache", "cuda")
def _cache_cuda(
    q, k, v, cos, sin, q_weight, k_weight, eps, weight_offset, round_before_weight, keys, values, position
):
    from . import pointwise_triton

    _check(q, k, v, cos, sin, q_weight, k_weight, keys, values, position)
    q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    norm = (q_weight, k_weight, eps, weight_offset, round_before_weight)
    with torch.cuda.device(q.device.index):
        pointwise_triton.rope(q, k, v, cos, sin, *norm, q_out, keys, values, position)
    return q_out.transpose(1, 2)
