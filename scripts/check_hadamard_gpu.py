"""Are the Gluon kernels of the Hadamard transform right on this GPU?

    python scripts/check_hadamard_gpu.py --json scripts/results/check_hadamard.json
    compute-sanitizer python scripts/check_hadamard_gpu.py --sanitize

Errors are relative L2 against float64, in multiples of the error that rounding the exact result once would
have. Every output is filled with NaN before the kernel runs.
"""

import math
import random
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
import typer
from gpu_processes import in_processes
from gpu_report import JsonFile, SanitizeOnly, about_this_run, conclude

from hf_hadacore.hadamard_matrices import hadamard_factors, hadamard_matrix
from hf_hadacore.kernels.hadamard_schedules import SMALL, HopperSchedule, choose_hopper, steps_of
from hf_hadacore.kernels.hadamard_triton import launch

SIZES = (
    *(1 << k for k in range(17)),
    *(12, 20, 24, 28, 40, 80, 96, 112, 192, 576, 768, 1152, 3072, 4864, 5120, 5632, 6144, 8960, 9216, 10240),
    *(11008, 13824, 14336, 18944, 24576, 27648, 28672, 29568, 53248),
)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
CASES = 10_500
# From this size on, many rows may have another kernel than few.
LONG = 2048
LAYOUTS = ("contiguous", "rows apart", "every second row", "in place", "in place, rows apart")
REPEATS = 1000
REPEATED = (256, 1024, 8192, 32768, 14336, 11008)
# In floors: fp32 is held to what a butterfly of fp32 additions would have.
LIMITS = {torch.float16: 1.05, torch.bfloat16: 1.05, torch.float32: 4.0}
_MAX_PRODUCT = 64

Job = partial[Any]


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


