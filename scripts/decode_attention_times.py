"""Decode attention with random caches, and its times beside those of PyTorch's SDPA.

Times are microseconds of one call in CUDA-graph replays over caches that rotate out of the L2 cache, for the
shapes of Llama-3-8B: of attention alone, and behind the RoPE that writes the cache, as in a model.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from gpu_processes import process_pool
from gpu_times import python_time

from hf_hadacore.attention.decode_attention import decode_attention_forward
from hf_hadacore.kernels.decode_attention_triton import choose_splits, launch
from hf_hadacore.kernels.measure import copies_to_rotate, copy_bandwidth, graph_time
from hf_hadacore.kernels.rope import rope_into_cache

# Query heads, key heads, head dimension.
LLAMA = (32, 8, 128)
MODULE = torch.nn.Module()


def has_pdl() -> bool:
    return torch.cuda.get_device_capability() >= (9, 0)


def random_cache(batch: int, heads: tuple[int, int, int], length: int, dtype: torch.dtype) -> list[Any]:
    """Queries, keys and values."""
    q_heads, kv_heads, d = heads
    options: dict[str, Any] = dict(device="cuda", dtype=dtype)
    # The queries of a fused projection.
    fused = torch.randn(batch, 1, q_heads + 2 * kv_heads, d, **options)
    return [fused[:, :, :q_heads].transpose(1, 2), *torch.randn(2, batch, kv_heads, length, d, **options)]


def attend(*tensors: Any) -> torch.Tensor:
    """The kernel, as a model calls it."""
    with torch.no_grad():
        return decode_attention_forward(MODULE, *tensors)[0]


def sdpa(*tensors: Any) -> torch.Tensor:
    """What models are given where the kernel must not be used."""
    MODULE.num_key_value_groups = tensors[0].shape[1] // tensors[1].shape[1]
    with torch.enable_grad():
        return decode_attention_forward(MODULE, *tensors)[0]


def launched(splits: int, *tensors: Any) -> torch.Tensor:
    """The kernel with some number of splits."""
    q, keys, values, mask = tensors
    batch, heads, _, d = q.shape
    out = torch.full((batch, 1, heads, d), torch.nan, dtype=q.dtype, device="cuda")
    arrived = torch.zeros(batch * keys.shape[1], dtype=torch.int32, device="cuda")
    launch(q, keys, values, mask, None, out, arrived, splits, has_pdl())
    assert not arrived.any(), "counters are not zero"
    return out


class Timed:
    """Caches of one size that rotate, and what runs on them.

    Args:
        batch: B.
        length: of the buffer.
        filled: keys that are not masked.
    """

    def __init__(self, batch: int, length: int, filled: int):
        q_heads, kv_heads, d = LLAMA
        options: dict[str, Any] = dict(device="cuda", dtype=torch.bfloat16)
        nbytes = 2 * batch * kv_heads * filled * d * 2
        self.caches = torch.randn(copies_to_rotate(nbytes), 2, batch, kv_heads, length, d, **options)
        fused = torch.randn(batch, 1, q_heads + 2 * kv_heads, d, **options)
        self.qkv = fused.split([q_heads, kv_heads, kv_heads], dim=2)
        self.cos, self.sin = torch.randn(2, 1, 1, d, **options)
        self.position = torch.tensor([filled - 1], device="cuda")
        self.mask = torch.zeros(batch, 1, 1, length, **options)
        self.mask[..., filled:] = -torch.inf
        self.nbytes = nbytes

    def rotate(self, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv
        return rope_into_cache(q, k, v, self.cos, self.sin, keys, values, self.position)

    def alone(self, attention: Callable[..., torch.Tensor]) -> float:
        q = self.rotate(*self.caches[0])
        return graph_time([partial(attention, q, *cache, self.mask) for cache in self.caches])

    def behind_rope(self, attention: Callable[..., torch.Tensor] | None) -> float:
        def call(keys: torch.Tensor, values: torch.Tensor) -> None:
            q = self.rotate(keys, values)
            if attention is not None:
                attention(q, keys, values, self.mask)

        return graph_time([partial(call, *cache) for cache in self.caches])


def check_times() -> list[dict[str, Any]]:
    bandwidth = copy_bandwidth()
    rows = []
    shapes = [(batch, length, length) for batch in (1, 16) for length in (256, 1024, 4096, 8192)]
    for batch, length, filled in [*shapes, (1, 2048, 1024), (16, 2048, 1024)]:
        timed = Timed(batch, length, filled)
        inputs = (timed.rotate(*timed.caches[0]), *timed.caches[0], timed.mask)
        row = {
            "ours": timed.alone(attend),
            "sdpa": timed.alone(sdpa),
            "rope": timed.behind_rope(None),
            "rope+ours": timed.behind_rope(attend),
            "rope+sdpa": timed.behind_rope(sdpa),
            "memory": timed.nbytes / bandwidth * 1e6,
            "python": python_time(partial(attend, *inputs)),
            "sdpa_python": python_time(partial(sdpa, *inputs)),
        }
        rows.append(
            {"batch": batch, "length": length, "filled": filled}
            | {name: round(value, 2) for name, value in row.items()}
        )
        del timed, inputs
        torch.cuda.empty_cache()
    return rows


def compile_splits(splits: int) -> None:
    launched(
        splits, *random_cache(1, LLAMA, 2048, torch.bfloat16), torch.zeros(1, 1, 1, 2048).cuda().bfloat16()
    )


def time_splits() -> None:
    """What `choose_splits` could choose, behind RoPE."""
    numbers = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
    with process_pool() as workers:
        list(workers.map(compile_splits, numbers))
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    arrived = torch.zeros(1 << 10, dtype=torch.int32, device="cuda")
    for batch in (1, 2, 4, 8, 12, 16):
        for length in (512, 2048, 8192):
            timed = Timed(batch, length, length)
            cells = []
            for splits in numbers:
                if splits > length // 64 or splits * batch * LLAMA[1] > 1024:
                    continue

                def attention(q: Any, keys: Any, values: Any, mask: Any, splits: int = splits) -> Any:
                    out = torch.empty_like(q.transpose(1, 2))
                    launch(q, keys, values, mask, None, out, arrived, splits, has_pdl())
                    return out

                cells.append(f"{splits}: {timed.behind_rope(attention):.2f}")
            chosen = choose_splits(batch * LLAMA[1], length, processors)
            print(f"batch {batch}  length {length}  chosen {chosen}  ", "  ".join(cells), flush=True)
            del timed
            torch.cuda.empty_cache()
