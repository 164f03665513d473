"""Attention that rotates and quantizes Q, K and V to 8 bits, for tensors of any model."""

import math

import torch

from ..errors import FormatError
from ..kernels.attention import OUT_DTYPES
from .interface import find_intervals
from .operands import MODES, attend, mean_key, pad_heads, padded_size, quantize_key_value


def quantized_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = True,
    *,
    mode: str = "fp8",
    rotate: bool = True,
    k_mean: torch.Tensor | bool | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """`scaled_dot_product_attention` of 8-bit operands, quantization included.

    A constant vector is subtracted from the keys of each head, which a softmax does not see; Q and K are
    rotated by a Hadamard matrix, so that no channel is an outlier (FlashAttention-3, arXiv:2407.08608, and
    HadaCore, arXiv:2412.08832). Scales are per token of Q and per 128 tokens of K and V. Head sizes are
    filled up with zeros to one of the kernels', or beyond 256 to the order of a Hadamard matrix.

    As in `scaled_dot_product_attention` query i stands at key i where `is_causal` or `window` ask for it,
    also if there are more keys than queries. Queries that see nothing give 0.

    A boolean mask that is the same for all heads and queries of a sequence may come with any other option and
    is as fast as none if no sequence has a gap between the keys it sees. Finding that out waits for the
    device. While a CUDA graph is captured or `torch.compile` traces, and for all other masks, attention runs
    in plain torch.

    Not differentiable.

    Args:
        query: bf16 or fp16 ``[B, Hq, Sq, D]``.
        key: ``[B, Hkv, L, D]`` in the same dtype; Hq a multiple of Hkv.
        value: ``[B, Hkv, L, Dv]`` in the same dtype.
        attn_mask: broadcastable to ``[B, Hq, Sq, L]``; boolean, True for what is seen, or added to logits.
        is_causal: whether query i sees no key behind i.
        scale: of the logits; D^-0.5 by default.
        enable_gqa: whether Hq may differ from Hkv.
        mode: "fp8" or "int8-fp8", the more accurate one, whose Q and K are int8.
        rotate: False leaves out the rotation.
        k_mean: the constant, fp32 ``[Hkv, D]`` or ``[B or 1, Hkv, D]``; by default the mean of the keys, but
            for those that such a mask hides; False for none.
        window: keys that a query sees up to its own; None for all.
        softcap: logits become softcap * tanh(logit / softcap).
        sinks: ``[Hq]``, one more logit for each head, whose value is 0.

    Returns:
        ``[B, Hq, Sq, Dv]`` in the dtype of query.

    Raises:
        FormatError: an argument does not fit.
        UnsupportedError: in the backward pass.
    """
    _check(query, key, value, enable_gqa, mode, window, softcap, sinks)
    batch, _, tokens, d = query.shape
    keys, value_dim = value.shape[2:]
    if query.numel() == 0 or value.numel() == 0:
        return query.new_zeros((*query.shape[:3], value_dim))
    scale = d**-0.5 if scale is None else scale
    padding = _padding_mask(attn_mask, batch, keys)
    constant = _constant(key, padding, k_mean)
    start = end = None
    if padding is not None and (interval := _interval(padding, query)) is not None:
        start, end = interval
        attn_mask = None

    size = padded_size(max(d, value_dim), rotate)
    if constant is not None:
        constant = pad_heads(constant, size)
    stored = quantize_key_value(
        pad_heads(key, size), pad_heads(value, size), constant, MODES[mode], rotate=rotate
    )
    if tokens != keys:
        stored = stored._replace(query_start=torch.zeros(batch, dtype=torch.int32, device=query.device))
    out = attend(
        query,
        stored,
        scale=scale,
        is_causal=is_causal,
        window=window,
        softcap=softcap,
        key_start=start,
        key_end=end,
        sinks=sinks,
        mask=attn_mask,
        rotate=rotate,
    )
    return out.transpose(1, 2)[..., :value_dim]


