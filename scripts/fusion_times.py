"""What the pointwise ops save, beside transformers' eager formulas.

Times are microseconds of one call: in CUDA-graph replays of calls back to back, and of Python alone.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from gpu_times import python_time

from hf_hadacore.kernels.gated_activation import gated_activation, gated_activation_reference
from hf_hadacore.kernels.measure import graph_time
from hf_hadacore.kernels.rms_norm import add_rms_norm, rms_norm, rms_norm_reference
from hf_hadacore.kernels.rope import rope_into_cache, rope_reference

EPS = 1e-5


def replayed(run: Callable[[], Any], calls: int = 64) -> float:
    """Median microseconds of a call, replayed back to back."""
    return graph_time([run] * calls, repeats=20)


def timed(name: str, shape: str, ours: Callable[[], Any], eager: Callable[[], Any]) -> dict[str, Any]:
    with torch.no_grad():
        return {
            "op": name,
            "shape": shape,
            "ours_us": round(replayed(ours), 2),
            "eager_us": round(replayed(eager), 2),
            "ours_python_us": round(python_time(ours), 1),
            "eager_python_us": round(python_time(eager), 1),
        }


def eager_add_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return rms_norm_reference(x + residual, weight, EPS, 0.0, True)


def eager_cache_write(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    position: torch.Tensor,
    weight: torch.Tensor | None,
) -> None:
    rope_reference(q, cos, sin, weight, EPS, 0.0, True)
    k = rope_reference(k, cos, sin, weight, EPS, 0.0, True)
    positions = torch.arange(k.shape[1], device="cuda") + position
    keys.index_copy_(2, positions, k.transpose(1, 2))
    values.index_copy_(2, positions, v.transpose(1, 2))


def check_times() -> list[dict[str, Any]]:
    """The shapes of Llama-3-8B (and norms of heads, as in Qwen3-8B) at decoding, and of one prefill."""
    times = []
    h, i, q_heads, kv_heads, d = 4096, 14336, 32, 8, 128
    options: dict[str, Any] = dict(device="cuda", dtype=torch.bfloat16)
    for batch, tokens in ((1, 1), (16, 1), (1, 2048)):
        shape = f"batch {batch}, tokens {tokens}"
        x, residual = torch.randn(2, batch, tokens, h, **options)
        weight, head_weight = torch.randn(h, **options), torch.randn(d, **options)
        eager_norm = partial(rms_norm_reference, x, weight, EPS, 0.0, True)
        times.append(timed("rms_norm", shape, partial(rms_norm, x, weight, EPS), eager_norm))
        ours = partial(add_rms_norm, x, residual, weight, EPS)
        times.append(timed("add_rms_norm", shape, ours, partial(eager_add_norm, x, residual, weight)))
        gate, up = torch.randn(batch, tokens, 2 * i, **options).chunk(2, dim=-1)
        eager_activation = partial(gated_activation_reference, gate, up, "silu")
        times.append(timed("gated_activation", shape, partial(gated_activation, gate, up), eager_activation))
        sizes = [q_heads * d, kv_heads * d, kv_heads * d]
        fused = torch.randn(batch, tokens, sum(sizes), **options)
        q, k, v = (part.view(batch, tokens, -1, d) for part in fused.split(sizes, -1))
        cos, sin = torch.randn(2, 1, tokens, d, **options)
        keys, values = torch.zeros(2, batch, kv_heads, tokens + 256, d, **options)
        position = torch.tensor([128], device="cuda")
        inputs = (q, k, v, cos, sin, keys, values, position)
        times.append(
            timed(
                "rope_into_cache",
                shape,
                partial(rope_into_cache, *inputs),
                partial(eager_cache_write, *inputs, None),
            )
        )
        times.append(
            timed(
                "norms + rope_into_cache",
                shape,
                partial(rope_into_cache, *inputs, head_weight, head_weight, eps=EPS),
                partial(eager_cache_write, *inputs, head_weight),
            )
        )
    return times
