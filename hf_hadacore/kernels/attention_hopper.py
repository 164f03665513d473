"""Where the Hopper kernel of 8-bit attention fits, and how it is launched."""

import math
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch

from .launcher import capability, run
from .w4a16_launch import processors_of

HEAD_DIMS = (64, 128)
# Fewer queries leave most rows of a tile empty.
MIN_QUERIES = 33
_LOG2_E = math.log2(math.e)
# Blocks of keys and values on their way or in use, which fill most of the shared memory.
SLOTS = {64: 6, 128: 4}


@cache
def _is_hopper(index: int) -> bool:
    return find_spec("triton.experimental.gluon") is not None and capability(index) == (9, 0)


def fits(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, scale: float, **options: Any
) -> bool:
    """Whether `launch` can do it.

    Args:
        query, key, value, scale, options: as in `attention.attention_8bit`, checked.
    """
    return (
        query.is_cuda
        and _is_hopper(query.get_device())
        and query.shape[3] in HEAD_DIMS
        and query.shape[2] >= MIN_QUERIES
        and key.shape[2] > 0
        # The maximum of a row is found before it is scaled.
        and 0.0 < scale < math.inf
    )


def choose_warpgroups(d: int, keys: int, is_plain: bool) -> int:
    """Into how many warpgroups of 64 queries a tile is cut.

    Three share what is loaded, but have few registers each: only for many keys they are faster than two.

    Args:
        d: of a head.
        keys: of a sequence.
        is_plain: whether keys have a scale per block and logits no softcap.
    """
    return 3 if d == 64 and keys >= 8192 and is_plain else 2


def launch(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_scale: torch.Tensor,
    key_scale: torch.Tensor,
    value_scale: torch.Tensor,
    out: torch.Tensor,
    *,
    scale: float,
    is_causal: bool,
    window: int,
    softcap: float,
    key_start: torch.Tensor | None,
    key_end: torch.Tensor | None,
    query_start: torch.Tensor | None,
    sinks: torch.Tensor | None,
    logit_offset: torch.Tensor | None,
    warpgroups: int | None = None,
    slots: int | None = None,
) -> None:
    """Run the kernel on the current device.

    Args:
        query, key, value, query_scale, key_scale, value_scale: as in `attention.attention_8bit`, contiguous,
            not empty.
        out: ``[B, Sq, Hq, D]``, contiguous, fp16 or bf16; every element is written.
        scale, is_causal, window, softcap, key_start, key_end, query_start, sinks, logit_offset: as there.
        warpgroups: 2 or 3 of 64 queries a tile, if not as usual.
        slots: blocks of keys and values in shared memory, if not as usual.
    """
    from .attention_prefill import attention_kernel
    from .attention_softmax import BLOCK_N, ROWS

    batch, heads, queries, d = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    is_per_token = key_scale.shape[2] == keys
    if warpgroups is None:
        warpgroups = choose_warpgroups(d, keys, not is_per_token and softcap == 0.0)
    query_tiles = -(-queries // (warpgroups * ROWS.value))
    tiles = query_tiles * batch * heads
    run(
        attention_kernel,
        (
            query_scale,
            key_scale,
            value_scale,
            key_start,
            key_end,
            query_start,
            sinks,
            logit_offset,
            out,
        ),
        (
            tiles,
            query_tiles,
            queries,
            keys,
            key_scale.shape[2],
            window,
            heads,
            kv_heads,
            batch,
            scale * _LOG2_E,
            softcap * _LOG2_E,
        ),
        (
            d,
            warpgroups,
            SLOTS[d] if slots is None else slots,
            (is_causal, is_per_token, softcap > 0.0, query.dtype == torch.int8),
        ),
        (min(tiles, processors_of(query.get_device())), 1, 1),
        num_warps=4,
        descriptors=(
            _describe(query.view(-1, d), ROWS.value, d),
            _describe(key.view(-1, d), BLOCK_N.value, d),
            _describe(value.view(-1, value.shape[3]), d, BLOCK_N.value),
        ),
    )


def _describe(rows: torch.Tensor, height: int, width: int) -> Any:
    """The TMA descriptor of a matrix of bytes that is read in blocks of height by width."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    return TensorDescriptor(rows, list(rows.shape), list(rows.stride()), [height, width], _layout(width))


@cache
def _layout(width: int) -> Any:
    from triton.experimental.gluon import language as gl

    return gl.NVMMASharedLayout(width, 8, 2)
