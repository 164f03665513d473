"""How close is `rotate_quantize` to one pass over memory?

    python scripts/benchmark_rotate_quantize.py --json scripts/results/rotate_quantize.json
    python scripts/benchmark_rotate_quantize.py --tune

Times are microseconds in CUDA-graph replays over inputs that rotate out of the L2 cache. The floor is the
time in which a copy, timed in the same run, moves the bytes of x, of cos and sin, and of the 8-bit values;
for the mean of keys, those of the keys.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any, NamedTuple
from unittest.mock import patch

import torch
import typer
from gpu_processes import in_processes
from gpu_report import JsonFile, about_this_run, require_gpu, write_report

from hf_hadacore.hadamard_matrices import hadamard_factors
from hf_hadacore.kernels import hadamard_schedules, rotate_quantize_triton
from hf_hadacore.kernels.key_mean import key_mean, key_mean_reference
from hf_hadacore.kernels.measure import copies_to_rotate, copy_bandwidth, graph_time
from hf_hadacore.kernels.rotate_quantize import rotate_quantize
from hf_hadacore.kernels.rotate_quantize_triton import Schedule

AnySchedule = Schedule | hadamard_schedules.Schedule
# B and S of the keys whose mean is timed, of 8 heads of 128 elements.
MEANS = ((1, 16384), (4, 4096), (1, 131072))


class Work(NamedTuple):
    """What is timed: heads of d elements over some tokens, from bf16, stored as models do, [B, S, H, D].

    Attributes:
        name: what it is.
        heads: of one launch each.
        tokens, d: sizes.
        options: of `rotate_quantize`.
        rope: "none", or whether cos and sin are given "whole" or their "half".
    """

    name: str
    heads: tuple[int, ...]
    tokens: int
    d: int
    options: dict[str, Any]
    rope: str = "none"


def works() -> list[Work]:
    both, fp8, int8 = (32, 8), torch.float8_e4m3fn, torch.int8
    block = dict(scale="block", block_size=128)
    values: dict[str, Any] = dict(dtype=fp8, rotate=False, power_of_2=True)
    transposed = values | dict(transpose=True, interleave=True)
    return [
        Work("q and k, fp8, token", both, 8192, 128, dict(dtype=fp8)),
        Work("q and k, int8, token", both, 8192, 128, dict(dtype=int8)),
        Work("q and k, fp8, block 128", both, 8192, 128, dict(dtype=fp8, **block)),
        Work("q and k, int8, block 128", both, 8192, 128, dict(dtype=int8, **block)),
        Work("q and k, fp8, block 64", both, 8192, 128, dict(dtype=fp8, scale="block")),
        Work("q and k, fp8, head (x is read twice)", both, 8192, 128, dict(dtype=fp8, scale="head")),
        Work("q and k, RoPE, fp8, token", both, 8192, 128, dict(dtype=fp8), "whole"),
        Work("q and k, RoPE of one half, fp8, token", both, 8192, 128, dict(dtype=fp8), "half"),
        Work(
            "q and k, RoPE of one half, fp8, block 64",
            both,
            8192,
            128,
            dict(dtype=fp8, scale="block"),
            "half",
        ),
        Work("v, fp8, token", (8,), 8192, 128, values),
        Work("v, transposed, fp8, token", (8,), 8192, 128, values | dict(transpose=True)),
        Work("v, transposed and interleaved, fp8, token", (8,), 8192, 128, transposed),
        Work("v, transposed and interleaved, fp8, block 128", (8,), 8192, 128, transposed | block),
        Work(
            "v of 32 heads, transposed and interleaved, fp8, block 128", (32,), 8192, 128, transposed | block
        ),
        Work("q and k, d 64, fp8, token", both, 16384, 64, dict(dtype=fp8)),
        Work("q and k, d 96, fp8, token", both, 8192, 96, dict(dtype=fp8)),
        Work("q and k, d 256, fp8, token", (16, 8), 8192, 256, dict(dtype=fp8)),
        Work("q and k, one token, RoPE of one half, fp8", both, 1, 128, dict(dtype=fp8), "half"),
        *(
            Work(f"activations of {d}, fp8, token", (1,), (1 << 25) // d, d, dict(dtype=fp8))
            for d in (2048, 4096, 8192, 14336, 28672, 11008, 18944)
        ),
        Work("activations of 4096, int8, token", (1,), 8192, 4096, dict(dtype=int8)),
    ]


def calls_of(
    work: Work, schedule: AnySchedule | None = None, copies: int | None = None
) -> tuple[list[Any], int]:
    """Calls on inputs that rotate out of the cache, and the bytes of one of them."""
    d, tokens = work.d, work.tokens
    elements = sum(work.heads) * tokens * d
    copies = copies or (copies_to_rotate(3 * elements) if tokens > 1 else 16)
    calls = []
    for _ in range(copies):
        angles = torch.randn(1, tokens, d // 2 if work.rope == "half" else d, device="cuda")
        front: dict[str, Any] = {}
        if work.rope != "none":
            front = dict(cos=angles.cos().bfloat16(), sin=angles.sin().bfloat16())
        inputs = [
            torch.randn(1, tokens, heads, d, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
            for heads in work.heads
        ]
        calls.append(partial(run_work, inputs, work.options | front, schedule))
    angle_bytes = 0 if work.rope == "none" else 4 * tokens * (d // 2 if work.rope == "half" else d)
    return calls, 3 * elements + angle_bytes


def run_work(inputs: list[torch.Tensor], options: dict[str, Any], schedule: AnySchedule | None) -> list[Any]:
    if schedule is None:
        return [rotate_quantize(x, **options) for x in inputs]
    is_long = isinstance(schedule, hadamard_schedules.Schedule)
    module, name = (hadamard_schedules, "choose_quantized") if is_long else (rotate_quantize_triton, "choose")
    with patch.object(module, name, lambda *_, **__: schedule):
        return [rotate_quantize(x, **options) for x in inputs]


def times_of(works: list[Work]) -> list[dict[str, Any]]:
    bandwidth = copy_bandwidth()
    times = []
    for work in works:
        calls, nbytes = calls_of(work)
        times.append(time_of(work.name, work.tokens, calls, nbytes, bandwidth))
    for batch, tokens in MEANS:
        for name, mean in (("mean of keys", key_mean), ("mean of keys, torch", key_mean_reference)):
            calls, nbytes = mean_calls(mean, batch, tokens)
            times.append(time_of(f"{name}, {batch} of {tokens} tokens", tokens, calls, nbytes, bandwidth))
    return times


def time_of(name: str, tokens: int, calls: list[Any], nbytes: int, bandwidth: float) -> dict[str, Any]:
    floor = nbytes / bandwidth * 1e6
    elapsed = graph_time(calls)
    return {
        "work": name,
        "tokens": tokens,
        "us": round(elapsed, 2),
        "floor_us": round(floor, 2),
        "share_of_floor": round(floor / elapsed, 3),
    }


def mean_calls(mean: Callable[..., Any], batch: int, tokens: int) -> tuple[list[Any], int]:
    """Calls on keys ``[B, S, H, D]`` that rotate out of the cache, and the bytes of one of them."""
    nbytes = 2 * batch * tokens * 8 * 128
    calls = []
    for _ in range(copies_to_rotate(nbytes)):
        key = torch.randn(batch, tokens, 8, 128, device="cuda", dtype=torch.bfloat16)
        calls.append(partial(mean, key.transpose(1, 2), None))
    return calls, nbytes


def candidates() -> list[tuple[Work, AnySchedule]]:
    """Schedules to compare, for one work of each kind."""
    plain = [
        *(Schedule(tile, warps) for tile, warps in ((64, 4), (128, 4), (64, 8), (128, 8))),
        *(Schedule(64, 4, stages, programs) for stages in (2, 3) for programs in (4, 5)),
        Schedule(128, 4, 2, 3),
        Schedule(128, 8, 2, 2),
    ]
    rope = [
        *(Schedule(tile, 4, heads=heads) for tile in (64, 128) for heads in (2, 4, 8)),
        *(Schedule(64, 4, heads=heads, registers=128) for heads in (1, 2, 4, 8)),
        *(Schedule(64, 4, stages, 4, 4, 128) for stages in (2, 3)),
        *(Schedule(tile, 8) for tile in (64, 128)),
        *(
            Schedule(64, 4, stages, programs, heads)
            for stages, programs in ((2, 3), (3, 3))
            for heads in (2, 4)
        ),
        Schedule(128, 8, 2, 1),
    ]
    wide = [
        *(Schedule(tile, warps) for tile, warps in ((64, 4), (64, 8), (128, 8))),
        *(Schedule(64, 8, stages, programs) for stages, programs in ((2, 2), (2, 3), (3, 2))),
        Schedule(128, 8, 2, 1),
    ]
    values = [
        *(Schedule(tile, warps) for tile in (64, 128) for warps in (2, 4, 8, 16)),
        *(Schedule(128, 8, 2, programs) for programs in (2, 3, 4)),
        Schedule(256, 8),
        Schedule(256, 16),
    ]
    found: dict[str, Sequence[AnySchedule]] = {
        "q and k, fp8, token": plain,
        "q and k, fp8, block 128": [each for each in plain if each.tile == 128],
        "q and k, RoPE of one half, fp8, token": rope,
        "v of 32 heads, transposed and interleaved, fp8, block 128": [
            each for each in values if each.tile >= 128
        ],
        "v, transposed and interleaved, fp8, token": values,
        "q and k, d 256, fp8, token": wide,
    }
    for d in (4096, 11008, 14336, 28672):
        steps = hadamard_schedules.steps_of(hadamard_factors(d))
        schedules = hadamard_schedules.quantized_candidates(steps.heads, steps.column_bits)
        found[f"activations of {d}, fp8, token"] = schedules
    return [(work, schedule) for work in works() for schedule in found.get(work.name, [])]


def compile_work(job: tuple[Work, AnySchedule | None]) -> None:
    """Compile into Triton's cache, from where the process that times loads it."""
    work, schedule = job
    calls_of(work, schedule, copies=1)[0][0]()
    torch.cuda.synchronize()


