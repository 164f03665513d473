"""Is the decode attention kernel right on this GPU, and what does it save?

    python scripts/check_decode_attention_gpu.py --json scripts/results/decode_attention.json
    python scripts/check_decode_attention_gpu.py --splits
    compute-sanitizer python scripts/check_decode_attention_gpu.py --sanitize

Errors are relative L2 against float64, in multiples of the error that rounding the exact result once would
have, beside those of PyTorch's SDPA on the same inputs. Outputs are filled with NaN before the kernel runs.
Times are microseconds of one call in CUDA-graph replays over caches that rotate out of the L2 cache, for the
shapes of Llama-3-8B: of attention alone, and behind the RoPE that writes the cache, as in a model.
"""

import multiprocessing
import os
import random
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from gpu_report import JsonFile, SanitizeOnly, about_this_run, conclude

from hf_hadacore.attention.decode_attention import decode_attention_forward
from hf_hadacore.kernels.decode_attention_triton import HEAD_DIMS, choose_splits, launch
from hf_hadacore.kernels.measure import copies_to_rotate, copy_bandwidth, graph_time
from hf_hadacore.kernels.rope import rope_into_cache
from hf_hadacore.kernels.w4a16_launch import counters_of_graph, new_counters

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from decode_attention_cases import MASKS, exact_attention, make_mask
from kernel_helpers import in_floors

CASES = 128
REPEATS = 1000
# The result's own rounding and that of the weights, each of about one floor.
MAX_FLOORS = 1.6
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


def check_elements(y: torch.Tensor, exact: torch.Tensor, magnitude: torch.Tensor) -> None:
    """Every element obeys the worst case of rounding.

    The result and each weight are rounded once; 2e-5 covers what fp32 does to a weight and its sum.
    """
    roundoff = torch.finfo(y.dtype).eps / 2
    bound = roundoff * exact.abs() + (roundoff + 2e-5) * magnitude + torch.finfo(y.dtype).smallest_normal
    assert ((y.double() - exact).abs() <= 1.01 * bound).all(), "an element is beyond the bound"


