"""Problems for the kernels of 8-bit attention; what no query may see is filled with what would show."""

from typing import Any, NamedTuple

import torch

from hf_hadacore.kernels.attention_reference import attention_8bit_reference, interleave_tokens

E4M3 = torch.float8_e4m3fn


class Problem(NamedTuple):
    """Arguments of `attention_8bit`.

    Attributes:
        tensors: query, key, value, query_scale, key_scale, value_scale.
        options: the keyword arguments but out_dtype.
    """

    tensors: tuple[torch.Tensor, ...]
    options: dict[str, Any]

    def expected(self) -> torch.Tensor:
        """The reference's result, before it is rounded to 16 bits."""
        return attention_8bit_reference(*self.tensors, *self.options.values(), torch.float32)

    def empty(self, dtype: torch.dtype) -> torch.Tensor:
        """A result to be written."""
        query = self.tensors[0]
        batch, heads, tokens, d = query.shape
        return torch.full((batch, tokens, heads, d), torch.nan, dtype=dtype, device=query.device)


def make_problem(
    batch: int,
    heads: int,
    key_heads: int,
    tokens: int,
    keys: int,
    d: int,
    *,
    dtype: torch.dtype = E4M3,
    is_causal: bool = True,
    per_token: bool = False,
    window: int = 0,
    softcap: float = 0.0,
    ragged: bool = False,
    has_sinks: bool = False,
    has_offset: bool = False,
    device: str = "cpu",
    seed: int = 0,
) -> Problem:
    """A random problem.

    Args:
        batch, heads, key_heads, tokens, keys, d: sizes B, Hq, Hkv, Sq, L, D.
        dtype: of queries and keys.
        is_causal, window, softcap: as in `attention_8bit`.
        per_token: whether every token has its scales, instead of 128.
        ragged: whether key_start, key_end and query_start are given, different for each sequence; of several
            sequences the last then has a query that stands before its first key.
        has_sinks, has_offset: whether sinks and logit_offset are given.
        device: of the tensors.
        seed: of the numbers.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    def quantized(x: torch.Tensor) -> torch.Tensor:
        return (x * 30).round().clamp(-127, 127).to(dtype)

    scales = keys if per_token else -(-keys // 128)
    query = quantized(normal(batch, heads, tokens, d))
    key = quantized(normal(batch, key_heads, keys, d))
    # Values with a mean, so that what is lost of long sums shows.
    values = normal(batch, key_heads, d, keys) + 0.5
    query_scale = 0.03 * torch.exp(0.2 * normal(batch, heads, tokens))
    key_scale = 0.03 * torch.exp(0.2 * normal(batch, key_heads, scales))
    value_scale = torch.exp2(torch.randint(-4, 0, (batch, key_heads, scales), generator=generator))
    start = torch.zeros(batch, dtype=torch.int32)
    end = torch.full((batch,), keys, dtype=torch.int32)
    position = torch.full((batch,), keys - tokens, dtype=torch.int32)
    if ragged:
        row = torch.arange(batch, dtype=torch.int32)
        start = (row + 1) * keys // (4 * batch)
        end = keys - row * keys // (3 * batch)
        position = end - tokens
        if batch > 1:
            position[-1] = start[-1] - 1
    n = torch.arange(keys)
    is_hidden = (n < start[:, None]) | (n >= end[:, None])
    key = key.view(torch.uint8).masked_fill(is_hidden[:, None, :, None], 0x7F).view(dtype)
    if per_token:
        key_scale.masked_fill_(is_hidden[:, None], torch.nan)
        value_scale.masked_fill_(is_hidden[:, None], torch.nan)
    has = dict(generator=generator)
    options = dict(
        scale=d**-0.5,
        is_causal=is_causal,
        window=window,
        softcap=softcap,
        key_start=start if ragged else None,
        key_end=end if ragged else None,
        query_start=position if ragged else None,
        sinks=torch.randn(heads, **has) if has_sinks else None,
        logit_offset=torch.randn(batch, heads, tokens, **has) if has_offset else None,
    )
    tensors = (query, key, interleave_tokens((values * 100).to(E4M3)), query_scale, key_scale, value_scale)
    on_device = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    return Problem(tuple(x.to(device) for x in tensors), on_device)
