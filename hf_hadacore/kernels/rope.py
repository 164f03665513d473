"""Rotary position embedding of q and k, with the norms of their heads and the write into a static cache.

Rotation of halves as in transformers' Llama: ``x * cos + rotate_half(x) * sin``. `rope_reference` says what
is computed, with every rounding of eager code; on CUDA only the fp32 sums of the norms have another order.
"""

import torch

from ..errors import FormatError
from .launcher import goes_straight, on_device
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
    op = _cuda if goes_straight(q) else torch.ops.hf_hadacore.rope
    return op(q, k, cos, sin, q_weight, k_weight, eps, weight_offset, round_before_weight)


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
    op = _cache_cuda if goes_straight(q) else torch.ops.hf_hadacore.rope_into_cache
    return op(
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
    # In one expression, because it runs for every layer and token; what is wrong is found out afterwards.
    dtype, q_shape, shape, angles = q.dtype, q.shape, k.shape, cos.shape
    fits = (
        len(q_shape) == len(shape) == 4
        and q_shape[:2] == shape[:2]
        and q_shape[3] == shape[3]
        and shape[3] % 2 == 0
        and (angles[0] == 1 or angles[0] == shape[0])
        and angles[1:] == (shape[1], shape[3])
        and sin.shape == angles
        and k.dtype == cos.dtype == sin.dtype == dtype
        and (q_weight is None) == (k_weight is None)
    )
    if fits and q_weight is not None:
        fits = q_weight.shape == k_weight.shape == shape[3:] and q_weight.dtype == k_weight.dtype == dtype
    if fits and keys is not None:
        room = keys.shape
        fits = (
            v.shape == shape
            and len(room) == 4
            and (room[0], room[1], room[3]) == (shape[0], shape[2], shape[3])
            and values.shape == room
            and v.dtype == keys.dtype == values.dtype == dtype
            and keys.is_contiguous()
            and values.is_contiguous()
            and position.numel() == 1
            and position.dtype == torch.int64
        )
    if not fits:
        found = {"q": q, "k": k, "cos": cos, "sin": sin, "q_weight": q_weight, "k_weight": k_weight}
        if keys is not None:
            found |= {"v": v, "keys": keys, "values": values, "position": position}
        raise FormatError(
            "expected, of one dtype, q [B, T, Hq, D], k and v [B, T, Hkv, D] with even D, cos and sin "
            "[B or 1, T, D], both or neither of q_weight and k_weight [D], contiguous keys and values "
            "[B, Hkv, capacity, D], and position int64 [1]; found "
            + ", ".join(f"{name} {t.dtype} {tuple(t.shape)}" for name, t in found.items() if t is not None)
        )


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


def _cuda(q, k, cos, sin, q_weight, k_weight, eps, weight_offset, round_before_weight):
    from . import rope_triton

    _check(q, k, None, cos, sin, q_weight, k_weight)
    batch, tokens, kv_heads, d = k.shape
    q_out = q.new_empty(q.shape)
    k_out = k.new_empty((batch, kv_heads, tokens, d))
    norm = (q_weight, k_weight, eps, weight_offset, round_before_weight)
    with on_device(q.device):
        rope_triton.launch(q, k, None, cos, sin, *norm, q_out, k_out, None, None)
    return q_out.transpose(1, 2), k_out


torch.library.impl("hf_hadacore::rope", "cuda", _cuda)


def _cache_cuda(
    q, k, v, cos, sin, q_weight, k_weight, eps, weight_offset, round_before_weight, keys, values, position
):
    from . import rope_triton

    _check(q, k, v, cos, sin, q_weight, k_weight, keys, values, position)
    q_out = q.new_empty(q.shape)
    norm = (q_weight, k_weight, eps, weight_offset, round_before_weight)
    with on_device(q.device):
        rope_triton.launch(q, k, v, cos, sin, *norm, q_out, keys, values, position)
    return q_out.transpose(1, 2)


torch.library.impl("hf_hadacore::rope_into_cache", "cuda", _cache_cuda)
