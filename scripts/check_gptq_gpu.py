"""Is GPTQ right on this GPU, and what does a decoder layer of an 8B model cost?

    python scripts/check_gptq_gpu.py --json scripts/results/check_gptq.json
    compute-sanitizer python scripts/check_gptq_gpu.py --sanitize

The kernels that go through chunks of columns must give the bits of the loops in torch on the same GPU, and
the same ones every time; so must the whole of GPTQ with them. Weights are also quantized on the CPU, whose
sums are of another order: errors must agree, and all rows but those in which a tie was decided by it.

The time of a layer is that of its Hessians, factorizations and weights, on random inputs, without the model's
own forward passes; once with the loops in torch.
"""

import itertools
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import typer
from gpu_report import JsonFile, SanitizeOnly, about_this_run, conclude

from hf_hadacore.solvers import coordinate_descent, gptq
from hf_hadacore.solvers.act_order import falling_diagonal
from hf_hadacore.solvers.columns import (
    descend_columns,
    descend_columns_reference,
    round_columns,
    round_columns_reference,
)
from hf_hadacore.solvers.gptq import GptqResult, gptq_quantize
from hf_hadacore.solvers.hessian import Hessian, factorize

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from gptq_cases import Chunk, correlated, exact_chunk, weights

# Llama-3.1-8B: weights that share an input, and its channels.
LAYER = {
    "qkv": ((4096, 1024, 1024), 4096),
    "o": ((4096,), 4096),
    "gate_up": ((14336, 14336), 4096),
    "down": ((4096,), 14336),
}
TOKENS = 128 * 2048
BATCH = 8192
CHUNKS = [(8, 1), (40, 33), (128, 70), (128, 28672)]
REPEATS = 100
MIN_EQUAL_ROWS = 0.9
MAX_ERROR_DIFFERENCE = 0.01


def inputs(rows: int, k: int) -> torch.Tensor:
    """bf16 ``[rows, K]`` on the GPU, channels of different sizes that hang together."""
    generator = torch.Generator("cuda").manual_seed(k)
    x = torch.randn(rows, k, device="cuda", generator=generator)
    sizes = torch.randn(k, device="cuda", generator=generator).exp()
    return ((x + x.roll(1, dims=1)) * sizes).bfloat16()


@contextmanager
def loops_in_torch() -> Iterator[None]:
    """GPTQ without its kernels."""
    with (
        patch.object(gptq, "round_columns", round_columns_reference),
        patch.object(coordinate_descent, "descend_columns", descend_columns_reference),
    ):
        yield


def rounded_chunk(columns: int, rows: int) -> tuple[Chunk, torch.Tensor]:
    """A chunk in which nothing is exact, and the Hessian of its channels."""
    hessian = correlated(columns) + 0.01 * torch.eye(columns)
    factors = factorize(hessian)
    chunk = exact_chunk(columns, rows, 3, symmetric=False)
    target = weights(columns, rows)
    # fp32 scales: their products with integers are rounded as well.
    scale = torch.rand(3, rows) * 0.005 + 0.002
    chunk = chunk._replace(values=target, target=target, matrix=factors.factor, scale=scale)
    return on_gpu(chunk), hessian.cuda()


def on_gpu(chunk: Chunk) -> Chunk:
    return Chunk(*(tensor.cuda() for tensor in chunk))


def run_chunk(chunk: Chunk, hessian: torch.Tensor, round_: Any, descend: Any) -> list[torch.Tensor]:
    """What the two functions make of a chunk: c, difference; c, gradient."""
    values, target, factor, scale, zero, group, c = chunk
    rounded, difference = (torch.full_like(values, float("nan")) for _ in range(2))
    round_(values.clone(), target, factor, scale, zero, group, rounded, difference)
    descended, gradient = c + zero[group] - zero[0], hessian @ target
    descend(gradient, hessian, scale[0], zero[0], descended)
    return [rounded, difference, descended, gradient]


def compare_chunks() -> list[dict[str, Any]]:
    results = []
    for columns, rows in CHUNKS:
        chunk, hessian = rounded_chunk(columns, rows)
        kernel = run_chunk(chunk, hessian, round_columns, descend_columns)
        loop = run_chunk(chunk, hessian, round_columns_reference, descend_columns_reference)
        again = torch.zeros((), dtype=torch.int64, device="cuda")
        for _ in range(REPEATS):
            repeated = run_chunk(chunk, hessian, round_columns, descend_columns)
            again += sum((a != b).sum() for a, b in zip(kernel, repeated, strict=True))
        names = ("c", "difference", "descended_c", "gradient")
        unequal = {name: int((a != b).sum()) for name, a, b in zip(names, kernel, loop, strict=True)}
        results.append({"columns": columns, "rows": rows, "unequal": unequal, "unequal_repeats": int(again)})
    return results


