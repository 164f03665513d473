"""Are grouped int4 experts right on this GPU, and how fast do they decode?

    python scripts/check_experts_gpu.py --json scripts/results/experts.json
    compute-sanitizer python scripts/check_experts_gpu.py --sanitize

Problems and what is held to float64 are those of `experts_cases`.

Times are those of the experts of one layer of Qwen3-30B-A3B (routing excluded), replayed in a CUDA graph, the
tokens of every call routed at random over layers that together do not fit the L2 cache. The floor is the time
in which a device-to-device copy moves as many bytes as the chosen experts hold, each read once.
"""

import json
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import typer
from experts_cases import (
    SHAPES,
    bf16_experts,
    check_layer,
    error_of,
    expert_bytes,
    failures,
    gpt_oss_experts,
    int4_experts,
    products,
    qwen_experts,
    random_inputs,
    random_problem,
    random_rows,
    run_shape,
    summary_of,
)
from gpu_processes import process_pool
from gpu_report import JsonFile, SanitizeOnly, about_this_run, conclude, require_gpu
from transformers.integrations.moe import batched_mm_experts_forward, grouped_mm_experts_forward

from hf_hadacore import int4
from hf_hadacore.kernels.measure import copy_bandwidth, graph_time
from hf_hadacore.kernels.w4a16_experts import launch
from hf_hadacore.kernels.w4a16_schedules import PrefillSchedule, SkinnySchedule, WideSchedule
from hf_hadacore.modules.experts import HadaCoreExperts

VARIANTS = 28
CASES_OF_A_VARIANT = 6
TOKENS = (1, 4, 16)
CALLS = 12