def tune() -> None:
    jobs = candidates()
    errors = in_processes(compile_work, jobs)
    bandwidth = copy_bandwidth()
    results: dict[str, list[tuple[float, str]]] = {}
    for (work, schedule), error in zip(jobs, errors, strict=True):
        if error is not None:
            share, what = 0.0, f"{schedule}: {error}"[:150]
        else:
            calls, nbytes = calls_of(work, schedule)
            share, what = nbytes / bandwidth * 1e6 / graph_time(calls, repeats=5), str(schedule)
        results.setdefault(work.name, []).append((share, what))
    for name, entries in results.items():
        print(name)
        for share, what in sorted(entries, reverse=True):
            print(f"  {share:.3f} {what}")


def main(
    json_file: JsonFile = None,
    tune_only: Annotated[bool, typer.Option("--tune", help="Only compare schedules.")] = False,
) -> None:
    require_gpu()
    if tune_only:
        return tune()
    errors = in_processes(compile_work, [(work, None) for work in works()])
    failed = {work.name: error for work, error in zip(works(), errors, strict=True) if error is not None}
    report: dict[str, Any] = about_this_run("python scripts/benchmark_rotate_quantize.py")
    report["times"] = times_of([work for work in works() if work.name not in failed])
    write_report(report, json_file)
    for entry in report["times"]:
        print("{share_of_floor:.3f} of the floor, {us} us  {work}".format(**entry))
    if failed:
        raise SystemExit(f"failed: {failed}")


if __name__ == "__main__":
    typer.run(main)
