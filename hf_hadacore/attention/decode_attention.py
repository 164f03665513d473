"""Attention of one new token over a masked buffer, for transformers' attention interface.

transformers' "sdpa" repeats keys and values for every query head that shares them, as soon as there is a
mask, and PyTorch turns a boolean mask into an additive one in every layer. For a batch of 16 that is several
times the traffic of reading the cache itself. Here the query heads that share a key head are its rows, so
nothing is repeated, and the mask is additive from the start. On CUDA that is a kernel of our own, see
`kernels.decode_attention_triton`; PyTorch's serves what it does not fit.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from ..kernels.launcher import goes_straight

NAME = "hadacore_decode"
# What else attention may be asked for, and the kernel does not do.
_EXTRAS = ("position_bias", "softcap", "s_aux", "cache")


@cache
def _kernel() -> Any:
    """The module with the Triton kernel; None without Triton."""
    if find_spec("triton") is None:
        return None
    from ..kernels import decode_attention_triton

    return decode_attention_triton


def decode_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' "sdpa", with another way to the same for one masked token.

    Args:
        module: attention.
        query: ``[B, Hq, S, D]``.
        key, value: ``[B, Hkv, L, D]``.
        attention_mask: boolean or additive ``[B, 1, S, L]``, or None.
        dropout, scaling: as in `scaled_dot_product_attention`.
        kwargs: as for transformers' "sdpa".

    Returns:
        ``[B, S, Hq, D]``, and None for the weights.
    """
    if (
        goes_straight(query)
        and dropout == 0.0
        and (kernel := _kernel()) is not None
        and kernel.fits(query, key, value, attention_mask)
        and all(kwargs.get(name) is None for name in _EXTRAS)
    ):
        return kernel.decode_attention(query, key, value, attention_mask, scaling), None
    batch, heads, tokens, _ = query.shape
    key_heads = key.shape[1]
    if (
        tokens != 1
        or heads == key_heads
        or attention_mask is None
        or attention_mask.shape[1] != 1
        or kwargs.get("position_bias") is not None
    ):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    output = nn.functional.scaled_dot_product_attention(
        query.reshape(batch, key_heads, heads // key_heads, -1),
        key,
        value,
        attn_mask=attention_mask,
        dropout_p=dropout,
        scale=scaling,
    )
    return output.reshape(batch, 1, heads, -1), None


def decode_mask(
    *,
    kv_length: int,
    kv_offset: Any = 0,
    attention_mask: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    **kwargs: Any,
) -> torch.Tensor | None:
    """transformers' mask for "sdpa", additive.

    Args:
        kv_length, attention_mask, kwargs: as for transformers' `sdpa_mask`.
        kv_offset: as there, or an int64 tensor ``[]``.
        dtype: of the mask; that of the queries.

    Returns:
        ``[B, 1, S, L]``, 0 or -inf; None if attention needs no mask.
    """
    is_on_device = isinstance(kv_offset, torch.Tensor)
    # transformers would compare a tensor with the length of the padding mask, which waits for the device.
    padding = None if is_on_device else attention_mask
    mask = sdpa_mask(kv_length=kv_length, kv_offset=kv_offset, attention_mask=padding, **kwargs)
    if mask is None:
        return None
    if is_on_device and attention_mask is not None:
        columns = torch.arange(kv_length, device=attention_mask.device) + kv_offset
        mask = mask & attention_mask[:, None, None, columns]
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, float("-inf"))


@contextmanager
def decode_attention(config: PreTrainedConfig) -> Iterator[None]:
    """Let a model that uses "sdpa" use `decode_attention_forward` in this context.

    Args:
        config: the model's.
    """
    text_config: Any = config.get_text_config(decoder=True)
    if text_config._attn_implementation != "sdpa":
        yield
        return
    text_config._attn_implementation = NAME
    try:
        yield
    finally:
        text_config._attn_implementation = "sdpa"


AttentionInterface.register(NAME, decode_attention_forward)
AttentionMaskInterface.register(NAME, decode_mask)
