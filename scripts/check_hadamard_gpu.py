"""Are the Gluon kernels of the Hadamard transform right on this GPU?

    python scripts/check_hadamard_gpu.py --json scripts/results/check_hadamard.json
    compute-sanitizer python scripts/check_hadamard_gpu.py --sanitize

Errors are relative L2 against float64, in multiples of the error that rounding the exact result once would
have. Every output is filled with NaN before the kernel runs.
"""

import json
import multiprocessing
import os
import platform
import random
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import triton
import typer

import hf_hadacore
from hf_hadacore.hadamard_matrices import hadamard_factors, hadamard_matrix
from hf_hadacore.kernels.hadamard_schedules import SMALL, HopperSchedule, choose_hopper, steps_of
from hf_hadacore.kernels.hadamard_triton import launch

SIZES = (
    *(1 << k for k in range(17)),
    *(
        12,
        20,
        24,
        28,
        40,
        80,
        96,
        112,
        192,
        576,
        768,
        896,
        1152,
        1536,
        3072,
        4864,
        5120,
        5632,
        6144,
        8960,
        9216,
    ),
    *(10240, 11008, 13824, 14336, 18944, 27648, 28672, 29568, 53248),
)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
CASES = 10_500
LAYOUTS = ("contiguous", "rows apart", "every second row", "in place", "in place, rows apart")
REPEATS = 1000
# In floors: fp32 is held to what a butterfly of fp32 additions would have.
LIMITS = {torch.float16: 1.05, torch.bfloat16: 1.05, torch.float32: 4.0}
_MAX_PRODUCT = 64


