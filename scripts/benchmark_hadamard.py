"""The Hadamard transform beside a copy, a dense product and every peer that can be imported, in one run.

    python scripts/benchmark_hadamard.py --json scripts/results/hadamard.json
    python scripts/benchmark_hadamard.py --tune --json hadamard_tune.json

Times are microseconds of a call, medians of CUDA-graph replays. Cold calls rotate through enough inputs to
leave the L2 cache behind; their share is that of the copy bandwidth, which is measured outside of graphs. Hot
calls transform the same small input again and again; their ratio is to a copy of it in such a graph. Errors
are relative L2 against float64, in multiples of the error of rounding the exact result once.

`--tune` times every schedule worth trying, one by one, once all are compiled and checked side by side.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from check_hadamard_gpu import about_this_run, exact_transform, in_floors, in_processes, write_report

from hf_hadacore.hadamard_matrices import hadamard_factors, hadamard_matrix
from hf_hadacore.kernels import hadamard_schedules as schedules
from hf_hadacore.kernels.hadamard_triton import launch
from hf_hadacore.kernels.measure import copies_to_rotate, copy_bandwidth, graph_time

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
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
HOT_ELEMENTS = 1 << 20
COLD_ELEMENTS = 1 << 25
COUNTS = tuple(1 << k for k in range(20, 28))
# Larger matrices make no sense dense.
MAX_DENSE = 1024
_HOT_CALLS = 20

Transform = Callable[[torch.Tensor, torch.Tensor], object]


def ours(n: int, schedule: schedules.Schedule | None = None) -> Transform:
    return partial(launch, factors=hadamard_factors(n), scale=n**-0.5, schedule=schedule)


def dense(n: int, dtype: torch.dtype) -> Transform:
    matrix = (hadamard_matrix(n).cuda().double() * n**-0.5).to(dtype).T.contiguous()
    return lambda x, out: torch.mm(x, matrix, out=out)


def peers(n: int) -> dict[str, Transform]:
    """Those that are installed; a power of two is the only size that means the same to all."""
    found: dict[str, Transform] = {}
    try:
        from fast_hadamard_transform import hadamard_transform

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


def cold_time(transform: Transform, x: torch.Tensor) -> float:
    """Of one call, inputs and outputs coming from memory."""
    count = copies_to_rotate(2 * x.nbytes)
    inputs = [x, *(x.clone() for _ in range(count - 1))]
    calls = [partial(transform, each, torch.empty_like(x)) for each in inputs]
    return graph_time(calls, repeats=9)


def hot_time(transform: Transform, x: torch.Tensor) -> float:
    return graph_time([partial(transform, x, torch.empty_like(x))] * _HOT_CALLS, repeats=9)


def copy(x: torch.Tensor, out: torch.Tensor) -> None:
    out.copy_(x)


def compile_and_check(job: tuple[int, str, schedules.Schedule]) -> float:
    """Compile one schedule's kernel for the disk's cache; its error in floors."""
    n, dtype, schedule = job
    torch.manual_seed(n)
    # An odd number of rows, more than a program's.
    x = random_rows(n, n * (2 * schedule.rows + 1), DTYPES[dtype])
    y = torch.full_like(x, float("nan"))
    try:
        ours(n, schedule)(x, y)
        return in_floors(y, exact_transform(x, n) * n**-0.5)
    except Exception as error:
        print(f"{n} {schedule}: {type(error).__name__}: {str(error)[:200]}")
        return float("inf")


def tune(sizes: list[int], dtype: str, bandwidth: float) -> list[dict[str, Any]]:
    """Every schedule's error and times."""
    jobs = []
    for n in sizes:
        steps = schedules.steps_of(hadamard_factors(n))
        found = schedules.candidates(steps.heads, steps.column_bits)
        chosen = schedules.choose(steps.heads, steps.column_bits, dtype == "fp32")
        jobs += [(n, dtype, each) for each in dict.fromkeys([chosen, *found])]
    errors = list(in_processes(compile_and_check, jobs))
    copy_hot = {n: hot_time(copy, random_rows(n, HOT_ELEMENTS, DTYPES[dtype])) for n in sizes}
    results = []
    for (n, _, each), error in zip(jobs, errors, strict=True):
        row: dict[str, Any] = {
            "n": n,
            "dtype": dtype,
            "schedule": tuple(each),
            "error_in_floors": round(error, 4),
        }
        if error <= 4:
            x = random_rows(n, COLD_ELEMENTS, DTYPES[dtype])
            row["cold_us"] = round(cold_time(ours(n, each), x), 2)
            row["share_of_copy"] = round(2 * x.nbytes / bandwidth * 1e6 / row["cold_us"], 3)
            x = random_rows(n, HOT_ELEMENTS, DTYPES[dtype])
            row["hot_us"] = round(hot_time(ours(n, each), x), 2)
            row["times_copy_hot"] = round(row["hot_us"] / copy_hot[n], 2)
        results.append(row)
    return results