def run_case(case: int, is_small: bool = False) -> tuple[str, dict[str, float] | str]:
    """Dtype and errors of one random problem, or the traceback."""
    draw = random.Random(case)
    torch.manual_seed(case)
    dtype = draw.choice([torch.float16, torch.bfloat16])
    batch, kv_heads, group = draw.choice([1, 2, 3, 16]), draw.choice([1, 2, 4, 8]), draw.choice(range(1, 17))
    d = HEAD_DIMS[case % len(HEAD_DIMS)]
    length = draw.choice([1, 7, 64, 65, 256] if is_small else [1, 65, 256, 777, 1024, 1280, 4096, 9000])
    # float64 copies of all processes' problems must fit into memory together.
    batch = min(batch, max(1, 20480 // length))
    kind = draw.choice(MASKS)
    try:
        tensors = random_cache(batch, (kv_heads * group, kv_heads, d), length, dtype)
        mask = make_mask(kind, batch, length, dtype, torch.Generator("cuda").manual_seed(case))
        tensors.append(mask.float() if mask is not None and draw.random() < 0.2 else mask)
        exact = exact_attention(*tensors, d**-0.5)
        q, keys, values = tensors[:3]
        magnitude = exact_attention(q, keys, values.abs(), mask, d**-0.5)
        splits = draw.randint(1, min(32, -(-length // 64)))
        results = {"ours": 0.0, "sdpa": 0.0}
        with torch.no_grad():
            for y in (launched(splits, *tensors), attend(*tensors)):
                check_elements(y, exact, magnitude)
                # A few elements, or the weights of a few keys, have no average error.
                if exact.numel() >= 1024 and length >= 64 and kind not in ("one key", "nothing"):
                    results["ours"] = max(results["ours"], in_floors(y, exact))
        if results["ours"]:
            tensors[3] = mask
            results["sdpa"] = in_floors(sdpa(*tensors), exact)
        return str(dtype), results
    except Exception:
        problem = f"{batch} x {kv_heads} x {group}, D {d}, L {length}, mask {kind}, {dtype}"
        return str(dtype), f"case {case}, {problem}: {traceback.format_exc()}"


def pool() -> ProcessPoolExecutor:
    # Compiling takes the time: several processes share the GPU.
    return ProcessPoolExecutor(min(14, os.cpu_count() or 1), mp_context=multiprocessing.get_context("spawn"))


def check_cases() -> dict[str, Any]:
    with pool() as workers:
        outcomes = list(workers.map(run_case, range(CASES), chunksize=2))
    report: dict[str, Any] = {"cases": CASES, "failed": 0}
    for dtype, outcome in outcomes:
        if isinstance(outcome, str):
            print(outcome)
            report["failed"] += 1
            continue
        entry = report.setdefault(dtype, {"cases": 0, "worst_floors": 0.0, "worst_floors_of_sdpa": 0.0})
        entry["cases"] += 1
        entry["worst_floors"] = max(entry["worst_floors"], outcome["ours"])
        entry["worst_floors_of_sdpa"] = max(entry["worst_floors_of_sdpa"], outcome["sdpa"])
    report["failed"] += sum(
        entry["worst_floors"] > MAX_FLOORS for entry in report.values() if isinstance(entry, dict)
    )
    return report


def check_everything_masked() -> dict[str, Any]:
    """What a sequence gives of which nothing is visible."""
    tensors = random_cache(2, LLAMA, 512, torch.bfloat16)
    mask = torch.full((2, 1, 1, 512), -torch.inf, device="cuda", dtype=torch.bfloat16)
    ours, theirs = attend(*tensors, mask), sdpa(*tensors, mask)
    assert not ours.any(), "not 0"
    return {"ours": 0.0, "sdpa": "nan" if theirs.isnan().any() else float(theirs.abs().max())}


def check_repeats() -> dict[str, int]:
    """Calls that differ from the first, of `REPEATS`."""
    different = {}
    for batch, heads, length, splits in (
        (1, LLAMA, 2048, 16),
        (1, LLAMA, 8192, 32),
        (3, (28, 4, 128), 1000, 11),
        (16, LLAMA, 512, 4),
    ):
        tensors = random_cache(batch, heads, length, torch.bfloat16)
        mask = make_mask("tail", batch, length, torch.bfloat16, torch.Generator("cuda"))
        first = launched(splits, *tensors, mask)
        count = torch.zeros((), dtype=torch.int64, device="cuda")
        for _ in range(REPEATS):
            count += (launched(splits, *tensors, mask) != first).any()
        different[f"B {batch} heads {heads} L {length} splits {splits}"] = int(count)
    return different


def check_beyond_int32() -> bool:
    """Keys and values with more than 2^31 elements: the last sequence gives what it gives alone."""
    length = 1 << 16
    q, keys, values = random_cache(33, LLAMA, length, torch.bfloat16)
    assert keys.numel() > 1 << 31
    mask = torch.zeros(1, 1, 1, length, device="cuda", dtype=torch.bfloat16)
    every = launched(2, q, keys, values, mask)
    last = (part[-1:].clone() for part in (q, keys, values))
    return torch.equal(every[-1:], launched(2, *last, mask))


def check_replays(batch: int) -> bool:
    """Captured steps, with inputs that change, give what the same kernels give one by one.

    In a chain of RoPE and attention, each reads what the one before has just written.
    """
    q_heads, kv_heads, d = LLAMA
    length, layers, steps, start = 1024, 6, 40, 700
    options: dict[str, Any] = dict(device="cuda", dtype=torch.bfloat16)
    torch.manual_seed(batch)
    prompt = torch.randn(layers, 2, batch, kv_heads, length, d, **options)
    inputs = torch.randn(steps, batch, 1, q_heads, d, **options)
    angles = torch.randn(steps, 1, 1, d, device="cuda")
    cos_sin = torch.stack((angles.cos(), angles.sin()), 1).to(torch.bfloat16)
    caches, x, angle = prompt.clone(), inputs[0].clone(), cos_sin[0].clone()
    position = torch.empty(1, dtype=torch.int64, device="cuda")
    mask = torch.empty(batch, 1, 1, length, **options)

    def step(pause: Callable[[], None]) -> list[torch.Tensor]:
        outs, y = [], x
        for keys, values in caches:
            k, v = y[:, :, :kv_heads], y[:, :, kv_heads : 2 * kv_heads]
            q = rope_into_cache(y, k, v, angle[0], angle[1], keys, values, position)
            pause()
            y = attend(q, keys, values, mask)
            pause()
            outs.append(y)
        return outs

    def run(advance: Callable[[], list[torch.Tensor]]) -> list[torch.Tensor]:
        caches.copy_(prompt)
        results = []
        for i in range(steps):
            x.copy_(inputs[i])
            angle.copy_(cos_sin[i])
            position.fill_(start + i)
            mask.fill_(-torch.inf)
            mask[..., 3 : start + i + 1] = 0
            results += [out.clone() for out in advance()]
        return results

    expected = run(partial(step, torch.cuda.synchronize))
    graph, counters = torch.cuda.CUDAGraph(), new_counters(torch.device("cuda", 0))
    with torch.cuda.graph(graph), counters_of_graph(counters):
        outs = step(lambda: None)

    def replay() -> list[torch.Tensor]:
        graph.replay()
        return outs

    got = [run(replay) for _ in range(5)]
    return not counters.any() and all(all(map(torch.equal, results, expected)) for results in got)


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


def python_time(run: Callable[[], Any], calls: int = 200) -> float:
    """Microseconds until a call returns, its kernel aside: the queue is empty and short."""
    times = []
    for _ in range(7):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            run()
        times.append((time.perf_counter() - start) / calls * 1e6)
    return statistics.median(times)


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
    with pool() as workers:
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


def sanitize() -> None:
    """Small problems, for compute-sanitizer."""
    for case in range(14):
        outcome = run_case(case, is_small=True)[1]
        assert not isinstance(outcome, str), outcome
    torch.cuda.synchronize()
    print("sanitize: every head dimension ran")


def main(
    json_file: JsonFile = None,
    sanitize_only: SanitizeOnly = False,
    splits_only: Annotated[bool, typer.Option("--splits", help="Times of every number of splits.")] = False,
) -> None:
    if not torch.cuda.is_available():
        raise SystemExit("this check needs a CUDA device")
    torch.set_grad_enabled(False)
    if sanitize_only:
        return sanitize()
    if splits_only:
        return time_splits()
    report: dict[str, Any] = {
        **about_this_run("python scripts/check_decode_attention_gpu.py"),
    }
    checks: dict[str, Callable[[], Any]] = {
        "random_cases": check_cases,
        "everything_masked": check_everything_masked,
        f"different_of_{REPEATS}": check_repeats,
        "beyond_2_31_elements": check_beyond_int32,
        "replays_batch_1": partial(check_replays, 1),
        "replays_batch_16": partial(check_replays, 16),
        "times_us": check_times,
    }
    failed = []
    for name, check in checks.items():
        try:
            report[name] = check()
        except Exception:
            print(f"{name}: {traceback.format_exc()}")
            failed.append(name)
        torch.cuda.empty_cache()
    if report.get("random_cases", {}).get("failed"):
        failed.append("random_cases")
    if any(report.get(f"different_of_{REPEATS}", {}).values()):
        failed.append("repeats")
    failed += [name for name in report if name.startswith(("beyond", "replays")) and report[name] is not True]
    conclude(report, failed, json_file, rows="times_us")


if __name__ == "__main__":
    typer.run(main)
