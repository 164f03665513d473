"""Attention on 8-bit operands, prefill and decode, as the op `hf_hadacore::attention_8bit`.

`attention_8bit_reference` says what is computed. On CUDA the kernels of `attention_hopper` (prefill) and
`attention_triton` (the rest) take what fits them, and the reference what does not.
"""

import importlib
import math
import warnings
from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch

from ..errors import FormatError, UnsupportedError
from .attention_reference import BLOCK_SIZE, INTERLEAVED_TOKENS, attention_8bit_reference
from .launcher import capability, goes_straight, on_device

QUERY_DTYPES = (torch.float8_e4m3fn, torch.int8)
OUT_DTYPES = (torch.bfloat16, torch.float16)
_KERNELS: tuple[str, ...] = ("attention_hopper", "attention_triton")

torch.library.define(
    "hf_hadacore::attention_8bit",
    "(Tensor query, Tensor key, Tensor value, Tensor query_scale, Tensor key_scale, Tensor value_scale, "
    "float scale, bool is_causal, int window, float softcap, Tensor? key_start, Tensor? key_end, "
    "Tensor? query_start, Tensor? sinks, Tensor? logit_offset, ScalarType out_dtype, Tensor? mask) -> Tensor",
)


def attention_8bit(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_scale: torch.Tensor,
    key_scale: torch.Tensor,
    value_scale: torch.Tensor,
    *,
    scale: float,
    is_causal: bool = True,
    window: int = 0,
    softcap: float = 0.0,
    key_start: torch.Tensor | None = None,
    key_end: torch.Tensor | None = None,
    query_start: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    logit_offset: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """softmax(scale q k^T) v of 8-bit q, k and v; query i of sequence b stands at query_start[b] + i.

    Query i sees key n if ``key_start[b] <= n < key_end[b]``, with `is_causal` ``n <= query_start[b] + i``,
    and with a window ``n > query_start[b] + i - window``. Queries that see nothing give 0. NaN or infinity in
    a query, or in a key or value that it sees, gives NaN; in a value perhaps also to queries that do not see
    it, as with masks in `scaled_dot_product_attention`.

    Not differentiable. The same input gives the same bits.

    Args:
        query: e4m3 or int8 ``[B, Hq, Sq, D]``; Hq a multiple of Hkv.
        key: ``[B, Hkv, L, D]`` in the dtype of query.
        value: e4m3 ``[B, Hkv, D, L16]``, as `interleave_tokens` orders it.
        query_scale: fp32 ``[B, Hq, Sq]``.
        key_scale, value_scale: fp32, both ``[B, Hkv, L]`` or, a scale for 128 tokens, both ``[B, Hkv,
            ceil(L/128)]``. Those of values are powers of two.
        scale: of q k^T.
        is_causal: see above.
        window: see above; 0 for none.
        softcap: logits become softcap * tanh(logit / softcap); 0 for none.
        key_start, key_end, query_start: int32 ``[B]``, read on the device; 0, L and L - Sq by default.
        sinks: fp32 ``[Hq]``, one more logit for each head, whose value is 0.
        logit_offset: fp32 ``[B, Hq, Sq]``, added to scaled logits before softcap.
        mask: broadcastable to ``[B, Hq, Sq, L]``: boolean, True for what is seen besides the above, or added
            to the logits. Only the reference knows it.
        out_dtype: torch.bfloat16 or torch.float16.

    All tensors but the mask are contiguous.

    Returns:
        ``[B, Sq, Hq, D]``, contiguous.

    Raises:
        FormatError: a shape, dtype, device, stride or number does not fit.
        UnsupportedError: in the backward pass.
    """
    tensors = (query, key, value, query_scale, key_scale, value_scale)
    masks = (key_start, key_end, query_start, sinks, logit_offset)
    options = (scale, is_causal, window, softcap)
    op = _cuda if goes_straight(query) else torch.ops.hf_hadacore.attention_8bit
    return op(*tensors, *options, *masks, out_dtype, mask)


def _check(
    query,
    key,
    value,
    query_scale,
    key_scale,
    value_scale,
    scale,
    is_causal,
    window,
    softcap,
    key_start,
    key_end,
    query_start,
    sinks,
    logit_offset,
    out_dtype,
    mask,
) -> None:
    if query.dim() != 4 or query.dtype not in QUERY_DTYPES:
        raise FormatError(
            f"query: expected e4m3 or int8 [B, Hq, Sq, D], found {query.dtype} {tuple(query.shape)}"
        )
    batch, heads, tokens, d = query.shape
    is_like_query = key.dim() == 4 and key.shape[0] == batch and key.shape[3] == d
    if not is_like_query or key.dtype != query.dtype:
        raise FormatError(
            f"key: expected {query.dtype} [{batch}, Hkv, L, {d}] like query, "
            f"found {key.dtype} {tuple(key.shape)}"
        )
    key_heads, keys = key.shape[1], key.shape[2]
    if heads % key_heads if key_heads else heads:
        raise FormatError(f"query: expected a multiple of key's {key_heads} heads, found {heads}")
    columns = keys + -keys % INTERLEAVED_TOKENS
    blocks = (keys + BLOCK_SIZE - 1) // BLOCK_SIZE
    per_token = key_scale.shape == (batch, key_heads, keys)
    of_keys = (batch, key_heads, keys if per_token else blocks)
    fp32, int32 = torch.float32, torch.int32
    for name, tensor, dtype, shape in (
        ("query", query, query.dtype, query.shape),
        ("key", key, query.dtype, key.shape),
        ("value", value, torch.float8_e4m3fn, (batch, key_heads, d, columns)),
        ("query_scale", query_scale, fp32, (batch, heads, tokens)),
        ("key_scale", key_scale, fp32, of_keys),
        ("value_scale", value_scale, fp32, of_keys),
        ("key_start", key_start, int32, (batch,)),
        ("key_end", key_end, int32, (batch,)),
        ("query_start", query_start, int32, (batch,)),
        ("sinks", sinks, fp32, (heads,)),
        ("logit_offset", logit_offset, fp32, (batch, heads, tokens)),
    ):
        if tensor is None:
            continue
        if tensor.dtype != dtype or tensor.shape != shape or not tensor.is_contiguous():
            text = ""
            if name.endswith("_scale") and name != "query_scale":
                text = f", or, of 128 tokens, [..., {blocks}], the same for keys and values"
            raise FormatError(
                f"{name}: expected contiguous {dtype} {list(shape)}{text}, found {tensor.dtype} "
                f"{list(tensor.shape)} with strides {list(tensor.stride())}"
            )
        if tensor.device != query.device:
            raise FormatError(f"{name}: expected it on {query.device} like query, found {tensor.device}")
    if not math.isfinite(scale):
        raise FormatError(f"scale: expected a finite number, found {scale}")
    if window < 0:
        raise FormatError(f"window: expected a number of keys, or 0 for none, found {window}")
    if not (math.isfinite(softcap) and softcap >= 0):
        raise FormatError(f"softcap: expected a positive number, or 0 for none, found {softcap}")
    if out_dtype not in OUT_DTYPES:
        raise FormatError(f"out_dtype: expected one of {OUT_DTYPES}, found {out_dtype}")
    if mask is not None:
        _check_mask(query, key, mask)


def _check_mask(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor) -> None:
    room = (*query.shape[:3], key.shape[2])
    sizes = zip(reversed(mask.shape), reversed(room), strict=False)
    fits = mask.dim() <= 4 and all(size in (1, whole) for size, whole in sizes)
    if not fits or not (mask.dtype == torch.bool or mask.is_floating_point()) or mask.device != query.device:
        raise FormatError(
            f"mask: expected boolean or floating point, broadcastable to {list(room)}, on {query.device}, "
            f"found {mask.dtype} {list(mask.shape)} on {mask.device}"
        )


@torch.library.register_fake("hf_hadacore::attention_8bit")
def _fake(query, *arguments):
    _check(query, *arguments)
    batch, heads, tokens, d = query.shape
    return query.new_empty((batch, tokens, heads, d), dtype=arguments[-2])


@torch.library.impl("hf_hadacore::attention_8bit", "default")
def _anywhere(*arguments):
    _check(*arguments)
    return attention_8bit_reference(*arguments)


@cache
def _kernel(name: str) -> ModuleType | None:
    """A module with `fits` and `launch`; None if it, or Triton, is not there."""
    if find_spec("triton") is None or find_spec(f"{__package__}.{name}") is None:
        return None
    return importlib.import_module(f".{name}", __package__)


@cache
def _notify(reason: str) -> None:
    """Say once that the slow path is taken."""
    warnings.warn(f"HadaCore: 8-bit attention runs in plain torch, which is slow: {reason}", stacklevel=4)


def _cuda(
    query,
    key,
    value,
    query_scale,
    key_scale,
    value_scale,
    scale,
    is_causal,
    window,
    softcap,
    key_start,
    key_end,
    query_start,
    sinks,
    logit_offset,
    out_dtype,
    mask,
):
    tensors = (query, key, value, query_scale, key_scale, value_scale)
    masks = (key_start, key_end, query_start, sinks, logit_offset)
    _check(*tensors, scale, is_causal, window, softcap, *masks, out_dtype, mask)
    batch, heads, tokens, d = query.shape
    if query.numel() == 0 or key.numel() == 0:
        return torch.zeros((batch, tokens, heads, d), dtype=out_dtype, device=query.device)
    options = dict(
        scale=scale,
        is_causal=is_causal,
        window=window,
        softcap=softcap,
        key_start=key_start,
        key_end=key_end,
        query_start=query_start,
        sinks=sinks,
        logit_offset=logit_offset,
    )
    if mask is not None:
        _notify("a mask that is neither causal nor an interval of keys for each sequence")
    elif capability(query.get_device()) >= (8, 9):
        for kernel in map(_kernel, _KERNELS):
            if kernel is not None and kernel.fits(query, key, value, **options):
                out = torch.empty((batch, tokens, heads, d), dtype=out_dtype, device=query.device)
                with on_device(query.device):
                    kernel.launch(*tensors, out, **options)
                return out
        _notify(f"no kernel for head_dim {d}, {heads} heads on {key.shape[1]}")
    else:
        _notify(f"{torch.cuda.get_device_name(query.device)} has no 8-bit floats")
    return attention_8bit_reference(*tensors, scale, is_causal, window, softcap, *masks, out_dtype, mask)


torch.library.impl("hf_hadacore::attention_8bit", "cuda", _cuda)


def _setup_context(ctx, inputs, output):
    pass


def _backward(ctx, grad):
    raise UnsupportedError("attention_8bit has no gradient; train with attention in full precision")


torch.library.register_autograd("hf_hadacore::attention_8bit", _backward, setup_context=_setup_context)
