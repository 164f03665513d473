"""Is GPTQ right on this GPU, and what does a decoder layer of an 8B model cost?

    python scripts/check_gptq_gpu.py --json scripts/results/check_gptq.json

The same weights are quantized on CPU and GPU: errors must agree, and so must all rows but those in which
another order of sums has decided a tie. The time of a layer is that of its Hessians, factorizations and
weights, on random inputs, without the model's own forward passes.
"""

import time
from typing import Any

import torch
import typer
from gpu_report import JsonFile, about_this_run, conclude

from hf_hadacore.solvers.act_order import falling_diagonal
from hf_hadacore.solvers.gptq import gptq_quantize
from hf_hadacore.solvers.hessian import Hessian, factorize

# Llama-3.1-8B: weights that share an input, and its channels.
LAYER = {
    "qkv": ((4096, 1024, 1024), 4096),
    "o": ((4096,), 4096),
    "gate_up": ((14336, 14336), 4096),
    "down": ((4096,), 14336),
}
TOKENS = 128 * 2048
BATCH = 8192
MIN_EQUAL_ROWS = 0.9
MAX_ERROR_DIFFERENCE = 0.01


def inputs(rows: int, k: int) -> torch.Tensor:
    """bf16 ``[rows, K]`` on the GPU, channels of different sizes that hang together."""
    generator = torch.Generator("cuda").manual_seed(k)
    x = torch.randn(rows, k, device="cuda", generator=generator)
    sizes = torch.randn(k, device="cuda", generator=generator).exp()
    return ((x + x.roll(1, dims=1)) * sizes).bfloat16()


def compare(static_groups: bool, symmetric: bool, group_size: int) -> dict[str, Any]:
    x = inputs(4096, 1024)
    on_gpu, on_cpu = Hessian(1024, "cuda"), Hessian(1024)
    on_gpu.add(x)
    on_cpu.add(x.cpu())
    torch.testing.assert_close(on_gpu.matrix().cpu(), on_cpu.matrix(), rtol=1e-4, atol=1e-4)
    hessian = on_cpu.matrix()
    weight = torch.randn(256, 1024, generator=torch.Generator().manual_seed(0)).mul(0.02).bfloat16()
    results = [
        gptq_quantize(
            weight.to(device),
            hessian.to(device),
            group_size=group_size,
            symmetric=symmetric,
            order=falling_diagonal(hessian),
            static_groups=static_groups,
        )
        for device in ("cpu", "cuda")
    ]
    cpu, gpu = (result.weight.dequantize(torch.float32).cpu() for result in results)
    return {
        "static_groups": static_groups,
        "symmetric": symmetric,
        "group_size": group_size,
        "equal_rows": float((cpu == gpu).all(dim=1).double().mean()),
        "error_difference": abs(results[1].error / results[0].error - 1),
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
        weights = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) * 0.02 for n in sizes]
        start = time.perf_counter()
        for weight in [torch.cat(weights)] if stacked else weights:
            gptq_quantize(weight, factors, group_size=128, symmetric=False, static_groups=True, sweeps=sweeps)
        times["gptq"] = seconds(start)
        report[name] = {step: round(value, 3) for step, value in times.items()}
        total += sum(times.values())
    return report | {
        "seconds": round(total, 2),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
    }


def main(
    json_file: JsonFile = None,
) -> None:
    if not torch.cuda.is_available():
        raise SystemExit("this check needs a CUDA device")
    torch.set_grad_enabled(False)
    cases = [
        compare(static_groups, symmetric, group_size)
        for static_groups in (False, True)
        for symmetric in (False, True)
        for group_size in (64, -1)
    ]
    time_layer(0, stacked=True)  # libraries start up
    report = about_this_run("python scripts/check_gptq_gpu.py") | {
        "cases": cases,
        "tokens": TOKENS,
        "layer": [time_layer(sweeps, stacked) for sweeps in (0, 1) for stacked in (False, True)],
    }
    failed = [
        case
        for case in cases
        if case["equal_rows"] < MIN_EQUAL_ROWS or case["error_difference"] > MAX_ERROR_DIFFERENCE
    ]
    conclude(report, failed, json_file)


if __name__ == "__main__":
    typer.run(main)
