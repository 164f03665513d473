"""Are the kernels of 8-bit attention right on this GPU, and how accurate?

    python scripts/check_attention_gpu.py --json scripts/results/check_attention.json
    python scripts/check_attention_gpu.py --kernel attention_hopper
    compute-sanitizer python scripts/check_attention_gpu.py --sanitize

Random problems and what their results are held to are those of `attention_variants`.
"""

import json
import math
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
import typer
from attention_variants import (
    CASES_OF_A_VARIANT,
    MAX_RATIO,
    PRODUCT_ROUNDOFF,
    Options,
    draw_case,
    random_variant,
    run_kernel,
    run_variant,
    squares,
)
from gpu_processes import process_pool
from gpu_report import JsonFile, SanitizeOnly, about_this_run, require_gpu, write_report

from hf_hadacore import quantized_attention
from hf_hadacore.kernels import attention
from hf_hadacore.kernels.rotate_quantize import rotate_quantize

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from attention_exact import (
    DISTRIBUTIONS,
    E4M3,
    Problem,
    exact_attention,
    is_within_bounds,
    make_inputs,
    make_problem,
)

KERNELS = ("attention_hopper", "attention_triton")
VARIANTS = {"attention_hopper": 40, "attention_triton": 56}
REPEATS = 1000
DTYPES = {"fp8": E4M3, "int8-fp8": torch.int8}
# What `DISTRIBUTIONS` are to be off by at most at 4096 tokens.
TARGETS = {"fp8": (0.054, 0.045, 0.075, 0.066), "int8-fp8": (0.041, 0.033, 0.055, 0.056)}
LONG = (8192, 32768, 131072)
MAX_BIASED_ERROR = 2e-3


def quantize(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mode: str, granularity: str = "block"
) -> Problem:
    """8-bit operands as `quantized_attention` makes them."""
    groups: dict[str, Any] = dict(scale=granularity, block_size=attention.BLOCK_SIZE)
    query, query_scale = rotate_quantize(q, dtype=DTYPES[mode])
    key, key_scale = rotate_quantize(k, dtype=DTYPES[mode], **groups)
    value, value_scale = rotate_quantize(
        v, rotate=False, transpose=True, interleave=True, power_of_2=True, **groups
    )
    return Problem(query, key, value, query_scale, key_scale, value_scale)


def check_long_context(job: tuple[str, int, str]) -> list[dict[str, Any]]:
    """Errors against an exact softmax on the same 8-bit inputs, for values with and without a mean.

    The results are fp16: rounding to bf16 alone costs 1.7e-3.
    """
    kernel, keys, mode = job
    rows = []
    for tokens in (256,) if kernel == "attention_hopper" else (1, 256):
        heads, key_heads = (4, 1) if tokens > 1 else (32, 8)
        for mean in (0.0, 1.0):
            torch.manual_seed(keys)
            q, k, v = (
                torch.randn(1, count, length, 128, device="cuda")
                for count, length in ((heads, tokens), (key_heads, keys), (key_heads, keys))
            )
            problem = quantize(q.bfloat16(), k.bfloat16(), (v + mean).bfloat16(), mode)
            options: Options = dict(scale=128**-0.5, is_causal=False)
            exact = exact_attention(problem, **options)
            error, emulated = (
                squares(run_kernel(kernel, problem, options, torch.float16), exact) ** 0.5 / exact.out.norm()
            ).tolist()
            rows.append(
                dict(
                    kernel=kernel,
                    mode=mode,
                    keys=keys,
                    tokens=tokens,
                    value_mean=mean,
                    error=error,
                    emulated=emulated,
                    right=error <= MAX_BIASED_ERROR if mean else error <= MAX_RATIO * emulated,
                )
            )
    return rows


def check_distributions(job: tuple[str, str, str]) -> dict[str, Any]:
    """Errors of `quantized_attention` with a kernel and with the reference, against float64."""
    kernel, name, mode = job
    q, k, v = make_inputs(name, 8, 2, 4096, 128, device="cuda")
    # All queries at once would be gigabytes in each process.
    parts = [
        F.scaled_dot_product_attention(part.double(), k.double(), v.double(), enable_gqa=True)
        for part in q.split(512, 2)
    ]
    exact = torch.cat(parts, 2)

    def error(kernels: tuple[str, ...]) -> float:
        with (
            patch.object(attention, "_KERNELS", kernels),
            patch.object(attention, "_notify") as notice,
        ):
            out = quantized_attention(q, k, v, mode=mode)
        assert notice.called == (not kernels), "not the kernel that was asked for"
        return float((out.double() - exact).norm() / exact.norm())

    result, reference = error((kernel,)), error(())
    target = TARGETS[mode][DISTRIBUTIONS.index(name)]
    return dict(
        kernel=kernel,
        mode=mode,
        distribution=name,
        error=result,
        reference=reference,
        target=target,
        right=result <= 1.02 * reference,
        meets_target=result <= target,
    )