def exact_transform(x: torch.Tensor, n: int, transpose: bool = False) -> torch.Tensor:
    """H x per row in float64."""
    factors = list(hadamard_factors(n))
    while factors[-1] > _MAX_PRODUCT and factors[-1] & (factors[-1] - 1) == 0:
        factors[-1:] = [_MAX_PRODUCT, factors[-1] // _MAX_PRODUCT]
    y, inner = x.double(), n
    for order in factors:
        inner //= order
        matrix = hadamard_matrix(order).to(x.device, torch.float64)
        y = (matrix.T if transpose else matrix) @ y.reshape(-1, order, inner)
    return y.reshape(x.shape)


def in_floors(y: torch.Tensor, exact: torch.Tensor) -> float:
    """The error of y in multiples of the one-rounding floor of its dtype; 0 where neither is off."""
    floor = (exact.to(y.dtype).double() - exact).norm()
    error = (y.double() - exact).norm()
    return float(error / floor) if floor > 0 else float(error)


def run_case(draw: random.Random, n: int, dtype: torch.dtype, has_sign: bool) -> tuple[float, dict[str, Any]]:
    """One random problem; its error in floors, and what it was."""
    # Long rows have kernels of their own where there are many.
    is_large = n >= 2048 and draw.random() < 0.15
    most = (2 * SMALL) // n if is_large else max(1, min(700, (1 << 20) // n))
    if is_large:
        rows = draw.randint(most // 2 + 1, most)
    else:
        rows = draw.choice([1, 2, 3, most, draw.randint(1, most), draw.randint(1, most)])
    layout = draw.choice(
        ["contiguous", "contiguous", "rows apart", "every second row", "in place", "in place, apart"]
    )
    scale = draw.choice([n**-0.5, n**-0.5, 0.37 * n**-0.5])
    transpose = draw.random() < 0.3
    wide = torch.randn(2 * rows + 1, n + 8 * draw.randint(1, 4), device="cuda").to(dtype)
    if draw.random() < 0.3:
        wide[:, draw.randrange(n)] *= 300  # an outlier channel
    if layout in ("contiguous", "in place"):
        x = wide[:rows, :n].contiguous()
    elif layout == "every second row":
        x = wide[: 2 * rows : 2, :n]
    else:
        x = wide[:rows, :n]
    sign = (torch.randint(0, 2, (n,), device="cuda") * 2 - 1).to(dtype) if has_sign else None
    exact = exact_transform(x if sign is None else x * sign, n, transpose) * scale
    guard = wide[:, n:].clone()
    out = (
        x
        if layout.startswith("in place")
        else torch.full_like(x, float("nan"), memory_format=torch.contiguous_format)
    )
    launch(x, out, factors=hadamard_factors(n), scale=scale, sign=sign, transpose=transpose)
    assert torch.equal(wide[:, n:], guard), "written beyond a row"
    what = {
        "n": n,
        "rows": rows,
        "dtype": str(dtype),
        "layout": layout,
        "transpose": transpose,
        "sign": has_sign,
    }
    return in_floors(out, exact), what


def run_group(job: tuple[int, int, torch.dtype, bool, int]) -> list[tuple[float, dict[str, Any]]]:
    """Many cases that share their kernels."""
    number, n, dtype, has_sign, count = job
    torch.manual_seed(number)
    draw = random.Random(number)
    return [run_case(draw, n, dtype, has_sign) for _ in range(count)]


def in_processes(function, jobs: list) -> Iterator:
    """Map over processes: what takes time is compiling."""
    workers = min(14, os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(function, jobs)


def check_cases() -> dict[str, Any]:
    # Signs take kernels of their own: one dtype in two, not the same for every size.
    groups = [(n, dtype, (i + j) % 2 == 1) for i, n in enumerate(SIZES) for j, dtype in enumerate(DTYPES)]
    count = -(-CASES // len(groups))
    # Those that take longest to compile come first.
    jobs = [(number, *group, count) for number, group in enumerate(groups)][::-1]
    results = [case for cases in in_processes(run_group, jobs) for case in cases]
    worst, wrong = {}, []
    for dtype in DTYPES:
        of_dtype = [result for result in results if result[1]["dtype"] == str(dtype)]
        error, what = max(of_dtype, key=lambda result: (result[0] != result[0], result[0]))
        worst[str(dtype)] = {"error_in_floors": round(error, 4), "case": what}
        wrong += [what for error, what in of_dtype if not error <= LIMITS[dtype]]
    return {
        "cases": len(results),
        "sizes": len(SIZES),
        "wrong": len(wrong),
        "wrong_cases": wrong[:5],
        "worst": worst,
    }


def check_repeats() -> dict[str, Any]:
    identical = True
    sizes, counts = (256, 1024, 8192, 32768, 14336, 11008), (1 << 20, 2 * SMALL)
    for n, elements in product(sizes, counts):
        x = torch.randn(elements // n + 1, n, device="cuda", dtype=torch.bfloat16)
        first, y = torch.empty_like(x), torch.empty_like(x)
        options: dict[str, Any] = dict(factors=hadamard_factors(n), scale=n**-0.5)
        launch(x, first, **options)
        for _ in range(REPEATS):
            y.fill_(float("nan"))
            launch(x, y, **options)
            identical &= torch.equal(y, first)
    return {"repeats": REPEATS, "sizes": sizes, "elements": counts, "bit_identical": identical}


def check_bad_rows() -> bool:
    """inf and NaN show in the rows that hold them and nowhere else; large values that fit do not overflow."""
    problems: list[tuple[int, torch.dtype, HopperSchedule | None]]
    problems = [(n, dtype, None) for n in (128, 256, 4096, 32768, 14336, 112) for dtype in DTYPES]
    problems += [(n, dtype, hopper_schedule(n)) for n in (32768, 14336, 11008) for dtype in DTYPES[:2]]
    for n, dtype, schedule in problems:
        options: dict[str, Any] = dict(factors=hadamard_factors(n), scale=n**-0.5, schedule=schedule)
        for value in (float("nan"), float("inf")):
            x = torch.randn(37, n, device="cuda").to(dtype)
            x[17, n // 3] = value
            y = torch.empty_like(x)
            launch(x, y, **options)
            good = [row for row in range(37) if row != 17]
            assert y[good].isfinite().all() and not y[17].isfinite().any(), (n, dtype, value)
        x = torch.full((3, n), 60000.0 if dtype == torch.float16 else 1e30, device="cuda").to(dtype)
        x *= torch.randint(0, 2, x.shape, device="cuda") * 2 - 1
        y = torch.empty_like(x)
        launch(x, y, **options)
        exact = exact_transform(x, n) * n**-0.5
        assert torch.equal(y.isfinite(), exact.to(dtype).isfinite()), (n, dtype)
    return True


def hopper_schedule(n: int) -> HopperSchedule | None:
    """For few rows too."""
    if torch.cuda.get_device_capability()[0] != 9:
        return None
    steps = steps_of(hadamard_factors(n))
    return choose_hopper(steps.heads, steps.column_bits)


def check_beyond_int32() -> dict[str, float]:
    """More than 2^31 elements, and rows more than 2^31 elements apart; errors of the last rows."""
    worst = {}
    for n in (256, 8192, 14336, 65536):
        rows = (1 << 31) // n + 3
        x = torch.randn(rows, n, device="cuda", dtype=torch.bfloat16)
        tail = x[-2:].clone()
        launch(x, x, factors=hadamard_factors(n), scale=n**-0.5)
        worst[str(n)] = in_floors(x[-2:], exact_transform(tail, n) * n**-0.5)
        del x
    memory = torch.zeros((1 << 31) + 8192, device="cuda", dtype=torch.float16)
    x = memory.as_strided((2, 4096), ((1 << 31) + 4096, 1))
    x.normal_()
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    launch(x, y, factors=(4096,), scale=4096**-0.5)
    worst["apart"] = in_floors(y, exact_transform(x, 4096) * 4096**-0.5)
    return {name: round(error, 4) for name, error in worst.items()}


def sanitize() -> None:
    """Small problems of the main kinds of kernels, for compute-sanitizer."""
    sizes = (64, 128, 112, 256, 1024, 4096, 8192, 32768, 768, 13824, 14336, 29568, 65536)
    for n, (dtype, has_sign) in product(sizes, ((torch.bfloat16, True), (torch.float32, False))):
        for rows in (1, 35) if n <= 1024 else (3,):
            x = torch.randn(rows, n, device="cuda").to(dtype)
            sign = torch.ones(n, device="cuda", dtype=dtype) if has_sign else None
            y = torch.full_like(x, float("nan"))
            launch(x, y, factors=hadamard_factors(n), scale=n**-0.5, sign=sign)
            assert y.isfinite().all(), (n, dtype, rows)
    for n, has_sign in product((32768, 14336, 11008), (False, True)):
        x = torch.randn(7, n, device="cuda", dtype=torch.bfloat16)
        sign = torch.ones(n, device="cuda", dtype=x.dtype) if has_sign else None
        y = torch.full_like(x, float("nan"))
        options: dict[str, Any] = dict(factors=hadamard_factors(n), scale=n**-0.5)
        launch(x, y, **options, sign=sign, schedule=hopper_schedule(n))
        assert y.isfinite().all(), n
    torch.cuda.synchronize()
    print("sanitize: every kernel ran")


def about_this_run(command: str) -> dict[str, Any]:
    return {
        "command": command,
        "date": datetime.now(UTC).date().isoformat(),
        "device": torch.cuda.get_device_name(),
        "versions": {
            "hf_hadacore": hf_hadacore.__version__,
            "torch": torch.__version__,
            "triton": triton.__version__,
            "python": platform.python_version(),
        },
    }


def write_report(report: dict[str, Any], json_file: Path | None) -> None:
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(report, indent=1) + "\n")


def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="Where to write the results.")] = None,
    sanitize_only: Annotated[
        bool, typer.Option("--sanitize", help="Small run for compute-sanitizer.")
    ] = False,
) -> None:
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0):
        raise SystemExit("this check needs an NVIDIA GPU with bf16 tensor cores")
    if sanitize_only:
        return sanitize()
    report = about_this_run("python scripts/check_hadamard_gpu.py") | {
        "random_cases": check_cases(),
        "repeats": check_repeats(),
        "bad_rows_stay_alone": check_bad_rows(),
        "beyond_2_31_elements": check_beyond_int32(),
    }
    print(json.dumps(report, indent=1))
    write_report(report, json_file)
    is_right = (
        report["random_cases"]["wrong"] == 0
        and report["repeats"]["bit_identical"]
        and max(report["beyond_2_31_elements"].values()) <= LIMITS[torch.bfloat16]
    )
    if not is_right:
        raise SystemExit("the transform is not right on this GPU")


if __name__ == "__main__":
    typer.run(main)