def differences(results: list[GptqResult]) -> dict[str, float]:
    """Of two results of the same weight."""
    one, other = (result.weight.dequantize(torch.float32).cpu() for result in results)
    return {
        "equal_rows": float((one == other).all(dim=1).double().mean()),
        "unequal_values": int((one != other).sum()),
        "error_difference": abs(results[1].error / results[0].error - 1),
    }


def compare(static_groups: bool, symmetric: bool, group_size: int) -> dict[str, Any]:
    x = inputs(4096, 1024)
    on_gpu, on_cpu = Hessian(1024, "cuda"), Hessian(1024)
    on_gpu.add(x)
    on_cpu.add(x.cpu())
    torch.testing.assert_close(on_gpu.matrix().cpu(), on_cpu.matrix(), rtol=1e-4, atol=1e-4)
    hessian = on_cpu.matrix()
    weight = torch.randn(256, 1024, generator=torch.Generator().manual_seed(0)).mul(0.02).bfloat16()

    def solve(device: str) -> GptqResult:
        return gptq_quantize(
            weight.to(device),
            hessian.to(device),
            group_size=group_size,
            symmetric=symmetric,
            order=falling_diagonal(hessian),
            static_groups=static_groups,
        )

    kernels = solve("cuda")
    with loops_in_torch():
        loops = solve("cuda")
    return {
        "static_groups": static_groups,
        "symmetric": symmetric,
        "group_size": group_size,
        "loops_on_gpu": differences([loops, kernels]),
        "cpu": differences([solve("cpu"), kernels]),
    }


def seconds(start: float) -> float:
    torch.cuda.synchronize()
    return time.perf_counter() - start


def time_layer(sweeps: int, stacked: bool) -> dict[str, Any]:
    """Seconds of each step; `stacked` quantizes the weights of one input in one call."""
    torch.cuda.reset_peak_memory_stats()
    report: dict[str, Any] = {"sweeps": sweeps, "stacked": stacked}
    total = 0.0
    for name, (sizes, k) in LAYER.items():
        batch, hessian = inputs(BATCH, k), Hessian(k, "cuda")
        hessian.add(batch)
        start = time.perf_counter()
        for _ in range(TOKENS // BATCH):
            hessian.add(batch)
        times = {"hessian": seconds(start)}
        matrix = hessian.matrix()
        start = time.perf_counter()
        factors = factorize(matrix, order=falling_diagonal(matrix))
        times["factorize"] = seconds(start)
        values = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) * 0.02 for n in sizes]
        start = time.perf_counter()
        for value in [torch.cat(values)] if stacked else values:
            gptq_quantize(value, factors, group_size=128, symmetric=False, static_groups=True, sweeps=sweeps)
        times["gptq"] = seconds(start)
        report[name] = {step: round(value, 3) for step, value in times.items()}
        total += sum(times.values())
    return report | {
        "seconds": round(total, 2),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
    }


def sanitize() -> None:
    """Every size of chunk that the kernels are compiled for, the last rows and columns missing."""
    for columns, rows in ((8, 33), (24, 5), (32, 32), (40, 70), (128, 35)):
        for symmetric in (False, True):
            chunk = on_gpu(exact_chunk(columns, rows, 3, symmetric))
            hessian = chunk.matrix + chunk.matrix.T
            assert all(t.isfinite().all() for t in run_chunk(chunk, hessian, round_columns, descend_columns))
    torch.cuda.synchronize()
    print("sanitize: chunks of five sizes ran")


def main(
    json_file: JsonFile = None,
    sanitize_only: SanitizeOnly = False,
) -> None:
    if not torch.cuda.is_available():
        raise SystemExit("this check needs a CUDA device")
    torch.set_grad_enabled(False)
    if sanitize_only:
        return sanitize()
    chunks = compare_chunks()
    cases = [
        compare(static_groups, symmetric, group_size)
        for static_groups, symmetric, group_size in itertools.product((False, True), (False, True), (64, -1))
    ]
    time_layer(0, stacked=True)  # libraries start up
    with loops_in_torch():
        loops = time_layer(1, stacked=True)
    report = about_this_run("python scripts/check_gptq_gpu.py") | {
        "chunks": chunks,
        "cases": cases,
        "tokens": TOKENS,
        "layer": [time_layer(sweeps, stacked) for sweeps in (0, 1) for stacked in (False, True)],
        "layer_with_loops_in_torch": loops,
    }
    failed: list[Any] = [
        chunk for chunk in chunks if any(chunk["unequal"].values()) or chunk["unequal_repeats"]
    ]
    failed += [
        case
        for case in cases
        if case["loops_on_gpu"]["unequal_values"]
        or case["cpu"]["equal_rows"] < MIN_EQUAL_ROWS
        or case["cpu"]["error_difference"] > MAX_ERROR_DIFFERENCE
    ]
    conclude(report, failed, json_file)


if __name__ == "__main__":
    typer.run(main)
