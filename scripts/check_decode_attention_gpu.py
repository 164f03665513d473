"""Is the decode attention kernel right on this GPU, and what does it save?

    python scripts/check_decode_attention_gpu.py --json scripts/results/decode_attention.json
    python scripts/check_decode_attention_gpu.py --splits
    compute-sanitizer python scripts/check_decode_attention_gpu.py --sanitize

Errors are relative L2 against float64, in multiples of the error that rounding the exact result once would
have, beside those of PyTorch's SDPA on the same inputs. Outputs are filled with NaN before the kernel runs.
Times are those of `decode_attention_times`.
"""

import random
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from decode_attention_times import LLAMA, attend, check_times, launched, random_cache, sdpa, time_splits
from gpu_processes import process_pool
from gpu_report import JsonFile, SanitizeOnly, about_this_run, conclude, require_gpu, run_checks

from hf_hadacore.kernels.decode_attention_triton import HEAD_DIMS
from hf_hadacore.kernels.rope import rope_into_cache
from hf_hadacore.kernels.w4a16_launch import counters_of_graph, new_counters

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from decode_attention_cases import MASKS, exact_attention, make_mask
from kernel_helpers import in_floors

CASES = 128
REPEATS = 1000
# The result's own rounding and that of the weights, each of about one floor.
MAX_FLOORS = 1.6


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


def check_cases() -> dict[str, Any]:
    with process_pool() as workers:
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
    require_gpu()
    torch.set_grad_enabled(False)
    if sanitize_only:
        return sanitize()
    if splits_only:
        return time_splits()
    report: dict[str, Any] = about_this_run("python scripts/check_decode_attention_gpu.py")
    checks: dict[str, Callable[[], Any]] = {
        "random_cases": check_cases,
        "everything_masked": check_everything_masked,
        f"different_of_{REPEATS}": check_repeats,
        "beyond_2_31_elements": check_beyond_int32,
        "replays_batch_1": partial(check_replays, 1),
        "replays_batch_16": partial(check_replays, 16),
        "times_us": check_times,
    }
    failed = run_checks(report, checks)
    if report.get("random_cases", {}).get("failed"):
        failed.append("random_cases")
    if any(report.get(f"different_of_{REPEATS}", {}).values()):
        failed.append("repeats")
    failed += [name for name in report if name.startswith(("beyond", "replays")) and report[name] is not True]
    conclude(report, failed, json_file, rows="times_us")


if __name__ == "__main__":
    typer.run(main)
