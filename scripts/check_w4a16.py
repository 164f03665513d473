"""Is the portable W4A16 op (weights in the order of the format) right on this GPU?

    python scripts/check_w4a16.py --json scripts/results/check_w4a16.json
    compute-sanitizer python scripts/check_w4a16.py --sanitize

Errors are relative L2 against a float64 product with the weights exactly as stored, in multiples of the error
that rounding the exact result once would have. Outputs are filled with NaN before the kernel runs. Speed is
the business of `benchmark_w4a16.py`.
"""

import random
from functools import partial
from typing import Any

import torch
import typer
from gpu_processes import process_pool
from gpu_report import JsonFile, SanitizeOnly, about_this_run, conclude, require_gpu

from hf_hadacore import int4
from hf_hadacore.int4 import Int4Weight
from hf_hadacore.kernels import w4a16_triton
from hf_hadacore.kernels.w4a16 import w4a16_linear

CASES = 500
REPEATS = 1000
MAX_FLOORS = 1.1


def random_weight(n: int, k: int, group_size: int, symmetric: bool, scale_dtype: torch.dtype) -> Int4Weight:
    groups = (n, int4.num_groups(k, group_size))
    packed = torch.randint(-(2**31), 2**31, (n, k // 8), dtype=torch.int32, device="cuda")
    scale = (torch.rand(groups, device="cuda") * 0.02 + 0.001).to(scale_dtype)
    zero = None if symmetric else torch.randint(0, 16, groups, dtype=torch.uint8, device="cuda")
    return Int4Weight(packed, scale, zero, group_size)


def in_floors(y: torch.Tensor, exact: torch.Tensor) -> float:
    """The error of y in multiples of the one-rounding floor of its dtype."""
    floor = (exact.to(y.dtype).double() - exact).norm()
    return float((y.double() - exact).norm() / floor)


def beyond(errors: dict[str, float]) -> list[str]:
    """Which errors, in floors, are too large or NaN."""
    return [f"{name}: {error} floors" for name, error in errors.items() if not error <= MAX_FLOORS]


def failures(report: dict[str, Any]) -> list[str]:
    """What is wrong in a report of `check_w4a16` or `check_w4a16_tiled`."""
    worst = {"random shapes": report["random_shapes"]["worst_error_in_floors"]}
    is_repeated = report["repeats"]["bit_identical"]
    return beyond(worst | report["beyond_2_31_elements"]) + ([] if is_repeated else ["repeats"])


def run_case(case: int) -> tuple[float, dict[str, Any]]:
    """One random problem through the op; its error in floors, and what it was."""
    draw = random.Random(case)
    torch.manual_seed(case)
    m = draw.choice([1, 2, 3, 5, 8, 15, 16, 17, 31, 33, 64, 65, 100, 129, 300])
    n = draw.choice([1, 7, 16, 63, 64, 65, 127, 256, 1000, 1536, 4096])
    k = 8 * draw.choice([1, 2, 5, 9, 16, 17, 31, 72, 73, 128, 129, 512, 700])
    group_size = draw.choice(int4.GROUP_SIZES)
    symmetric = draw.random() < 0.5
    dtype = draw.choice([torch.float16, torch.bfloat16])
    weight = random_weight(n, k, group_size, symmetric, dtype)
    bias = torch.randn(n, device="cuda", dtype=dtype) if draw.random() < 0.5 else None
    perm = torch.randperm(k, device="cuda").int() if draw.random() < 0.3 else None
    layout = draw.choice(["contiguous", "offset", "strided", "transposed"])
    if layout == "contiguous":
        x = torch.randn(m, k, device="cuda").to(dtype)
    elif layout == "offset":
        x = torch.randn(m + 1, k + 3, device="cuda").to(dtype)[1:, 3:]
    elif layout == "strided":
        x = torch.randn(2 * m, 2 * k, device="cuda").to(dtype)[::2, ::2]
    else:
        x = torch.randn(k, m, device="cuda").to(dtype).T
    if draw.random() < 0.2:
        x[:, draw.randrange(k)] *= 100  # an outlier channel
    y = w4a16_linear(x, weight.packed, weight.scale, weight.zero, perm, bias, group_size=group_size)
    inputs = x if perm is None else x[:, perm.long()]
    exact = inputs.double() @ weight.dequantize(torch.float64).T
    if bias is not None:
        exact += bias.double()
    what = dict(m=m, n=n, k=k, group_size=group_size, symmetric=symmetric, dtype=str(dtype), layout=layout)
    return in_floors(y, exact), what | {"bias": bias is not None, "perm": perm is not None}


def check_cases() -> dict[str, Any]:
    # Most cases compile a kernel of their own, which takes the time: many processes share the GPU.
    with process_pool() as pool:
        results = list(pool.map(run_case, range(CASES), chunksize=4))
    worst = max(results, key=lambda result: result[0] if result[0] == result[0] else float("inf"))
    return {"cases": CASES, "worst_error_in_floors": round(worst[0], 4), "worst_case": worst[1]}


def check_every_element_is_written() -> int:
    """Run every kind of schedule into outputs full of NaN; returns how many were run."""
    count = 0
    for m, n, k in ((1, 65, 136), (17, 127, 1032), (33, 64, 4096)):
        for group_size in int4.GROUP_SIZES:
            for split_k in (1, 4):
                weight = random_weight(n, k, group_size, False, torch.float16)
                x = torch.randn(m, k, device="cuda", dtype=torch.float16)
                out = torch.full((m, n), float("nan"), device="cuda", dtype=torch.float16)
                schedule = w4a16_triton.Schedule(16, 64, split_k)
                w4a16_triton.launch(x, *weight[:3], None, None, group_size, out, schedule)
                exact = x.double() @ weight.dequantize(torch.float64).T
                error = in_floors(out, exact)
                assert error <= MAX_FLOORS, (m, n, k, group_size, split_k, error)
                count += 1
    return count


def check_repeats() -> dict[str, Any]:
    """The same product many times over, on a shape whose K is split."""
    m, n, k = 8, 1024, 8192
    weight = random_weight(n, k, 128, False, torch.float16)
    x = torch.randn(m, k, device="cuda", dtype=torch.float16)
    schedule = w4a16_triton.choose_schedule(m, n, k, 128, x.device)
    assert schedule.split_k > 1
    run = partial(w4a16_linear, x, *weight[:3], group_size=128)
    first = run()
    identical = all(torch.equal(run(), first) for _ in range(REPEATS))
    return {"repeats": REPEATS, "split_k": schedule.split_k, "bit_identical": identical}


def check_beyond_int32() -> dict[str, float]:
    """Tensors with more than 2^31 elements: x and the result, then the words of the weight."""
    worst = {}
    k, n, m = 1024, 64, (1 << 21) + 5  # x has 2^31 + 5120 elements
    weight = random_weight(n, k, 128, False, torch.float16)
    x = torch.randn(m, k, device="cuda", dtype=torch.float16)
    y = w4a16_linear(x, *weight[:3], group_size=128)
    worst["x"] = in_floors(y[-100:], x[-100:].double() @ weight.dequantize(torch.float64).T)
    del x, y
    n, m = (1 << 21) + 64, 1030  # the result has more than 2^31 elements
    k = 32
    weight = random_weight(n, k, 32, True, torch.float16)
    x = torch.randn(m, k, device="cuda", dtype=torch.float16)
    y = w4a16_linear(x, *weight[:3], group_size=32)
    tail = Int4Weight(weight.packed[-70:], weight.scale[-70:], None, 32).dequantize(torch.float64)
    worst["result"] = in_floors(y[-3:, -70:], x[-3:].double() @ tail.T)
    del x, y, weight
    torch.cuda.empty_cache()
    n, k = (1 << 17) + 64, 1 << 17  # the weight has 2^31 + 2^20 words
    weight = random_weight(n, k, -1, True, torch.float16)
    x = torch.randn(3, k, device="cuda", dtype=torch.float16)
    y = w4a16_linear(x, *weight[:3], group_size=-1)
    tail = Int4Weight(weight.packed[-70:], weight.scale[-70:], None, -1).dequantize(torch.float64)
    worst["weight"] = in_floors(y[:, -70:], x.double() @ tail.T)
    return {name: round(error, 4) for name, error in worst.items()}


def sanitize() -> None:
    """One small problem for every variant of the kernel, for compute-sanitizer."""
    for dtype in (torch.float16, torch.bfloat16):
        for group_size in int4.GROUP_SIZES:
            for symmetric in (False, True):
                for m, split_k in ((3, 1), (17, 3), (70, 2)):
                    n, k = 70, 520
                    weight = random_weight(n, k, group_size, symmetric, dtype)
                    x = torch.randn(m, k, device="cuda", dtype=dtype)
                    bias = torch.randn(n, device="cuda", dtype=dtype)
                    perm = torch.randperm(k, device="cuda").int() if split_k == 3 else None
                    out = torch.full((m, n), float("nan"), device="cuda", dtype=dtype)
                    schedule = w4a16_triton.Schedule(16 if m < 64 else 64, 64, split_k)
                    w4a16_triton.launch(x, *weight[:3], perm, bias, group_size, out, schedule)
                    assert not out.isnan().any()
    torch.cuda.synchronize()
    print("sanitize: every variant ran")


def main(
    json_file: JsonFile = None,
    sanitize_only: SanitizeOnly = False,
) -> None:
    require_gpu()
    if sanitize_only:
        return sanitize()
    report: dict[str, Any] = {
        **about_this_run("python scripts/check_w4a16.py"),
        "random_shapes": check_cases(),
        "nan_poisoned_runs": check_every_element_is_written(),
        "repeats": check_repeats(),
        "beyond_2_31_elements": check_beyond_int32(),
    }
    conclude(report, failures(report), json_file)


if __name__ == "__main__":
    typer.run(main)
