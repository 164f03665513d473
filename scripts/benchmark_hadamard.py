"""The Hadamard transform beside a copy, a dense product and every peer that can be imported, in one run.

    python scripts/benchmark_hadamard.py --json scripts/results/hadamard.json
    python scripts/benchmark_hadamard.py --tune --json scripts/results/hadamard_tune.json

Times are microseconds of a call, medians of CUDA-graph replays. Cold calls rotate through enough inputs to
leave the L2 cache behind, hot calls transform the same small input again and again. Beside both stands
`copy_` of the same tensors in the same order: the faster of a graph, where the driver's copies can be slower,
and a queue of calls outside of graphs. A share is the copy's time divided by ours; the share of bandwidth
is that of what a copy of 2 GiB reaches. Errors are relative L2 of the last million elements against float64,
in multiples of the error of rounding the exact result once.

`--tune` times every schedule worth trying, one by one, once all are compiled and checked side by side.
"""

import math
import statistics
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Annotated, Any

import torch
import typer
from check_hadamard_gpu import exact_transform, in_floors
from gpu_processes import in_processes
from gpu_report import JsonFile, about_this_run, require_gpu, write_report

from hf_hadacore.hadamard_matrices import hadamard_factors, hadamard_matrix
from hf_hadacore.kernels import hadamard_schedules as schedules
from hf_hadacore.kernels.hadamard_triton import launch
from hf_hadacore.kernels.measure import copies_to_rotate, copy_bandwidth, graph_time
from hf_hadacore.kernels.w4a16_launch import processors_of

POWERS = tuple(1 << k for k in range(7, 16))
# Sizes of models' matrices and heads.
OTHERS = (
    80,
    96,
    112,
    192,
    576,
    3072,
    4864,
    5120,
    6144,
    8960,
    10240,
    11008,
    13824,
    14336,
    18944,
    27648,
    28672,
    29568,
)
# Sizes that also transform the most elements.
LARGE = (128, 1024, 8192, 32768, 14336)
# Sizes that show what fp32 costs.
WIDE = (1024, 8192, 14336)
# Sizes that do not reach what they should: few rows that are hot (the first two), many that are cold.
TUNED = (4096, 8192, 8960, 11008, 18944, 28672, 32768)
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
HOT_ELEMENTS = 1 << 20
COLD_ELEMENTS = 1 << 25
COUNTS = tuple(1 << k for k in range(20, 26))
LARGE_COUNTS = (1 << 26, 1 << 27)
# Larger matrices make no sense dense.
MAX_DENSE = 1024
_HOT_CALLS = 20
_REPEATS = 15
_HOPPER_CANDIDATES = 5
# Longer than queueing a few hundred calls takes.
_SLEEP_CYCLES = 4_000_000

Schedule = schedules.Schedule | schedules.HopperSchedule
Transform = Callable[[torch.Tensor, torch.Tensor], object]


def ours(n: int, schedule: Schedule | None = None) -> Transform:
    return partial(launch, factors=hadamard_factors(n), scale=n**-0.5, schedule=schedule)


def dense(n: int, dtype: torch.dtype) -> Transform:
    matrix = (hadamard_matrix(n).cuda().double() * n**-0.5).to(dtype).T.contiguous()
    return lambda x, out: torch.mm(x, matrix, out=out)


def peers(n: int) -> dict[str, Transform]:
    """Those that are installed; a power of two is the only size that means the same to all."""
    found: dict[str, Transform] = {}
    try:
        # Also the name of tokenspeed-fast-hadamard-transform, the same kernel as a wheel.
        from fast_hadamard_transform.fast_hadamard_transform_interface import hadamard_transform

        found["fast_hadamard_transform"] = lambda x, out: hadamard_transform(x, n**-0.5)
    except ImportError:
        pass
    try:
        import flag_gems

        found["flag_gems"] = lambda x, out: flag_gems.hadamard_transform(x, n**-0.5)
    except (ImportError, AttributeError):
        pass
    return found