def print_best(results: list[dict[str, Any]]) -> None:
    """For each size the fastest schedules, cold and hot, and what fails."""
    for n in dict.fromkeys(row["n"] for row in results):
        timed = [row for row in results if row["n"] == n and "cold_us" in row]
        wrong = sum(row["n"] == n and not row["error_in_floors"] <= 1.05 for row in results)
        cells = [
            f"{row['schedule'][0]}*2^{row['schedule'][1]} r{row['schedule'][2]} w{row['schedule'][3]}"
            f"{'m' if row['schedule'][4] else ''}{'u' if row['schedule'][5] else ''}s{row['schedule'][6]} "
            f"{row['share_of_copy']:.3f}/{row['times_copy_hot']:.2f}"
            for row in (
                *sorted(timed, key=lambda row: row["cold_us"])[:3],
                *sorted(timed, key=lambda row: row["hot_us"])[:2],
            )
        ]
        print(f"{n} ({len(timed)}, {wrong} wrong): " + " | ".join(cells))


def compile_ahead(job: tuple[int, str]) -> None:
    n, dtype = job
    x = random_rows(n, 8 * n, DTYPES[dtype])
    ours(n)(x, torch.empty_like(x))
    torch.cuda.synchronize()


def measure(n: int, dtype: str, elements: int, bandwidth: float) -> dict[str, Any]:
    """One size and count, everybody."""
    x = random_rows(n, elements, DTYPES[dtype])
    transforms = {"ours": ours(n)}
    if elements in (HOT_ELEMENTS, COLD_ELEMENTS):
        if n <= MAX_DENSE:
            transforms["dense"] = dense(n, DTYPES[dtype])
        if n & (n - 1) == 0:
            transforms |= peers(n)
    row: dict[str, Any] = {"n": n, "dtype": dtype, "elements": x.numel(), "us": {}, "hot_us": {}}
    row["floor_us"] = round(2 * x.nbytes / bandwidth * 1e6, 2)
    for name, transform in transforms.items():
        row["us"][name] = round(cold_time(transform, x), 2)
        if elements == HOT_ELEMENTS:
            row["hot_us"][name] = round(hot_time(transform, x), 2)
    if elements == HOT_ELEMENTS:
        row["hot_us"]["copy"] = round(hot_time(copy, x), 2)
        y = torch.full_like(x, float("nan"))
        transforms["ours"](x, y)
        row["error_in_floors"] = round(in_floors(y, exact_transform(x, n) * n**-0.5), 4)
    return row


def print_rows(rows: list[dict[str, Any]]) -> None:
    """A line for each size and dtype: our share of the copy by count, others', hot ratios."""
    for n, dtype in dict.fromkeys((row["n"], row["dtype"]) for row in rows):
        group = [row for row in rows if (row["n"], row["dtype"]) == (n, dtype)]
        shares = " ".join(f"{row['floor_us'] / row['us']['ours']:.2f}" for row in group)
        text = f"{n} {dtype}: {shares}"
        for row in group:
            others = {name: us for name, us in row["us"].items() if name != "ours"}
            if row["hot_us"]:
                ratios = {
                    name: us / row["hot_us"]["copy"] for name, us in row["hot_us"].items() if name != "copy"
                }
                text += f" | hot/copy {', '.join(f'{name} {ratio:.2f}' for name, ratio in ratios.items())}"
                text += f", error {row['error_in_floors']:.3f}"
            elif others:
                text += " | " + ", ".join(f"{name} {row['floor_us'] / us:.2f}" for name, us in others.items())
        print(text)


def main(
    sizes: Annotated[str, typer.Option(help="n, separated by commas.")] = ",".join(map(str, POWERS + OTHERS)),
    dtypes: Annotated[str, typer.Option(help="fp16, bf16, fp32, separated by commas.")] = "bf16,fp16,fp32",
    counts: Annotated[str, typer.Option(help="Numbers of elements.")] = ",".join(map(str, COUNTS)),
    tune_only: Annotated[bool, typer.Option("--tune", help="Time all schedules (first dtype).")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Where to write the results.")] = None,
) -> None:
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA device")
    all_sizes, all_dtypes = list(map(int, sizes.split(","))), dtypes.split(",")
    command = f"python scripts/benchmark_hadamard.py --sizes {sizes} --dtypes {dtypes} --counts {counts}"
    bandwidth = copy_bandwidth()
    report = about_this_run(command + " --tune" * tune_only)
    report["copy_bandwidth_tb_per_s"] = round(bandwidth / 1e12, 3)
    if tune_only:
        report["schedules"] = tune(all_sizes, all_dtypes[0], bandwidth)
        print_best(report["schedules"])
    else:
        list(in_processes(compile_ahead, [(n, dtype) for n in all_sizes for dtype in all_dtypes]))
        report["rows"] = [
            measure(n, dtype, count, bandwidth)
            for n in all_sizes
            for dtype in all_dtypes
            for count in map(int, counts.split(","))
        ]
        print_rows(report["rows"])
    write_report(report, json_file)


if __name__ == "__main__":
    typer.run(main)