def _padding_mask(attn_mask: torch.Tensor | None, batch: int, keys: int) -> torch.Tensor | None:
    """A mask of keys alone as ``[B or 1, L]``; None for any other."""
    if attn_mask is None or attn_mask.dtype != torch.bool or not 1 <= attn_mask.dim() <= 4:
        return None
    whole = attn_mask.reshape((1,) * (4 - attn_mask.dim()) + attn_mask.shape)
    return whole[:, 0, 0] if whole.shape[0] in (1, batch) and whole.shape[1:] == (1, 1, keys) else None


def _interval(padding: torch.Tensor, query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The keys of each sequence, int32 start and end ``[B]``; None if there are gaps, or nobody may look."""
    if torch.compiler.is_compiling() or (query.is_cuda and torch.cuda.is_current_stream_capturing()):
        return None
    intervals, _, has_gaps = find_intervals(padding)
    if has_gaps:
        return None
    start, end = (edge.expand(query.shape[0]).contiguous() for edge in intervals)
    return start, end


def _constant(
    key: torch.Tensor, padding: torch.Tensor | None, k_mean: torch.Tensor | bool | None
) -> torch.Tensor | None:
    """What is subtracted from keys, fp32 ``[B or 1, Hkv, D]``."""
    batch, heads, _, d = key.shape
    if k_mean is False:
        return None
    if isinstance(k_mean, torch.Tensor):
        shape = k_mean.shape
        if (
            k_mean.dtype != torch.float32
            or shape[-2:] != (heads, d)
            or shape[:-2] not in ((), (1,), (batch,))
            or k_mean.device != key.device
        ):
            raise FormatError(
                f"k_mean: expected fp32 [{heads}, {d}] or [{batch} or 1, {heads}, {d}] on {key.device}, "
                f"found {k_mean.dtype} {list(shape)} on {k_mean.device}"
            )
        return k_mean.reshape(-1, heads, d)
    if k_mean is not None:
        raise FormatError(f"k_mean: expected a tensor, False or None, found {k_mean!r}")
    return mean_key(key, padding)


def _check(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    enable_gqa: bool,
    mode: str,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> None:
    if query.dim() != 4 or query.dtype not in OUT_DTYPES or not query.shape[3]:
        raise FormatError(
            f"query: expected bf16 or fp16 [B, Hq, Sq, D], found {query.dtype} {list(query.shape)}"
        )
    batch, heads, _, d = query.shape
    for name, tensor in (("key", key), ("value", value)):
        if (
            tensor.dim() != 4
            or tensor.shape[0] != batch
            or tensor.dtype != query.dtype
            or tensor.device != query.device
        ):
            raise FormatError(
                f"{name}: expected {query.dtype} [{batch}, Hkv, L, D] on {query.device} like query, "
                f"found {tensor.dtype} {list(tensor.shape)} on {tensor.device}"
            )
    if key.shape[3] != d or key.shape[1:3] != value.shape[1:3] or not value.shape[3]:
        raise FormatError(
            f"key, value: expected [{batch}, Hkv, L, {d}] and [{batch}, Hkv, L, Dv], "
            f"found {list(key.shape)} and {list(value.shape)}"
        )
    key_heads = key.shape[1]
    if heads != key_heads and (not enable_gqa or not key_heads or heads % key_heads):
        allowed = "a multiple of" if enable_gqa else "without enable_gqa the same as"
        raise FormatError(f"query: expected heads to be {allowed} key's {key_heads}, found {heads}")
    if mode not in MODES:
        raise FormatError(f"mode: expected one of {tuple(MODES)}, found {mode!r}")
    if window is not None and window < 1:
        raise FormatError(f"window: expected a positive number of keys or None, found {window}")
    if softcap is not None and not 0 < softcap < math.inf:
        raise FormatError(f"softcap: expected a positive number or None, found {softcap}")
    if sinks is not None and not sinks.is_floating_point():
        raise FormatError(f"sinks: expected floating point [{heads}], found {sinks.dtype}")