def random_rows(n: int, elements: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(max(1, elements // n), n, device="cuda", dtype=dtype)


def cold_calls(transform: Transform, x: torch.Tensor) -> list[Callable[[], object]]:
    """Inputs and outputs come from memory."""
    inputs = [x, *(x.clone() for _ in range(copies_to_rotate(2 * x.nbytes) - 1))]
    return [partial(transform, each, torch.empty_like(x)) for each in inputs]


def hot_calls(transform: Transform, x: torch.Tensor) -> list[Callable[[], object]]:
    return [partial(transform, x, torch.empty_like(x))] * _HOT_CALLS


def copy(x: torch.Tensor, out: torch.Tensor) -> None:
    out.copy_(x)


def queue_time(calls: list[Callable[[], object]]) -> float:
    """Median microseconds of one of some calls that wait, queued, for the GPU."""
    times = []
    for _ in range(_REPEATS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(_SLEEP_CYCLES)
        start.record()
        for call in calls:
            call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times[3:])


def copy_time(calls: list[Callable[[], object]]) -> float:
    """Of one of some calls of `copy`."""
    return min(graph_time(calls, _REPEATS), queue_time(calls))


def compile_and_check(job: tuple[int, str, Schedule]) -> float:
    """Compile one schedule's kernel for the disk's cache; its error in floors."""
    n, dtype, schedule = job
    if isinstance(schedule, schedules.HopperSchedule) and torch.cuda.get_device_capability()[0] != 9:
        return float("inf")
    torch.manual_seed(n)
    # An odd number of rows, more than a program's, and so many that programs that stay go round their stages.
    tiles = 5 * processors_of(0) if isinstance(schedule, schedules.HopperSchedule) else 2
    x = random_rows(n, n * (tiles * schedule.rows + 1), DTYPES[dtype])
    y = torch.full_like(x, float("nan"))
    ours(n, schedule)(x, y)
    return in_floors(y, exact_transform(x, n) * n**-0.5)


def tune(sizes: list[int], dtype: str, bandwidth: float) -> list[dict[str, Any]]:
    """Every schedule's error and times."""
    jobs: list[tuple[int, str, Schedule]] = []
    for n in sizes:
        steps = schedules.steps_of(hadamard_factors(n))
        chosen: list[Schedule] = [
            schedules.choose(steps.heads, steps.column_bits, dtype == "fp32", is_small)
            for is_small in (False, True)
        ]
        found: list[Schedule] = [
            *schedules.hopper_candidates(steps.heads, steps.column_bits)[: _HOPPER_CANDIDATES * (n >= 4096)],
            *schedules.candidates(steps.heads, steps.column_bits),
        ]
        jobs += [(n, dtype, each) for each in dict.fromkeys(chosen + found)]
    errors = in_processes(compile_and_check, jobs)
    for job, error in zip(jobs, errors, strict=True):
        if isinstance(error, Exception):
            print(f"{job}: {error}")
    errors = [float("inf") if isinstance(error, Exception) else error for error in errors]
    results = []
    copies = {n: copy_times(n, dtype) for n in sizes}
    for (n, _, each), error in zip(jobs, errors, strict=True):
        row: dict[str, Any] = {
            "n": n,
            "dtype": dtype,
            "label": label(each),
            "schedule": tuple(each),
            "error_in_floors": round(error, 4),
        }
        if error <= 4:
            cold, hot = (random_rows(n, count, DTYPES[dtype]) for count in (COLD_ELEMENTS, HOT_ELEMENTS))
            copy_cold, copy_hot = copies[n]
            row["cold_us"] = round(graph_time(cold_calls(ours(n, each), cold), _REPEATS), 2)
            row["hot_us"] = round(graph_time(hot_calls(ours(n, each), hot), _REPEATS), 2)
            row["share_of_copy"] = round(copy_cold / row["cold_us"], 3)
            row["share_of_bandwidth"] = round(2 * cold.nbytes / bandwidth * 1e6 / row["cold_us"], 3)
            row["times_copy_hot"] = round(row["hot_us"] / copy_hot, 2)
        results.append(row)
    return results


def copy_times(n: int, dtype: str) -> tuple[float, float]:
    """Of the same rows, cold and hot."""
    cold, hot = (random_rows(n, count, DTYPES[dtype]) for count in (COLD_ELEMENTS, HOT_ELEMENTS))
    return copy_time(cold_calls(copy, cold)), copy_time(hot_calls(copy, hot))


def label(schedule: Schedule) -> str:
    """m * 2^c, rows, and what else tells a size's candidates apart."""
    text = f"{schedule.matrix}*2^{schedule.column_bits} r{schedule.rows}"
    if isinstance(schedule, schedules.HopperSchedule):
        parts = " halves" if schedule.parts > 1 else ""
        return f"{text} hopper{schedule.matrix_rows} {schedule.residents}x{schedule.stages}{parts}"
    return f"{text} w{schedule.num_warps}" + (f" split{schedule.split}" if schedule.split > 1 else "")


def print_best(results: list[dict[str, Any]]) -> None:
    """For each size the fastest schedules, cold and hot, and what fails."""
    for n in dict.fromkeys(row["n"] for row in results):
        timed = [row for row in results if row["n"] == n and "cold_us" in row]
        wrong = sum(row["n"] == n and not row["error_in_floors"] <= 1.05 for row in results)
        cells = [
            f"{row['label']} {row['share_of_copy']:.3f}/{row['times_copy_hot']:.2f}"
            for row in (
                *sorted(timed, key=lambda row: row["cold_us"])[:4],
                *sorted(timed, key=lambda row: row["hot_us"])[:3],
            )
        ]
        print(f"{n} ({len(timed)}, {wrong} wrong): " + " | ".join(cells))


def problems_of(sizes: list[int], dtypes: list[str]) -> list[tuple[int, str, int]]:
    """Size, dtype and number of elements of everything to measure."""
    problems = []
    for n, dtype in product(sizes, dtypes):
        if dtype == "fp32":
            counts = (COLD_ELEMENTS,) * (n in WIDE)
        elif dtype == "bf16" and n in POWERS:
            counts = COUNTS
        else:
            counts = (HOT_ELEMENTS, COLD_ELEMENTS)
        if dtype == "bf16" and n in LARGE:
            counts += LARGE_COUNTS
        problems += [(n, dtype, count) for count in counts]
    return problems


def compile_ahead(job: tuple[int, str, bool]) -> None:
    """Compile what few or many rows take for the disk's cache."""
    n, dtype, is_small = job
    x = random_rows(n, schedules.SMALL if is_small else 2 * schedules.SMALL, DTYPES[dtype])
    ours(n)(x, torch.empty_like(x))
    torch.cuda.synchronize()


def measure(n: int, dtype: str, elements: int, bandwidth: float) -> dict[str, Any]:
    """One size and count, everybody."""
    x = random_rows(n, elements, DTYPES[dtype])
    transforms = {"ours": ours(n)}
    if n <= MAX_DENSE and elements in (HOT_ELEMENTS, COLD_ELEMENTS):
        transforms["dense"] = dense(n, DTYPES[dtype])
    if n & (n - 1) == 0:
        transforms |= peers(n)
    row: dict[str, Any] = {"n": n, "dtype": dtype, "elements": x.numel(), "us": {}, "hot_us": {}}
    row["bandwidth_us"] = round(2 * x.nbytes / bandwidth * 1e6, 2)
    row["us"]["copy"] = round(copy_time(cold_calls(copy, x)), 2)
    for name, transform in transforms.items():
        row["us"][name] = round(graph_time(cold_calls(transform, x), _REPEATS), 2)
    if elements == HOT_ELEMENTS:
        row["hot_us"]["copy"] = round(copy_time(hot_calls(copy, x)), 2)
        for name, transform in transforms.items():
            row["hot_us"][name] = round(graph_time(hot_calls(transform, x), _REPEATS), 2)
    if elements in (HOT_ELEMENTS, COLD_ELEMENTS):
        y = torch.full_like(x, float("nan"))
        transforms["ours"](x, y)
        last = max(1, HOT_ELEMENTS // n)
        row["error_in_floors"] = round(in_floors(y[-last:], exact_transform(x[-last:], n) * n**-0.5), 4)
    return row


def print_rows(rows: list[dict[str, Any]]) -> None:
    """A line for each size and dtype: shares of the copy and of bandwidth by count, hot ratios, the error."""
    for n, dtype in dict.fromkeys((row["n"], row["dtype"]) for row in rows):
        text = f"{n} {dtype}:"
        for row in (row for row in rows if (row["n"], row["dtype"]) == (n, dtype)):
            shares = {name: row["us"]["copy"] / us for name, us in row["us"].items() if name != "copy"}
            text += f" | 2^{math.log2(row['elements']):.0f} "
            text += " ".join(f"{name} {share:.3f}" for name, share in shares.items())
            text += f" ({row['bandwidth_us'] / row['us']['ours']:.3f})"
            if row["hot_us"]:
                hot = {name: us / row["hot_us"]["copy"] for name, us in row["hot_us"].items()}
                text += " hot " + " ".join(f"{name} {ratio:.2f}" for name, ratio in hot.items())
                text += f" of {row['hot_us']['copy']}"
            if "error_in_floors" in row:
                text += f", error {row['error_in_floors']:.3f}"
        print(text)


def main(
    sizes: Annotated[str, typer.Option(help="n, separated by commas; all by default.")] = "",
    dtypes: Annotated[str, typer.Option(help="bf16, fp16, fp32; tuning takes the first.")] = "bf16,fp16,fp32",
    tune_only: Annotated[bool, typer.Option("--tune", help="Time all schedules.")] = False,
    json_file: JsonFile = None,
) -> None:
    require_gpu()
    all_sizes = list(map(int, sizes.split(","))) if sizes else list(TUNED if tune_only else POWERS + OTHERS)
    all_dtypes = dtypes.split(",")
    command = "python scripts/benchmark_hadamard.py" + " --tune" * tune_only
    command += f" --sizes {sizes}" if sizes else ""
    report = about_this_run(f"{command} --dtypes {dtypes}")
    bandwidth = copy_bandwidth()
    report["copy_bandwidth_tb_per_s"] = round(bandwidth / 1e12, 3)
    if tune_only:
        report["schedules"] = tune(all_sizes, all_dtypes[0], bandwidth)
        print_best(report["schedules"])
    else:
        problems = problems_of(all_sizes, all_dtypes)
        kernels = list(dict.fromkeys((n, dtype, count <= schedules.SMALL) for n, dtype, count in problems))
        failed = dict(zip(kernels, in_processes(compile_ahead, kernels), strict=True))
        # The first graph of a run has been wrong by a factor of 3.
        copy_times(all_sizes[0], all_dtypes[0])
        report["rows"] = []
        for n, dtype, count in problems:
            error = failed[n, dtype, count <= schedules.SMALL]
            if error is None:
                report["rows"].append(measure(n, dtype, count, bandwidth))
            else:
                print(f"{n} {dtype}: {error}")
        print_rows(report["rows"])
    write_report(report, json_file)


if __name__ == "__main__":
    typer.run(main)