def run_variant(number: int) -> list[tuple[float, dict[str, Any]]]:
    """Random problems for one compiled kernel."""
    draw = random.Random(number)
    torch.manual_seed(number)
    k = 128 * draw.choice([1, 3, 8, 16, 33])
    tiles = -(-k // 128 // draw.choice([1, 2, 3, 8]))
    block_n, num_warps = draw.choice([(64, 4), (128, 8), (128, 4)])
    schedule = SkinnySchedule(draw.choice([8, 16]), block_n, tiles, draw.randint(1, min(4, tiles)), num_warps)
    group_size, symmetric = draw.choice(int4.GROUP_SIZES), draw.random() < 0.5
    dtype, has_bias = draw.choice([torch.float16, torch.bfloat16]), draw.random() < 0.5
    index_dtype = draw.choice([torch.int32, torch.int64])
    # One row is not searched for slots that share an expert, nor are very many slots.
    fewest, most = draw.choice([(2, 32), (33, 64), (65, 128), (129, 256), (257, 400), (1, 1)])
    results = []
    for _ in range(CASES_OF_A_VARIANT):
        experts, n = draw.choice([1, 2, 8, 60]), 64 * draw.randint(1, 12)
        problem = random_problem(experts, n, k, group_size, symmetric, dtype, has_bias)
        choices = draw.choice([1, 2, 8])
        rows = max(1, draw.randint(fewest, most) // choices)
        layout, x = random_rows(draw, rows, k, dtype)
        index = torch.randint(-1, experts + 1, (rows * choices,), device="cuda", dtype=index_dtype)
        index[0] = 0
        what = {
            "experts": experts, "n": n, "k": k, "rows": rows, "choices": choices, "layout": layout,
            "group_size": group_size, "symmetric": symmetric, "dtype": str(dtype), "schedule": repr(schedule),
        }  # fmt: skip
        results.append((error_of(x, problem, index, schedule), what))
    return results


def check_products() -> dict[str, Any]:
    """Random problems and the shapes of models, in several processes because compiling takes the time."""
    with process_pool() as pool:
        models = {
            f"{name}, {tokens} tokens": pool.submit(run_shape, name, tokens)
            for name in SHAPES
            for tokens in TOKENS
        }
        results = [case for cases in pool.map(run_variant, range(VARIANTS)) for case in cases]
        errors = {name: round(future.result(), 4) for name, future in models.items()}
    return summary_of(results, errors)


@torch.no_grad()
def measure_decoding(bandwidth: float) -> list[dict[str, Any]]:
    """Times of the experts of Qwen3-30B-A3B: ours, and bf16 as transformers runs them."""
    shape = SHAPES["Qwen3-30B-A3B"]
    ours = [int4_experts(qwen_experts) for _ in range(4)]
    theirs = [bf16_experts(qwen_experts) for _ in range(2)]
    rows = []
    for tokens in TOKENS:
        batches = [random_inputs(shape, tokens) for _ in range(CALLS)]
        distinct = sum(len(index.unique()) for _, index, _ in batches) / CALLS
        floors = {
            kind: distinct * expert_bytes(shape, kind == "int4") / bandwidth * 1e6
            for kind in ("int4", "bf16")
        }

        hidden = [
            torch.randn(index.numel(), shape.projections[1][1], device="cuda", dtype=torch.bfloat16)
            for _, index, _ in batches
        ]

        def over(layers: list[Any], run: Callable[..., Any], batches: list[Any]) -> float:
            calls = [partial(run, layers[i % len(layers)], *batch) for i, batch in enumerate(batches)]
            return round(graph_time(calls), 2)

        us = {
            "int4": over(ours, HadaCoreExperts.forward, batches),
            "int4, products only": over(
                ours,
                products,
                [(x, index.flatten(), up) for (x, index, _), up in zip(batches, hidden, strict=True)],
            ),
            "bf16 batched_mm": over(theirs, batched_mm_experts_forward, batches),
            "bf16 grouped_mm": over(theirs, grouped_mm_experts_forward, batches),
        }
        fastest_bf16 = min(us["bf16 batched_mm"], us["bf16 grouped_mm"])
        rows.append(
            {
                "tokens": tokens,
                "distinct_experts": round(distinct, 1),
                "us": us,
                "floor_us": {kind: round(floor, 2) for kind, floor in floors.items()},
                "share_of_floor": round(floors["int4"] / us["int4"], 3),
                "products_share_of_floor": round(floors["int4"] / us["int4, products only"], 3),
                "times_faster_than_bf16": round(fastest_bf16 / us["int4"], 2),
            }
        )
    return rows


def sanitize() -> None:
    """Small problems for the kernel's main variants, for compute-sanitizer."""
    for dtype, group_size, symmetric, rows, choices in (
        (torch.float16, 128, False, 1, 4),
        (torch.bfloat16, 64, True, 9, 4),
        (torch.float16, 32, False, 20, 2),
        (torch.bfloat16, -1, False, 40, 2),
    ):
        sorted_slots = (WideSchedule(64, 5, 3, 4), PrefillSchedule(128, 5, 4))
        for schedule in (SkinnySchedule(8, 64, 3, 2, 4), SkinnySchedule(16, 128, 5, 2, 8), *sorted_slots):
            problem = random_problem(3, 192, 640, group_size, symmetric, dtype, has_bias=True)
            x = torch.randn(rows, 640, device="cuda", dtype=dtype)
            index = torch.randint(-1, 4, (rows * choices,), device="cuda")
            out = torch.full((len(index), 192), float("nan"), device="cuda", dtype=dtype)
            launch(x, *problem.tensors, problem.bias, index, group_size, out, schedule)
            assert not out.isnan().any()
    torch.cuda.synchronize()
    print("sanitize: every variant ran")


def main(
    json_file: JsonFile = None,
    sanitize_only: SanitizeOnly = False,
) -> None:
    require_gpu(is_hopper=True)
    if sanitize_only:
        return sanitize()
    # What `check_experts_prefill_gpu.py` has measured stays.
    written = json.loads(json_file.read_text()) if json_file is not None and json_file.exists() else {}
    report: dict[str, Any] = {
        **({"prefill": written["prefill"]} if "prefill" in written else {}),
        **about_this_run("python scripts/check_experts_gpu.py", "transformers"),
        "products": check_products(),
        "layers": {
            "Qwen3-30B-A3B": check_layer(qwen_experts, SHAPES["Qwen3-30B-A3B"]),
            "gpt-oss-20b, 2880 -> 2944": check_layer(gpt_oss_experts, SHAPES["gpt-oss-20b, 2880 -> 2944"]),
        },
    }
    bandwidth = copy_bandwidth()
    report["copy_bandwidth_tb_per_s"] = round(bandwidth / 1e12, 3)
    report["decoding"] = measure_decoding(bandwidth)
    conclude(report, failures(report["products"], report["layers"]), json_file, rows="decoding")


if __name__ == "__main__":
    typer.run(main)
