"""Speed and error of the Hadamard transform on the CPU, beside the butterfly that it replaces.

    python scripts/benchmark_hadamard_cpu.py --json scripts/results/hadamard_cpu.json

The butterfly is the usual log2 n passes of additions and subtractions in fp32 through torch, with one
rounding at the end and two buffers: over the whole input, and over parts that fit the cache, as our transform
works. Where n = m * 2^k both multiply by the matrix of order m. All are timed in turn, repeat by repeat, so
that a machine that gets slower gets slower for all. Times are medians of the CPU time of one thread: those of
several threads that wait for each other depend on what else the machine does.
"""

import os
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

import torch
import typer
from gpu_report import JsonFile, about_this_run, write_report

from hf_hadacore import hadamard_transform
from hf_hadacore.hadamard_matrices import hadamard_factors, hadamard_matrix

SIZES = (128, 1024, 4096, 14336, 32768)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
CACHED_ELEMENTS = 1 << 18


def butterfly(x: torch.Tensor) -> torch.Tensor:
    """The orthonormal transform of every row of ``[rows, m * 2^k]``, as `hadamard_transform` defines it.

    m is the order of the factor that is not a power of two: one such factor at most.
    """
    n = x.shape[1]
    m = _mixed_order(n)
    source = x.to(torch.float32, copy=True)
    target = torch.empty_like(source)
    half = 1
    while half < n // m:
        pairs, result = (y.view(-1, 2, half) for y in (source, target))
        torch.add(pairs[:, 0], pairs[:, 1], out=result[:, 0])
        torch.sub(pairs[:, 0], pairs[:, 1], out=result[:, 1])
        source, target = target, source
        half *= 2
    if m > 1:
        columns = source.view(-1, m, n // m)
        h = hadamard_matrix(m).float().expand(columns.shape[0], m, m)
        source = torch.bmm(h, columns).view_as(x)
    return source.mul_(n**-0.5).to(x.dtype)


def _mixed_order(n: int) -> int:
    factors = hadamard_factors(n)
    return factors[0] if len(factors) > 1 else 1


def butterfly_in_cache(x: torch.Tensor) -> torch.Tensor:
    """`butterfly` of a few rows at a time."""
    out = torch.empty_like(x)
    rows = max(1, CACHED_ELEMENTS // x.shape[1])
    for part, result in zip(x.split(rows), out.split(rows), strict=True):
        result.copy_(butterfly(part))
    return out


IMPLEMENTATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "hadamard_transform": hadamard_transform,
    "butterfly": butterfly,
    "butterfly_in_cache": butterfly_in_cache,
    "clone": torch.clone,
}


def duration(function: Callable[[], object], least: float = 0.05) -> float:
    """CPU time of one call in milliseconds, from calls that take that many seconds together."""
    calls, start = 0, time.process_time()
    while (elapsed := time.process_time() - start) < least:
        function()
        calls += 1
    return 1e3 * elapsed / calls


def errors_in_floors(x: torch.Tensor) -> dict[str, float]:
    """Relative L2 error against float64, in multiples of that of one rounding of the exact result."""
    exact = x.double() @ hadamard_matrix(x.shape[1]).double().T * x.shape[1] ** -0.5
    floor = (exact.to(x.dtype).double() - exact).norm()
    results = {name: function(x) for name, function in IMPLEMENTATIONS.items() if name != "clone"}
    return {name: round(float((y.double() - exact).norm() / floor), 3) for name, y in results.items()}


@torch.inference_mode()
def measure(n: int, dtype: torch.dtype, elements: int, repeats: int) -> dict[str, Any]:
    """Median milliseconds of every implementation, and its error."""
    x = torch.randn(elements // n, n, generator=torch.Generator().manual_seed(0)).to(dtype)
    times: dict[str, list[float]] = {name: [] for name in IMPLEMENTATIONS}
    for _ in range(repeats):
        for name, function in IMPLEMENTATIONS.items():
            function(x)  # warms up
            times[name].append(duration(partial(function, x)))
    milliseconds = {name: round(statistics.median(values), 3) for name, values in times.items()}
    # Few rows: the matrix of the largest size takes 8 GB in float64.
    errors = errors_in_floors(x[:32]) if n < 32768 else None
    best_butterfly = min(milliseconds["butterfly"], milliseconds["butterfly_in_cache"])
    speedup = round(best_butterfly / milliseconds["hadamard_transform"], 2)
    print(f"{n:6} {str(dtype)[6:]:9} {milliseconds}  {speedup:.2f}x  errors {errors}", flush=True)
    return {
        "n": n,
        "rows": x.shape[0],
        "dtype": str(dtype).removeprefix("torch."),
        "milliseconds": milliseconds,
        "speedup_over_faster_butterfly": speedup,
        "error_in_floors": errors,
    }


def main(
    elements: Annotated[int, typer.Option(help="Elements of the input.")] = 1 << 22,
    repeats: int = 9,
    json_file: JsonFile = None,
) -> None:
    torch.set_num_threads(1)
    results = [measure(n, dtype, elements, repeats) for n in SIZES for dtype in DTYPES]
    result = {
        **about_this_run(
            f"python scripts/benchmark_hadamard_cpu.py --elements {elements} --repeats {repeats}"
        ),
        "device": f"cpu, {platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} thread",
        "isa": torch.backends.cpu.get_cpu_capability(),
        "elements": elements,
        "repeats": repeats,
        "results": results,
    }
    write_report(result, json_file)


if __name__ == "__main__":
    typer.run(main)
