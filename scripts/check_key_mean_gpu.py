"""Is `key_mean` right on this GPU?

    python scripts/check_key_mean_gpu.py --json scripts/results/check_key_mean.json
    python scripts/check_key_mean_gpu.py --tune
    compute-sanitizer python scripts/check_key_mean_gpu.py --sanitize

Means are held to float64: each to what fp32 sums may be off by, and all together to the error of torch's. All
memory is filled with NaN before the kernel writes to it.
"""

import random
import sys
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

import torch
import typer
from benchmark_rotate_quantize import MEANS, mean_calls
from gpu_processes import in_processes
from gpu_report import JsonFile, SanitizeOnly, about_this_run, conclude, require_gpu

from hf_hadacore.kernels import key_mean_triton
from hf_hadacore.kernels.key_mean import key_mean, key_mean_reference
from hf_hadacore.kernels.measure import copy_bandwidth, graph_time

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from key_mean_cases import LAYOUTS, exact_mean, in_bounds, random_key, random_tokens

HEAD_SIZES = (40, 64, 80, 96, 112, 128, 192, 256)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
CASES = 8
REPEATS = 1000
# Of the kernel and torch, which add up in another order: both errors are a few roundings.
MAX_ERROR_IN_THOSE_OF_TORCH = 1.1
# Bytes of a tile and programs on a processor, to compare.
SCHEDULES = [(kib * 1024, programs) for kib in (8, 16, 32) for programs in (2, 3, 4, 6, 8)]


def run_cases(job: tuple[int, torch.dtype]) -> dict[str, Any]:
    """Cases of one size and dtype: the worst error in bounds, and squared errors of the kernel and torch."""
    d, dtype = job
    draw = random.Random(d * dtype.itemsize)
    torch.manual_seed(d)
    # Fills whatever is allocated.
    torch.use_deterministic_algorithms(True)
    worst, squares = 0.0, [0.0, 0.0]
    for case in range(CASES):
        batch, heads = draw.choice([1, 2, 4]), draw.choice([1, 3, 8])
        shape = (batch, heads, draw.choice([1, 2, 63, 129, 1000, 4096]), d) if case else (1, 8, 16384, d)
        layout = LAYOUTS[case % len(LAYOUTS)]
        key = random_key(shape, dtype, layout, "cuda")
        is_token = None
        if case % 3:
            is_token = random_tokens(batch if case % 3 == 1 else 1, shape[2], "cuda")
            # Padding may hold anything. In place, so that strides stay.
            if layout == "same for all":
                key = key.contiguous()
            key.masked_fill_(~is_token[:, None, :, None], float("nan"))
        first, again = key_mean(key, is_token), key_mean(key, is_token)
        assert torch.equal(first, again), f"repeats of {shape} {dtype}"
        if is_token is not None:
            assert not first[~is_token.any(1).expand(batch)].any(), "the mean of nothing"
        worst = max(worst, in_bounds(first, key, is_token))
        exact = exact_mean(key, is_token)[0]
        for i, mean in enumerate((first, key_mean_reference(key, is_token))):
            squares[i] += float((mean.double() - exact).square().sum())
    return {"worst": worst, "squares": squares}


def check_repeats() -> bool:
    """In a row, on keys that are split among programs: whichever is the last to arrive."""
    right = torch.ones((), dtype=torch.bool, device="cuda")
    for batch, tokens in ((1, 3000), (4, 1000)):
        key = torch.randn(batch, tokens, 8, 128, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        first = key_mean(key)
        for _ in range(REPEATS):
            right &= (key_mean(key) == first).all()
    return bool(right)


def check_beyond_int32() -> bool:
    key = torch.randn(1, (1 << 21) + 5, 8, 128, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    # As a mask, it leaves only the end, which lies beyond 2^31 elements.
    is_token = torch.arange(key.shape[2], device="cuda")[None] >= key.shape[2] - 9
    return in_bounds(key_mean(key, is_token), key[:, :, -9:], None) <= 1


def tune() -> None:
    bandwidth = copy_bandwidth()
    for batch, tokens in MEANS:
        calls, nbytes = mean_calls(key_mean, batch, tokens)
        for tile_bytes, programs in SCHEDULES:
            with patch.multiple(key_mean_triton, _TILE_BYTES=tile_bytes, _PROGRAMS_PER_PROCESSOR=programs):
                elapsed = graph_time(calls)
            share = nbytes / bandwidth * 1e6 / elapsed
            print(f"{batch} of {tokens}: {share:.3f} of the floor, {elapsed:.1f} us, {tile_bytes} {programs}")


def main(
    json_file: JsonFile = None,
    tune_only: Annotated[bool, typer.Option("--tune", help="Only compare schedules.")] = False,
    sanitize_only: SanitizeOnly = False,
) -> None:
    require_gpu()
    torch.set_grad_enabled(False)
    if tune_only:
        return tune()
    if sanitize_only:
        results = [run_cases((d, torch.bfloat16)) for d in (80, 128)]
        assert all(result["worst"] <= 1 for result in results)
        return print("sanitize: means of two sizes ran")
    jobs = [(d, dtype) for d in HEAD_SIZES for dtype in DTYPES]
    results = in_processes(run_cases, jobs)
    failed = [f"{job}: {r!r}" for job, r in zip(jobs, results, strict=True) if not isinstance(r, dict)]
    done = [result for result in results if isinstance(result, dict)]
    ours, torchs = (sum(result["squares"][i] for result in done) ** 0.5 for i in (0, 1))
    report: dict[str, Any] = about_this_run("python scripts/check_key_mean_gpu.py") | {
        "cases": CASES * len(jobs),
        "worst_error_in_bounds": max(result["worst"] for result in done),
        "error_in_those_of_torch": ours / torchs,
        "repeats_are_identical": check_repeats(),
        "beyond_2_31_elements": check_beyond_int32(),
    }
    failed += [name for name in ("repeats_are_identical", "beyond_2_31_elements") if not report[name]]
    limits = {"worst_error_in_bounds": 1.0, "error_in_those_of_torch": MAX_ERROR_IN_THOSE_OF_TORCH}
    failed += [name for name, limit in limits.items() if not report[name] <= limit]
    conclude(report, failed, json_file)


if __name__ == "__main__":
    typer.run(main)
