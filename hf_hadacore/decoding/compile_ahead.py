"""Compiling the kernels of a model when it is loaded, so that its first calls do not have to.

What those calls will launch is launched here with meta tensors, which compiles it and nothing else, all at
the same time, in threads. A kernel that is missed is compiled when it is called.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..attention.decode_cache import bucket
from ..attention.kv_cache import attention_mode
from ..attention.operands import MODES, VALUE_DTYPE, padded_size
from ..fusion.forwards import FusedAttention, FusedMlp, FusedNorm
from ..fusion.probes import NormFormula
from ..kernels import w4a16_experts
from ..kernels.launcher import on_device
from ..kernels.w4a16_launch import Product, compile_product, processors_of
from ..modules.experts import HadaCoreExperts
from ..modules.linear import HadaCoreLinear
from ..modules.linear_group import products_of

_DTYPES = (torch.float16, torch.bfloat16)
# Sizes that the cache of a first call may have: attention is split among more programs the longer it is, up
# to about here.
_CACHE_SIZES = tuple(dict.fromkeys(bucket(length) for length in (1, 512, 768, 1024)))

Job = tuple[Callable[..., None], tuple[Any, ...]]


def compile_ahead(
    model: PreTrainedModel, joined: Sequence[Sequence[nn.Module]], tokens: Sequence[int]
) -> None:
    """Compile what a model's int4 layers and fused modules will need in `generate`.

    Args:
        model: loaded and fused; what is not on a GPU needs nothing.
        joined: layers that will be called by `forward_together`; their weights are joined now.
        tokens: numbers of tokens of the calls; with 1, those of decoding.
    """
    jobs: dict[torch.device, dict[Job, None]] = {}
    for device, job in _jobs(model, joined, tokens):
        if _has_kernels(device):
            jobs.setdefault(device, {})[job] = None
    for device, of_device in jobs.items():
        import triton

        with on_device(device), ThreadPoolExecutor() as pool, triton.AsyncCompileMode(pool):
            for launch, arguments in of_device:
                launch(*arguments)


def _has_kernels(device: torch.device) -> bool:
    return device.type == "cuda"


def _jobs(
    model: PreTrainedModel, joined: Sequence[Sequence[nn.Module]], tokens: Sequence[int]
) -> Iterator[tuple[torch.device, Job]]:
    for device, product in products_of(model, joined):
        yield from ((device, (compile_product, (product, m, device))) for m in tokens)
    config: Any = model.config
    config = config.get_text_config(decoder=True)
    dtype = model.dtype
    norms_of_heads = {
        norm
        for module in model.modules()
        if isinstance(module, FusedAttention) and module.formula.norm is not None
        for norm in (module.q_norm, module.k_norm)
    }
    for module in model.modules():
        if isinstance(module, HadaCoreExperts):
            yield from _of_experts(module, getattr(config, "num_experts_per_tok", None), tokens)
        elif isinstance(module, FusedNorm) and module not in norms_of_heads and module.weight.dtype == dtype:
            size = module.weight.shape[0]
            for m in tokens:
                for has_sum in (False, True):
                    yield module.weight.device, (_norm, (size, dtype, module.formula, m, has_sum))
        elif isinstance(module, FusedMlp):
            first = getattr(module, module.formula.projections[0])
            size = first.weight.shape[0] // (1 if len(module.formula.projections) == 2 else 2)
            for m in tokens:
                arguments = (size, first.weight_scale.dtype, module.formula.activation, m)
                yield first.weight.device, (_activation, arguments)
        elif isinstance(module, FusedAttention):
            yield from _of_attention(module, config, tokens)


def _of_experts(
    module: HadaCoreExperts, choices: int | None, tokens: Sequence[int]
) -> Iterator[tuple[torch.device, Job]]:
    dtype = module._group_values("down_proj")[0].dtype
    if not module._is_tiled or choices is None or dtype not in _DTYPES:
        return
    for name in module.projections:
        experts, n, words = module.get_parameter(name).shape
        has_zero = module._parameters[f"{name}_zero"] is not None
        product = Product(n, words * 8, module.group_size, dtype, has_zero, module.has_bias)
        device = module.get_parameter(name).device
        for m in tokens:
            rows = m * choices if name == "down_proj" else m
            yield device, (w4a16_experts.compile_products, (product, experts, rows, m * choices, device))


def _of_attention(
    module: FusedAttention, config: Any, tokens: Sequence[int]
) -> Iterator[tuple[torch.device, Job]]:
    q, k = module.get_submodule("q_proj"), module.get_submodule("k_proj")
    assert isinstance(q, HadaCoreLinear) and isinstance(k, HadaCoreLinear)
    device, dtype = q.weight.device, q.weight_scale.dtype
    # The rows of the weights: of a rank's own heads under tensor parallelism.
    heads = (len(q.weight) // module.head_dim, len(k.weight) // module.head_dim)
    shape = (*heads, module.head_dim, dtype)
    mode = attention_mode(config)
    for m in tokens:
        if m == 1 and mode is None:
            yield device, (_rope, (*shape, module.formula.norm, m, _CACHE_SIZES[0]))
        else:
            # Whether the number of tokens is a multiple of 16 makes another kernel.
            sizes = (m, m - 1) if m > 1 else (m,)
            yield from ((device, (_rope, (*shape, module.formula.norm, n, None))) for n in sizes)
    if 1 not in tokens or dtype not in _DTYPES:
        return
    if config._attn_implementation == "sdpa":
        yield from ((device, (_decode_attention, (*shape, size, device))) for size in _CACHE_SIZES)
    elif mode is not None:
        has_window = bool(getattr(module, "sliding_window", None))
        for size in _CACHE_SIZES:
            yield device, (_quantized_attention, (*shape, size, device, MODES[mode], has_window))


_meta = partial(torch.empty, device="meta")


def _norm(size: int, dtype: torch.dtype, formula: NormFormula, m: int, has_sum: bool) -> None:
    from ..kernels import rms_norm_triton

    x, residual, out, total = (_meta(1, m, size, dtype=dtype) for _ in range(4))
    if size <= rms_norm_triton.MAX_SIZE:
        weight = _meta(size, dtype=dtype)
        added = (residual, total) if has_sum else (None, None)
        rms_norm_triton.launch(x, added[0], weight, *formula, out, added[1])


def _activation(size: int, dtype: torch.dtype, activation: str, m: int) -> None:
    from ..kernels import gated_activation_triton

    gate, up = _meta(1, m, 2 * size, dtype=dtype).chunk(2, dim=-1)
    gated_activation_triton.launch(gate, up, activation == "gelu_tanh", _meta(1, m, size, dtype=dtype))


def _rope(
    heads: int,
    key_heads: int,
    d: int,
    dtype: torch.dtype,
    norm: NormFormula | None,
    m: int,
    cache_size: int | None,
) -> None:
    from ..kernels import rope_triton

    joined = _meta(1, m, (heads + 2 * key_heads) * d, dtype=dtype)
    sizes = [heads * d, key_heads * d, key_heads * d]
    q, k, v = (part.view(1, m, -1, d) for part in joined.split(sizes, dim=-1))
    weight = None if norm is None else _meta(d, dtype=dtype)
    formula = (0.0, 0.0, True) if norm is None else norm
    cos = _meta(1, m, d, dtype=dtype)
    q_out = _meta(1, m, heads, d, dtype=dtype)
    keys = _meta(1, key_heads, cache_size or m, d, dtype=dtype)
    cache: tuple[Any, ...] = (keys, None, None)
    if cache_size is not None:
        cache = (keys, keys, _meta(1, dtype=torch.int64))
    values = None if cache_size is None else v
    rope_triton.launch(q, k, values, cos, cos, weight, weight, *formula, q_out, *cache)


def _decode_attention(
    heads: int, key_heads: int, d: int, dtype: torch.dtype, size: int, device: torch.device
) -> None:
    from ..kernels.decode_attention_triton import HEAD_DIMS, choose_splits, launch
    from ..kernels.launcher import has_pdl

    if d not in HEAD_DIMS or heads > 16 * key_heads:
        return
    query = _meta(1, 1, heads, d, dtype=dtype).transpose(1, 2)
    keys, mask = _meta(1, key_heads, size, d, dtype=dtype), _meta(1, 1, 1, size, dtype=dtype)
    splits = choose_splits(key_heads, size, processors_of(device.index or 0))
    out = _meta(1, 1, heads, d, dtype=dtype)
    arrived = _meta(key_heads, dtype=torch.int32) if splits > 1 else out
    launch(query, keys, keys, mask, None, out, arrived, splits, has_pdl(device))


def _quantized_attention(
    heads: int,
    key_heads: int,
    d: int,
    dtype: torch.dtype,
    size: int,
    device: torch.device,
    key_dtype: torch.dtype,
    has_window: bool,
) -> None:
    """A step of 8-bit attention without softcap and sinks, with masks as `generate` makes them."""
    from ..kernels import attention_triton, quantize_step_triton
    from ..kernels.attention_schedules import choose
    from ..kernels.rotate_quantize import SMALLEST_MAXIMUM
    from ..kernels.rotate_quantize_checks import LARGEST

    d, index = padded_size(d), device.index or 0
    capability = attention_triton.capability(index)
    if d not in attention_triton.HEAD_DIMS or capability < (8, 9):
        return
    q, k = (_meta(1, 1, n, d, dtype=dtype).transpose(1, 2) for n in (heads, key_heads))
    query, query_scale = _meta(1, heads, 1, d, dtype=key_dtype), _meta(1, heads, 1)
    keys = _meta(1, key_heads, size, d, dtype=key_dtype)
    values = _meta(1, key_heads, d, size, dtype=VALUE_DTYPE)
    scale = _meta(1, key_heads, size)
    if quantize_step_triton.fits(q):
        quantize_step_triton.launch(
            *(q, k, k, keys, values, scale, scale, _meta(1, dtype=torch.int64), query, query_scale),
            largest_key=LARGEST[key_dtype],
            largest_value=LARGEST[VALUE_DTYPE],
            smallest=SMALLEST_MAXIMUM,
            constant=_meta(1, key_heads, d),
        )
    start = _meta(1, dtype=torch.int32)
    attention_triton.launch(
        *(query, keys, values, query_scale, scale, scale, _meta(1, 1, heads, d, dtype=dtype)),
        scale=1.0,
        is_causal=True,
        window=int(has_window),
        softcap=0.0,
        key_start=start,
        key_end=None,
        query_start=start,
        sinks=None,
        logit_offset=None,
        schedule=choose(1, heads, key_heads, 1, size, d, processors_of(index), capability),
    )