def check_repeats(kernel: str) -> bool:
    """The same bits from 1000 runs, side by side with other processes."""
    # Looked at once: every look waits for the other processes on this GPU.
    differs = torch.zeros((), dtype=torch.bool, device="cuda")
    for tokens, keys, heads in ((1, 3000, (32, 8)), (7, 500, (8, 2)), (300, 1000, (8, 2))):
        if tokens < 33 and kernel == "attention_hopper":
            continue
        problem = make_problem(2, *heads, tokens, keys, 128, device="cuda")
        first = run_kernel(kernel, problem, dict(scale=0.1, is_causal=True), torch.bfloat16)
        for _ in range(REPEATS // 3):
            again = run_kernel(kernel, problem, dict(scale=0.1, is_causal=True), torch.bfloat16)
            differs |= (first != again).any()
    return not differs


def check_graph(kernel: str) -> bool:
    """Replays read where the keys end from the device."""
    tokens = 64 if kernel == "attention_hopper" else 1
    problem = make_problem(2, 8, 2, tokens, 1000, 128, device="cuda")
    end = torch.tensor([500, 700], dtype=torch.int32, device="cuda")
    options: Options = dict(scale=0.1, is_causal=True, key_end=end, query_start=end - tokens)
    run_kernel(kernel, problem, options, torch.bfloat16)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run_kernel(kernel, problem, options, torch.bfloat16)
    right = True
    for ends in ([500, 700], [1000, 64], [65, 999]):
        end.copy_(torch.tensor(ends))
        options["query_start"].copy_(end - tokens)
        graph.replay()
        right &= torch.equal(out, run_kernel(kernel, problem, options, torch.bfloat16))
        right &= is_within_bounds(out, exact_attention(problem, product_roundoff=PRODUCT_ROUNDOFF, **options))
    return right


def check_not_finite(kernel: str) -> bool:
    """A NaN in a query or in a key is seen by those whom it concerns, one in a value by all who read it."""
    right = True
    options: Options = dict(scale=0.1, is_causal=True)
    for name in ("query_scale", "key_scale", "value_scale"):
        # Of an infinite logit only the sign would count. `rotate_quantize` makes NaN of such keys.
        for bad in (math.nan,) if name == "key_scale" else (math.nan, math.inf):
            problem = make_problem(1, 2, 2, 200, 200, 128, device="cuda")
            problem._asdict()[name][0, 1, 150] = bad
            out = run_kernel(kernel, problem, options, torch.bfloat16)
            right &= bool(out[:, :, 0].isfinite().all())
            right &= not bool(out[:, 150 : 151 if name == "query_scale" else 200, 1].isfinite().any())
            if name != "value_scale":
                right &= bool(out[:, :150, 1].isfinite().all())
    return right


def check_beyond_int32(kernel: str) -> bool:
    """Keys, then queries, of more than 2^31 elements: the last head, its last queries, against float64."""
    tokens, keys, d = 40, (1 << 21) + 128, 128
    options: Options = dict(scale=0.1, is_causal=True)
    bits = torch.randint(0, 120, (4, 2, d, keys), dtype=torch.uint8, device="cuda")
    problem = Problem(
        torch.randint(-127, 128, (4, 2, tokens, d), dtype=torch.int8, device="cuda"),
        torch.randint(-127, 128, (4, 2, keys, d), dtype=torch.int8, device="cuda"),
        bits.view(E4M3),
        torch.full((4, 2, tokens), 0.01, device="cuda"),
        torch.full((4, 2, keys), 0.01, device="cuda"),
        torch.full((4, 2, keys), 2.0**-5, device="cuda"),
    )
    last = Problem(*(x[-1:, -1:] for x in problem))
    out = run_kernel(kernel, problem, options, torch.bfloat16)[-1:, :, -1:]
    right = is_within_bounds(out, exact_attention(last, product_roundoff=PRODUCT_ROUNDOFF, **options))
    del bits, problem, last, out
    torch.cuda.empty_cache()

    tokens, window = (1 << 20) + 128, 200
    options["window"] = window
    problem = make_problem(1, 1, 1, 1, tokens, d, dtype=torch.int8, device="cuda")
    problem = problem._replace(
        query=torch.randint(-127, 128, (1, 16, tokens, d), dtype=torch.int8, device="cuda"),
        query_scale=torch.full((1, 16, tokens), 0.01, device="cuda"),
    )
    out = run_kernel(kernel, problem, options, torch.bfloat16)[:, -300:, -1:]
    last = Problem(
        problem.query[:, -1:, -300:],
        problem.key[:, :, -1024:],
        problem.value[..., -1024:],
        problem.query_scale[:, -1:, -300:],
        problem.key_scale[..., -1024:],
        problem.value_scale[..., -1024:],
    )
    return right and is_within_bounds(
        out, exact_attention(last, product_roundoff=PRODUCT_ROUNDOFF, **options)
    )


def sanitize(kernels: list[str]) -> None:
    """A few small problems of every kind, for compute-sanitizer."""
    count = 0
    for kernel in kernels:
        for number in range(6):
            variant = random_variant(kernel, number)
            draw = random.Random(number)
            problem, options = draw_case(draw, variant)
            out = run_kernel(kernel, problem, options, variant.out_dtype)
            assert bool(out.isfinite().all()), variant
            count += 1
    torch.cuda.synchronize()
    print(f"sanitize: {count} variants ran")


def main(
    kernel: Annotated[list[str] | None, typer.Option(help="attention_hopper, attention_triton.")] = None,
    json_file: JsonFile = None,
    sanitize_only: SanitizeOnly = False,
) -> None:
    require_gpu()
    is_hopper = torch.cuda.get_device_capability() == (9, 0)
    kernels = kernel or [name for name in KERNELS if is_hopper or name != "attention_hopper"]
    if sanitize_only:
        return sanitize(kernels)
    report: dict[str, Any] = about_this_run(
        " ".join(["python scripts/check_attention_gpu.py", *(f"--kernel {name}" for name in kernel or ())])
    )
    checks = {
        "repeats_are_identical": check_repeats,
        "graphs_read_lengths_on_the_device": check_graph,
        "nan_and_infinity_stay_visible": check_not_finite,
        "beyond_2_31_elements": check_beyond_int32,
    }
    jobs: dict[str, list[tuple[Callable[[Any], Any], Any]]] = {
        "checks": [(check, name) for check in checks.values() for name in kernels],
        "long_context": [
            (check_long_context, (name, keys, mode)) for name in kernels for keys in LONG for mode in DTYPES
        ],
        "distributions": [
            (check_distributions, (name, x, mode))
            for name in kernels
            for x in DISTRIBUTIONS
            for mode in DTYPES
        ],
        "random": [(run_variant, (name, i)) for name in kernels for i in range(VARIANTS[name])],
    }
    with process_pool() as pool:
        futures = {
            part: [pool.submit(function, job) for function, job in jobs[part]] for part in reversed(jobs)
        }
        outcomes = {part: [outcome_of(future.result) for future in futures[part]] for part in jobs}
    failed = [
        f"{part} {job}: {outcome}"
        for part in jobs
        for (_, job), outcome in zip(jobs[part], outcomes[part], strict=True)
        if isinstance(outcome, Exception)
    ]
    for (check, name), outcome in zip(jobs["checks"], outcomes["checks"], strict=True):
        label = next(label for label, each in checks.items() if each is check)
        report.setdefault(name, {})[label] = outcome is True
        if outcome is False:
            failed.append(f"{name}: {label}")
    report["long_context"] = [
        row for rows in outcomes["long_context"] if isinstance(rows, list) for row in rows
    ]
    report["distributions"] = [row for row in outcomes["distributions"] if isinstance(row, dict)]
    failed += [f"{row}" for row in report["long_context"] + report["distributions"] if not row["right"]]
    for name in kernels:
        rows = [row for row in outcomes["random"] if isinstance(row, dict) and row["job"][0] == name]
        report[name]["random"] = {
            "variants": len(rows),
            "cases": len(rows) * CASES_OF_A_VARIANT,
            "failed": sum(bool(row["wrong"]) for row in rows),
            "worst_ratio_to_emulation": max((row["ratio"] for row in rows), default=math.inf),
        }
        failed += [f"{row['job']}: {row['wrong']}" for row in rows if row["wrong"]]
    report["failed"] = failed
    write_report(report, json_file)
    print_report(report, kernels)
    if failed:
        raise SystemExit(f"{len(failed)} failed")
    print("all right")


def outcome_of(result: Callable[[], Any]) -> Any:
    try:
        return result()
    except Exception as error:
        return error


def print_report(report: dict[str, Any], kernels: list[str]) -> None:
    for text in report["failed"]:
        print("FAILED", text)
    for name in kernels:
        print(name, json.dumps(report[name]))
    for row in report["long_context"]:
        print(
            f"{row['kernel']} {row['mode']} {row['tokens']} x {row['keys']}, "
            f"V ~ N({row['value_mean']:.0f}, 1): {row['error']:.2e}, emulated {row['emulated']:.2e}"
        )
    for row in report["distributions"]:
        print(
            f"{row['kernel']} {row['mode']} {row['distribution']}: {row['error']:.4f} (reference "
            f"{row['reference']:.4f}, target {row['target']})" + " MISSED" * (not row["meets_target"])
        )


if __name__ == "__main__":
    typer.run(main)
