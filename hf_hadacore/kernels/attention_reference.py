"""What `attention_8bit` computes, in plain torch, and the order of tokens in its values."""

import math

import torch
import torch.nn.functional as F

# Tokens that share a scale where scales are per block; also what a kernel multiplies at a time.
BLOCK_SIZE = 128
# What the softmax's numerators, at most 1, are multiplied by before they become e4m3, which ends at 2^-9.
P_SCALE = 256.0
# Of values, whose order is another. 16 are what one instruction of the tensor cores reads of a row.
INTERLEAVED_TOKENS = 16
# fp32 numbers that the reference has of everything at a time, if a single query and sequence allow it.
_CHUNK = 1 << 24


def interleave_tokens(values: torch.Tensor) -> torch.Tensor:
    """Put the tokens of each 16 into the order of `attention_8bit`'s value: 8e + 2t + p goes to 4t + 2e + p.

    A thread of the tensor cores holds, of 16 columns of an fp32 result, 2t, 2t + 1, 2t + 8 and 2t + 9, and
    needs, of 16 columns of an 8-bit operand, four neighbors. In this order they are the same tokens.

    Args:
        values: ``[..., L]``, of any dtype.

    Returns:
        ``[..., L16]``, L rounded up to a multiple of 16, contiguous, zeros behind the last token.
    """
    room = -values.shape[-1] % INTERLEAVED_TOKENS
    if room:
        # Not every operation knows 8-bit floats.
        bytes_of = values if values.dtype != torch.float8_e4m3fn else values.view(torch.uint8)
        values = F.pad(bytes_of, (0, room)).view(values.dtype)
    return values.unflatten(-1, (-1, 2, 4, 2)).transpose(-3, -2).flatten(-4).contiguous()


def deinterleave_tokens(values: torch.Tensor, tokens: int) -> torch.Tensor:
    """The inverse of `interleave_tokens`.

    Args:
        values: ``[..., L16]``.
        tokens: L.

    Returns:
        ``[..., L]``.
    """
    return values.unflatten(-1, (-1, 4, 2, 2)).transpose(-3, -2).flatten(-4)[..., :tokens]


