"""8-bit attention for transformers: `attn_implementation="hadacore"` and "hadacore-int8-fp8".

Plain masks (causal, sliding windows, padding on either side) never become a tensor of queries by keys: they
stay the interval of keys that each sequence has. All others are boolean masks for the reference path.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface
from transformers.masking_utils import (
    AttentionMaskInterface,
    and_masks,
    causal_mask_function,
    sdpa_mask,
    sliding_window_overlay,
)
from transformers.utils import logging
from transformers.utils.import_utils import is_tracing

from ..errors import UnsupportedError
from .key_means import stored_key_mean
from .new_tokens import NewTokens
from .operands import (
    ATTENTION_NAMES,
    MODES,
    QuantizedKeyValue,
    attend,
    mean_key,
    pad_heads,
    padded_size,
    quantize_key_value,
)

logger = logging.get_logger(__name__)

# Functions that are made anew for each mask share their code.
_AND_CODE = and_masks(causal_mask_function).__code__
_WINDOW_CODE = sliding_window_overlay(1).__code__


class Intervals(NamedTuple):
    """The keys that each sequence has, read from an `interval_mask`.

    Attributes:
        start, end: int32 ``[B]``; None for the first key and behind the last.
        window: keys that a query sees, its own included; 0 for all.
    """

    start: torch.Tensor | None = None
    end: torch.Tensor | None = None
    window: int = 0


def interval_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: Any = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> torch.Tensor | None:
    """transformers' mask function for 8-bit attention.

    Args:
        batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, device, kwargs:
            as for transformers' `sdpa_mask`. A tensor for `kv_offset` comes from an 8-bit cache in decoding,
            whose masks `DecodeGraphs` has checked for gaps.

    Returns:
        None for a causal mask without more. Intervals of keys: int32 ``[2, 1, W, B]``, their starts and ends
        (in decoding ``[1, 1, W, B]``, only starts), counted from `kv_offset`; W is the window, 1 if there is
        none. For any other mask what `sdpa_mask` gives, boolean ``[B, 1, S, L]``.
    """
    window = plain_window(mask_function)
    if window is not None and isinstance(kv_offset, torch.Tensor):
        return _decoding_mask(attention_mask, kv_offset, window)
    # Static caches have more keys than there are tokens.
    is_aligned = not isinstance(q_offset, torch.Tensor) and q_offset + q_length == kv_offset + kv_length
    if window is not None and is_aligned and not (attention_mask is not None and is_tracing(attention_mask)):
        intervals, is_padded, has_gaps = None, False, False
        if attention_mask is not None:
            seen = attention_mask[:, kv_offset : kv_offset + kv_length]
            intervals, is_padded, has_gaps = find_intervals(F.pad(seen, (0, kv_length - seen.shape[1])))
        window = window if window < kv_length else 0
        if not (window or is_padded):
            return None
        if intervals is None:
            intervals = torch.zeros(1, batch_size, dtype=torch.int32, device=device)
        if not has_gaps:
            return _as_mask(intervals, window)
    return sdpa_mask(
        batch_size,
        q_length,
        kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        device=device,
        **{**kwargs, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False},
    )


def plain_window(mask_function: Any) -> int | None:
    """The window of a mask function of transformers that is causal and nothing else.

    Args:
        mask_function: as `interval_mask` gets it.

    Returns:
        0 if there is no window; None for any other function.
    """
    if mask_function is causal_mask_function:
        return 0
    if getattr(mask_function, "__code__", None) is not _AND_CODE:
        return None
    overlay, *others = _closure(mask_function)["mask_functions"]
    if getattr(overlay, "__code__", None) is not _WINDOW_CODE or others != [causal_mask_function]:
        return None
    # A window of one key could not be told from none in what `interval_mask` returns.
    window = _closure(overlay)["sliding_window"]
    return window if window > 1 else None


def _closure(function: Any) -> dict[str, Any]:
    cells = [cell.cell_contents for cell in function.__closure__]
    return dict(zip(function.__code__.co_freevars, cells, strict=True))


def find_intervals(seen: torch.Tensor) -> tuple[torch.Tensor, bool, bool]:
    """Where the tokens of each sequence are; waits for the device.

    Args:
        seen: boolean ``[B, L]``, False for padding.

    Returns:
        int32 ``[2, B]``, the first and what is behind the last; whether there is padding, and whether some
        is between tokens.
    """
    n = torch.arange(seen.shape[1], device=seen.device).expand(seen.shape)
    end = (n + 1).masked_fill(~seen, 0).amax(1)
    start = n.masked_fill(~seen, seen.shape[1]).amin(1).minimum(end)
    is_padded, has_gaps = torch.stack([~seen.all(), (end - start != seen.sum(1)).any()]).tolist()
    return torch.stack([start, end]).to(torch.int32), is_padded, has_gaps


def _decoding_mask(
    attention_mask: torch.Tensor | None, kv_offset: torch.Tensor, window: int
) -> torch.Tensor | None:
    """Nothing waits for the device."""
    if attention_mask is None:
        return None
    n = torch.arange(attention_mask.shape[1], device=attention_mask.device).expand(attention_mask.shape)
    start = n.masked_fill(~attention_mask, attention_mask.shape[1]).amin(1)
    return _as_mask((start - kv_offset).clamp(min=0).to(torch.int32)[None], window)


def _as_mask(intervals: torch.Tensor, window: int) -> torch.Tensor:
    return intervals[:, None, None].expand(-1, 1, max(window, 1), -1)


def _read_intervals(mask: torch.Tensor) -> Intervals:
    window = mask.shape[2] if mask.shape[2] > 1 else 0
    return Intervals(mask[0, 0, 0], mask[1, 0, 0] if len(mask) == 2 else None, window)


def _is_token(attention_mask: torch.Tensor | None, tokens: int) -> torch.Tensor | None:
    """Which of the first tokens of a cache are no padding, ``[B or 1, tokens]``."""
    if attention_mask is None:
        return None
    if attention_mask.dtype == torch.int32:
        start, end, _ = _read_intervals(attention_mask)
        assert start is not None
        n = torch.arange(tokens, device=start.device)
        seen = n >= start[:, None]
        return seen if end is None else seen & (n < end[:, None])
    seen = attention_mask
    if seen.dtype != torch.bool:
        seen = seen > torch.finfo(seen.dtype).min
    return seen.flatten(1, 2).any(1)


def attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: Any,
    value: Any,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    cache: Any = None,
    *,
    mode: str,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """8-bit attention in the form in which transformers' models call it.

    Args:
        module: attention.
        query: fp16, bf16 or fp32 ``[B, Hq, S, D]``, rotary embeddings applied.
        key, value: of all tokens, ``[B, Hkv, L, D]``; or both what an 8-bit cache has made of the new ones.
        attention_mask: as `interval_mask` makes it; or any boolean or additive mask ``[B, 1 or Hq, S, L]``,
            which then says it all.
        dropout: 0.
        scaling: of the logits; D^-0.5 by default.
        is_causal: the module's own by default.
        sliding_window: keys that a query sees, its own included.
        softcap: logits become softcap * tanh(logit / softcap).
        s_aux: ``[Hq]``, attention sinks.
        position_bias: ``[B or 1, Hq, S, L]``, added to the logits.
        cache: of continuous batching, which is not supported.
        mode: "fp8" or "int8-fp8".
        kwargs: not used.

    Returns:
        ``[B, S, Hq, D]`` in the dtype of query, and None for the weights.

    Raises:
        UnsupportedError: dropout is not 0, or there is a paged cache.
    """
    if dropout:
        raise UnsupportedError(
            f"8-bit attention has no dropout (and no gradient), got {dropout}; use attn_implementation='sdpa'"
        )
    if cache is not None:
        raise UnsupportedError(
            "8-bit attention does not read paged caches; use attn_implementation='sdpa' for generate_batch"
        )
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    stored = _stored(module, query, key, value, attention_mask, is_causal, mode)
    intervals, mask = Intervals(), attention_mask
    if mask is not None and mask.dtype == torch.int32:
        intervals, mask = _read_intervals(mask), None
    end = intervals.end
    if mask is not None:
        # It says it all. Buffers have room behind the last token.
        is_causal, sliding_window = False, None
        hidden = False if mask.dtype == torch.bool else -torch.inf
        mask = F.pad(mask, (0, stored.key.shape[2] - mask.shape[3]), value=hidden)
    elif stored.query_start is not None and not is_causal:
        end = stored.query_start + query.shape[2]
    if position_bias is not None:
        mask = position_bias if mask is None else _added(position_bias, mask)
    output = attend(
        query,
        stored,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        is_causal=is_causal,
        window=sliding_window or intervals.window,
        softcap=softcap,
        key_start=intervals.start,
        key_end=end,
        sinks=s_aux,
        mask=mask,
    )
    return output[..., : value.value_dim if isinstance(value, NewTokens) else value.shape[-1]], None


def _stored(
    module: nn.Module,
    query: torch.Tensor,
    key: Any,
    value: Any,
    attention_mask: torch.Tensor | None,
    is_causal: bool,
    mode: str,
) -> QuantizedKeyValue:
    """What attention reads of the arguments of `attention_forward`."""
    constant = is_token = None
    # Later tokens have the constant of the first; every kernel here would be one more in each decoding step.
    if not isinstance(key, NewTokens) or key.are_first:
        constant = stored_key_mean(module, key.shape)
        is_token = _is_token(attention_mask, key.shape[2]) if constant is None else None
    if isinstance(key, NewTokens):
        return key.store(query, is_token, constant)
    if is_causal and key.shape[2] > query.shape[2]:
        logger.warning_once(
            f"HadaCore: {ATTENTION_NAMES[mode]!r} attention with a cache that is not 8-bit quantizes all "
            "keys and values again at every step; HadaCoreCache(model.config) keeps them so"
        )
    size = padded_size(max(key.shape[-1], value.shape[-1]))
    key, value = pad_heads(key, size), pad_heads(value, size)
    constant = mean_key(key, is_token) if constant is None else pad_heads(constant, size)
    return quantize_key_value(key, value, constant, MODES[mode])


def _added(position_bias: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    if mask.dtype == torch.bool:
        return position_bias.masked_fill(~mask, -torch.inf)
    return position_bias + mask


for _mode, _name in ATTENTION_NAMES.items():
    AttentionInterface.register(_name, partial(attention_forward, mode=_mode))
    AttentionMaskInterface.register(_name, interval_mask)