def distance(y: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """``[2]``: the L2 norm of the error of y, and what rounding the exact result to its dtype would give."""
    rounded = exact.to(y.dtype).double()
    return torch.stack(((y.double() - exact).norm(), (rounded - exact).norm()))


def ratio(error: float, floor: float) -> float:
    return error / floor if floor > 0 else error


def in_floors(y: torch.Tensor, exact: torch.Tensor) -> float:
    """The error of y in multiples of the one-rounding floor of its dtype; 0 where neither is off."""
    return ratio(*distance(y, exact).tolist())


class Group(NamedTuple):
    """Random cases that share their kernels."""

    seed: int
    n: int
    dtype: torch.dtype
    has_sign: bool
    is_large: bool
    cases: int


def run_case(draw: random.Random, group: Group) -> tuple[torch.Tensor, dict[str, Any]]:
    """One random problem: its `distance` and how many elements beyond its rows changed, ``[3]``; what it was.

    The numbers stay on the GPU: many processes share it, and each that waits for it waits for the others.
    """
    n, dtype = group.n, group.dtype
    if group.is_large:
        most = 2 * SMALL // n
        rows = draw.randint(most // 2 + 1, most)
    else:
        most = max(1, min(700, (1 << 20) // n))
        rows = draw.choice([1, 2, 3, most, draw.randint(1, most), draw.randint(1, most)])
    layout = draw.choice(LAYOUTS)
    scale = draw.choice([n**-0.5, n**-0.5, 0.37 * n**-0.5])
    transpose = draw.random() < 0.3
    step = 2 if layout == "every second row" else 1
    wide = torch.randn(step * rows + 1, n + 8 * draw.randint(1, 4), device="cuda").to(dtype)
    if draw.random() < 0.3:
        wide[:, draw.randrange(n)] *= 300  # an outlier channel
    x = wide[: step * rows : step, :n]
    if layout in ("contiguous", "in place"):
        x = x.contiguous()
    sign = (torch.randint(0, 2, (n,), device="cuda") * 2 - 1).to(dtype) if group.has_sign else None
    exact = exact_transform(x if sign is None else x * sign, n, transpose) * scale
    guard = wide[:, n:].clone()
    in_place = layout.startswith("in place")
    out = x if in_place else torch.full_like(x, float("nan"), memory_format=torch.contiguous_format)
    launch(x, out, factors=hadamard_factors(n), scale=scale, sign=sign, transpose=transpose)
    beyond = (wide[:, n:] != guard).sum().double()
    what = group._asdict() | {"dtype": str(dtype), "rows": rows, "layout": layout, "transpose": transpose}
    return torch.cat((distance(out, exact), beyond[None])), what


def run_group(group: Group) -> list[tuple[float, dict[str, Any]]]:
    """The cases of a group, and their errors in floors; NaN where something else was overwritten."""
    torch.manual_seed(group.seed)
    draw = random.Random(group.seed)
    measured, cases = zip(*(run_case(draw, group) for _ in range(group.cases)), strict=True)
    return [
        (float("nan") if beyond else ratio(error, floor), what)
        for (error, floor, beyond), what in zip(torch.stack(measured).tolist(), cases, strict=True)
    ]


def random_groups() -> list[Group]:
    """Two dtypes of each size, one with signs, which take kernels of their own; long rows also in numbers."""
    drawn = [
        (n, DTYPES[(i + j) % 3], (i // 3 + j) % 2 == 1, j == i % 2 and n >= LONG)
        for i, n in enumerate(SIZES)
        for j in range(2)
    ]
    cases = -(-CASES // len(drawn))
    return [Group(seed, *group, cases) for seed, group in enumerate(drawn)]


def summary_of_cases(results: list[tuple[float, dict[str, Any]]]) -> dict[str, Any]:
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


def repeats_are_identical(n: int, elements: int) -> bool:
    x = torch.randn(elements // n + 1, n, device="cuda", dtype=torch.bfloat16)
    first, y = torch.empty_like(x), torch.empty_like(x)
    options: dict[str, Any] = dict(factors=hadamard_factors(n), scale=n**-0.5)
    launch(x, first, **options)
    different = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(REPEATS):
        y.fill_(float("nan"))
        launch(x, y, **options)
        different += (y != first).sum()
    return int(different) == 0


def bad_rows_stay_alone(n: int, dtype: torch.dtype, is_hopper: bool) -> bool:
    """inf and NaN show in the rows that hold them and nowhere else; large values that fit do not overflow."""
    schedule = hopper_schedule(n) if is_hopper else None
    options: dict[str, Any] = dict(factors=hadamard_factors(n), scale=n**-0.5, schedule=schedule)
    good = [row for row in range(37) if row != 17]
    is_right = True
    for value in (float("nan"), float("inf")):
        x = torch.randn(37, n, device="cuda").to(dtype)
        x[17, n // 3] = value
        y = torch.empty_like(x)
        launch(x, y, **options)
        is_right &= bool(y[good].isfinite().all()) and not y[17].isfinite().any()
    x = torch.full((3, n), 60000.0 if dtype == torch.float16 else 1e30, device="cuda").to(dtype)
    x *= torch.randint(0, 2, x.shape, device="cuda") * 2 - 1
    y = torch.empty_like(x)
    launch(x, y, **options)
    exact = exact_transform(x, n) * n**-0.5
    return is_right and torch.equal(y.isfinite(), exact.to(dtype).isfinite())


def hopper_schedule(n: int) -> HopperSchedule | None:
    """For few rows too."""
    if torch.cuda.get_device_capability()[0] != 9:
        return None
    steps = steps_of(hadamard_factors(n))
    return choose_hopper(steps.heads, steps.column_bits, is_small=False)


def error_of_many_rows(n: int) -> float:
    """Of the last rows of more than 2^31 elements."""
    rows = (1 << 31) // n + 3
    x = torch.randn(rows, n, device="cuda", dtype=torch.bfloat16)
    tail = x[-2:].clone()
    launch(x, x, factors=hadamard_factors(n), scale=n**-0.5)
    return in_floors(x[-2:], exact_transform(tail, n) * n**-0.5)


def error_of_rows_far_apart(n: int) -> float:
    """Of two rows that begin more than 2^31 elements apart."""
    memory = torch.zeros((1 << 31) + 2 * n, device="cuda", dtype=torch.float16)
    x = memory.as_strided((2, n), ((1 << 31) + n, 1))
    x.normal_()
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    launch(x, y, factors=hadamard_factors(n), scale=n**-0.5)
    return in_floors(y, exact_transform(x, n) * n**-0.5)


def check_everything() -> tuple[dict[str, Any], list[str]]:
    """What was found, and what of it is not right."""
    # Those that take longest to compile come first.
    groups: list[Job] = [partial(run_group, group) for group in random_groups()[::-1]]
    repeats: list[Job] = [
        partial(repeats_are_identical, n, elements) for n, elements in product(REPEATED, (1 << 20, 2 * SMALL))
    ]
    bad_rows: list[Job] = [
        partial(bad_rows_stay_alone, n, dtype, False)
        for n, dtype in product((128, 256, 4096, 32768, 14336, 112), DTYPES)
    ]
    bad_rows += [
        partial(bad_rows_stay_alone, n, dtype, True)
        for n, dtype in product((32768, 14336, 11008), DTYPES[:2])
    ]
    far: list[Job] = [partial(error_of_many_rows, n) for n in (256, 8192, 14336, 65536)]
    far.append(partial(error_of_rows_far_apart, 4096))
    jobs = groups + bad_rows + far + repeats
    outcomes = dict(zip(jobs, in_processes(call, jobs), strict=True))
    done = {job: outcome for job, outcome in outcomes.items() if not isinstance(outcome, Exception)}
    beyond = [done[job] for job in far if job in done]
    report: dict[str, Any] = {
        "random_cases": summary_of_cases([case for job in groups if job in done for case in done[job]]),
        "repeats": {
            "repeats": REPEATS,
            "sizes": REPEATED,
            "bit_identical": all(done.get(job) for job in repeats),
        },
        "bad_rows_stay_alone": all(done.get(job) for job in bad_rows),
        "worst_error_beyond_2_31_elements": round(max(beyond, default=float("nan")), 4),
    }
    failed = [f"{name(job)}: {outcomes[job]}" for job in jobs if job not in done]
    failed += [name(job) for job in repeats + bad_rows if job in done and not done[job]]
    failed += ["random cases"] if report["random_cases"]["wrong"] else []
    failed += [] if max(beyond, default=math.inf) <= LIMITS[torch.bfloat16] else ["beyond 2^31 elements"]
    return report, failed


def call(job: Job) -> Any:
    return job()


def name(job: Job) -> str:
    return f"{job.func.__name__}{job.args}"


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


def main(
    json_file: JsonFile = None,
    sanitize_only: SanitizeOnly = False,
) -> None:
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0):
        raise SystemExit("this check needs an NVIDIA GPU with bf16 tensor cores")
    if sanitize_only:
        return sanitize()
    report, failed = check_everything()
    conclude(about_this_run("python scripts/check_hadamard_gpu.py") | report, failed, json_file)


if __name__ == "__main__":
    typer.run(main)