def attention_8bit_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_scale: torch.Tensor,
    key_scale: torch.Tensor,
    value_scale: torch.Tensor,
    scale: float,
    is_causal: bool,
    window: int,
    softcap: float,
    key_start: torch.Tensor | None,
    key_end: torch.Tensor | None,
    query_start: torch.Tensor | None,
    sinks: torch.Tensor | None,
    logit_offset: torch.Tensor | None,
    out_dtype: torch.dtype,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """The specification, in plain torch, some queries at a time. Nothing waits for the device.

    In powers of two, t = log2(e) logit: numerators are p = 2^(t - m) with m = max t, the denominator is their
    sum. p * 256 * r is rounded to e4m3, r being the value's scale relative to the largest in its block of 128
    keys: the weight of the largest logit, which may be nearly all there is, is exact. The rest is fp32. The
    kernels go through blocks of keys and know the maximum of those up to there; their P is rounded elsewhere.

    Args:
        query, key, value, query_scale, key_scale, value_scale, scale, is_causal, window, softcap, key_start,
            key_end, query_start, sinks, logit_offset, out_dtype, mask: as in `attention_8bit`.
    """
    batch, heads, tokens, d = query.shape
    key_heads, keys = key.shape[1], key.shape[2]
    group = heads // key_heads if key_heads else 1
    out = torch.zeros((batch, tokens, heads, d), dtype=out_dtype, device=query.device)
    if out.numel() == 0 or keys == 0:
        return out
    n = torch.arange(keys, device=query.device)
    first_key = _per_sequence(key_start, 0, query)
    last_key = _per_sequence(key_end, keys, query)
    position = _per_sequence(query_start, keys - tokens, query)
    is_there = (n >= first_key) & (n < last_key)  # [B, 1, 1, 1, L]
    # What is not there may be anything.
    value_scale = torch.where(is_there[:, :, 0, 0], _per_token(value_scale, keys), 0)
    largest = _largest_of_blocks(value_scale)
    key_scale = _per_token(key_scale, keys)
    queries = query.unflatten(1, (key_heads, group))
    query_scale = query_scale.unflatten(1, (key_heads, group)) * scale
    if logit_offset is not None:
        logit_offset = logit_offset.unflatten(1, (key_heads, group))
    if mask is not None:
        mask = mask.expand(batch, heads, tokens, keys).unflatten(1, (key_heads, group))
    if sinks is not None:
        sinks = (sinks * math.log2(math.e)).view(key_heads, group, 1, 1)

    rows = min(tokens, max(1, _CHUNK // (heads * keys)))
    sequences = max(1, _CHUNK // ((heads * rows + 2 * key_heads * d) * keys))
    for first in range(0, batch, sequences):
        part = slice(first, first + sequences)
        # Integers up to 127 and e4m3 are exact in whatever fp32 products are allowed to be computed in.
        k = key[part].float().mT  # [B, Hkv, D, L]
        v = deinterleave_tokens(value[part], keys).float()
        v = v.mul_(largest[part, :, None]).masked_fill_(~is_there[part, :, 0], 0).mT  # [B, Hkv, L, D]
        ratio = (value_scale[part] / largest[part] * P_SCALE)[:, :, None, None]
        for start in range(0, tokens, rows):
            i = slice(start, start + rows)
            # [B, Hkv, G * rows, D] @ [B, Hkv, D, L] -> [B, Hkv, G, rows, L]
            t = (queries[part, :, :, i].flatten(2, 3).float() @ k).unflatten(2, (group, -1))
            t *= query_scale[part, :, :, i, None]
            t *= key_scale[part, :, None, None]
            if logit_offset is not None:
                t += logit_offset[part, :, :, i, None]
            if softcap:
                t = t.div_(softcap).tanh_().mul_(softcap)
            seen = is_there[part]
            stands = position[part] + torch.arange(tokens, device=query.device)[i, None]
            if is_causal:
                seen = seen & (n <= stands)
            if window:
                seen = seen & (n > stands - window)
            if mask is not None and mask.dtype == torch.bool:
                seen = seen & mask[part, :, :, i]
            elif mask is not None:
                t += mask[part, :, :, i]
            t *= math.log2(math.e)
            t.masked_fill_(~seen, -math.inf)
            m = t.amax(-1, keepdim=True)
            m.masked_fill_(m == -math.inf, 0)
            p = t.sub_(m).exp2_()
            denominator = p.sum(-1, keepdim=True)
            if sinks is not None:
                denominator += (sinks - m).exp2()
            # Only where nothing is seen.
            denominator.masked_fill_(denominator == 0, 1)
            p = p.mul_(ratio).to(torch.float8_e4m3fn).float()
            # [B, Hkv, G * rows, L] @ [B, Hkv, L, D] -> [B, Hkv, G, rows, D]
            o = (p.flatten(2, 3) @ v).unflatten(2, (group, -1)) / (denominator * P_SCALE)
            out[part, i] = o.flatten(1, 2).transpose(1, 2).to(out_dtype)
    return out


def _per_sequence(tensor: torch.Tensor | None, default: int, query: torch.Tensor) -> torch.Tensor:
    """``[B, 1, 1, 1, 1]``."""
    if tensor is None:
        return torch.full((query.shape[0], 1, 1, 1, 1), default, device=query.device)
    return tensor.view(-1, 1, 1, 1, 1)


def _per_token(scale: torch.Tensor, keys: int) -> torch.Tensor:
    return scale if scale.shape[2] == keys else scale.repeat_interleave(BLOCK_SIZE, 2)[..., :keys]


def _largest_of_blocks(scale: torch.Tensor) -> torch.Tensor:
    """For each token the largest scale of its block; not zero."""
    keys = scale.shape[2]
    blocks = F.pad(scale, (0, -keys % BLOCK_SIZE)).unflatten(2, (-1, BLOCK_SIZE)).amax(-1)
    return _per_token(blocks, keys).clamp(min=torch.finfo(torch.float32).tiny)
