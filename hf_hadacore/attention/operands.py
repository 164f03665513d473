"""What 8-bit attention reads, made of queries, keys and values: with a cache and without."""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..hadamard_matrices import has_hadamard_matrix
from ..kernels.attention import attention_8bit
from ..kernels.attention_reference import BLOCK_SIZE
from ..kernels.key_mean import key_mean
from ..kernels.rotate_quantize import rotate_quantize

# What queries and keys become in each mode; values are e4m3.
MODES = {"fp8": torch.float8_e4m3fn, "int8-fp8": torch.int8}
# Their `attn_implementation`.
ATTENTION_NAMES = {"fp8": "hadacore", "int8-fp8": "hadacore-int8-fp8"}
VALUE_DTYPE = torch.float8_e4m3fn
# Those of the kernels.
HEAD_DIMS = (64, 80, 96, 112, 128, 192, 256)


class QuantizedKeyValue(NamedTuple):
    """Keys and values as `kernels.attention` reads them.

    Attributes:
        key: 8-bit ``[B, Hkv, L, D]``, rotated.
        value: e4m3 ``[B, Hkv, D, L16]``.
        key_scale, value_scale: fp32 ``[B, Hkv, L]`` or ``[B, Hkv, ceil(L/128)]``.
        constant: fp32 ``[B or 1, Hkv, D]``, subtracted from keys; None if nothing was.
        query_start: int32 ``[B]``, which key the first query is; None if the last query is the last key.
        query: of what has been quantized with its keys, 8-bit ``[B, Hq, S, D]`` and fp32 ``[B, Hq, S]``.
    """

    key: torch.Tensor
    value: torch.Tensor
    key_scale: torch.Tensor
    value_scale: torch.Tensor
    constant: torch.Tensor | None
    query_start: torch.Tensor | None = None
    query: tuple[torch.Tensor, torch.Tensor] | None = None


def padded_size(d: int, rotate: bool = True) -> int:
    """The head size to compute with: a kernel's, or one that has a Hadamard matrix.

    Args:
        d: the larger of those of keys and of values.
        rotate: whether there is a rotation.
    """
    for size in HEAD_DIMS:
        if d <= size:
            return size
    size = d + d % 2
    while rotate and not has_hadamard_matrix(size):
        size += 2
    return size


def pad_heads(x: torch.Tensor, size: int) -> torch.Tensor:
    """Fill heads up with zeros, which neither products nor rotations see.

    Args:
        x: ``[..., D]``.
        size: D after it.
    """
    return x if x.shape[-1] == size else F.pad(x, (0, size - x.shape[-1]))


def mean_key(key: torch.Tensor, is_token: torch.Tensor | None) -> torch.Tensor:
    """The mean of each sequence's keys, fp32 ``[B, Hkv, D]``.

    Args:
        key: ``[B, Hkv, L, D]``.
        is_token: boolean ``[B or 1, L]``, False for padding; None if there is none.
    """
    return key_mean(key, is_token)


def quantize_key_value(
    key: torch.Tensor,
    value: torch.Tensor,
    constant: torch.Tensor | None,
    dtype: torch.dtype,
    *,
    rotate: bool = True,
) -> QuantizedKeyValue:
    """Rotate and quantize the keys and values of whole sequences, with a scale for 128 tokens.

    Args:
        key, value: fp16, bf16 or fp32 ``[B, Hkv, L, D]``.
        constant: fp32 ``[B or 1, Hkv, D]``, subtracted from keys.
        dtype: of keys, one of `MODES`.
        rotate: False leaves out the rotation.
    """
    keys, key_scale = rotate_quantize(
        key, dtype=dtype, scale="block", block_size=BLOCK_SIZE, rotate=rotate, offset=constant
    )
    values, value_scale = rotate_quantize(
        value,
        dtype=VALUE_DTYPE,
        scale="block",
        block_size=BLOCK_SIZE,
        rotate=False,
        transpose=True,
        interleave=True,
        power_of_2=True,
    )
    return QuantizedKeyValue(keys, values, key_scale, value_scale, constant)


def attend(
    query: torch.Tensor,
    stored: QuantizedKeyValue,
    *,
    scale: float,
    is_causal: bool,
    window: int | None,
    softcap: float | None,
    key_start: torch.Tensor | None,
    key_end: torch.Tensor | None,
    sinks: torch.Tensor | None,
    mask: torch.Tensor | None,
    rotate: bool = True,
) -> torch.Tensor:
    """Rotate and quantize queries, where that was not done with their keys, and let them read.

    Args:
        query: fp16, bf16 or fp32 ``[B, Hq, S, D]``; D up to that of keys.
        stored: keys and values.
        scale, is_causal, key_start, key_end, mask: as in `attention_8bit`.
        window, softcap: as there; None for none.
        sinks: floating point ``[Hq]``.
        rotate: False if keys are not rotated.

    Returns:
        ``[B, S, Hq, D of values]`` in the dtype of query.
    """
    logit_offset = None
    if stored.constant is not None and (softcap or sinks is not None):
        # What the constant took away matters where logits are not only compared with each other.
        grouped = query.unflatten(1, (stored.key.shape[1], -1)).float()
        constant = stored.constant[..., : query.shape[3]].expand(query.shape[0], -1, -1)
        logit_offset = scale * torch.einsum("bhgsd,bhd->bhgs", grouped, constant)
        logit_offset = logit_offset.flatten(1, 2).contiguous()
    values, query_scale = stored.query or rotate_quantize(
        pad_heads(query, stored.key.shape[3]), dtype=stored.key.dtype, rotate=rotate
    )
    output = attention_8bit(
        values,
        stored.key,
        stored.value,
        query_scale,
        stored.key_scale,
        stored.value_scale,
        scale=scale,
        is_causal=is_causal,
        window=window or 0,
        softcap=softcap or 0.0,
        key_start=key_start,
        key_end=key_end,
        query_start=stored.query_start,
        sinks=None if sinks is None else sinks.float(),
        logit_offset=logit_offset,
        mask=mask,
        out_dtype=torch.float16 if query.dtype == torch.float16 else torch.bfloat16,
    )
    return output.to(query.dtype)
