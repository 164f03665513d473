"""Are int4 experts right with many tokens on this GPU, and how long does their prefill take?

    python scripts/check_experts_prefill_gpu.py --json scripts/results/experts.json
    python scripts/check_experts_prefill_gpu.py --tune

Results go under "prefill" in the file of `check_experts_gpu.py`, which says what floors are; errors are those
of `experts_cases`. Times are those of the experts of one layer of Qwen3-30B-A3B (routing excluded), replayed
in a CUDA graph; the loop over experts waits for the GPU, so it is timed without a graph, as is our own path
beside it.
"""

import json
import random
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

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
    route,
    run_shape,
    summary_of,
    through_loop,
)
from gpu_processes import process_pool
from gpu_report import about_this_run, conclude, require_gpu, write_report
from transformers.integrations.moe import grouped_mm_experts_forward

from hf_hadacore import int4
from hf_hadacore.kernels.measure import copy_bandwidth, graph_time
from hf_hadacore.kernels.w4a16_experts import choose_schedule, launch
from hf_hadacore.kernels.w4a16_launch import processors_of
from hf_hadacore.kernels.w4a16_schedules import GROUPED_TIMES, WideSchedule
from hf_hadacore.modules.experts import HadaCoreExperts

KINDS = tuple(GROUPED_TIMES)
VARIANTS = 2 * len(KINDS)
CASES_OF_A_VARIANT = 6
ROUTINGS = ("random", "uneven", "one expert", "few experts", "mostly sentinels")
TOKENS = (64, 512, 4096)
TUNED_TOKENS = (40, 64, 128, 256, 512, 1024, 2048, 4096)


def random_index(draw: random.Random, experts: int, slots: int) -> tuple[str, torch.Tensor]:
    """How a batch is routed, and the expert of each slot; a few sentinels among all of them."""
    routing = draw.choice(ROUTINGS)
    index = torch.randint(0, experts, (slots,), device="cuda")
    if routing == "uneven":
        index = (torch.rand(slots, device="cuda") ** 4 * experts).long()
    elif routing == "one expert":
        index.fill_(draw.randrange(experts))
    elif routing == "few experts":
        index = index % max(1, experts // 8)
    is_sentinel = torch.rand(slots, device="cuda") < (0.9 if routing == "mostly sentinels" else 0.03)
    sentinel = torch.where(torch.rand(slots, device="cuda") < 0.5, -1, experts)
    index = torch.where(is_sentinel, sentinel, index)
    index[0] = experts - 1
    return routing, index.to(draw.choice([torch.int32, torch.int64]))


def run_variant(number: int) -> list[tuple[float, dict[str, Any]]]:
    """Random problems for one compiled kernel; the error counts as infinite if two runs differ."""
    draw = random.Random(number)
    torch.manual_seed(number)
    kind = KINDS[number % len(KINDS)]
    # Two programs a processor are for groups of at least a tile.
    sizes = (128, -1) if isinstance(kind, WideSchedule) and kind.is_half else int4.GROUP_SIZES
    group_size, symmetric = draw.choice(sizes), draw.random() < 0.5
    dtype, has_bias = draw.choice([torch.float16, torch.bfloat16]), draw.random() < 0.5
    results = []
    for _ in range(CASES_OF_A_VARIANT):
        experts, n = draw.choice([1, 2, 8, 60, 128]), 64 * draw.randint(1, 12)
        k = 128 * draw.choice([1, 3, 8, 17])
        schedule = kind._replace(tiles=k // 128)
        problem = random_problem(experts, n, k, group_size, symmetric, dtype, has_bias)
        choices = draw.choice([1, 2, 8])
        rows = draw.choice([1, 7, 64, 131, 400])
        layout, x = random_rows(draw, rows, k, dtype)
        routing, index = random_index(draw, experts, rows * choices)
        outs = torch.full((2, len(index), n), float("nan"), device="cuda", dtype=dtype)
        for out in outs:
            launch(x, *problem.tensors, problem.bias, index, group_size, out, schedule)
        error = error_of(x, problem, index, schedule) if torch.equal(*outs) else float("inf")
        what = {
            "experts": experts, "n": n, "k": k, "rows": rows, "choices": choices, "layout": layout,
            "routing": routing, "index": str(index.dtype), "group_size": group_size, "symmetric": symmetric,
            "bias": has_bias, "dtype": str(dtype), "schedule": repr(schedule),
        }  # fmt: skip
        results.append((error, what))
    return results


def compile_kind(number: int) -> None:
    """Fill Triton's cache with what will be timed."""
    problem = random_problem(2, 256, 256, 128, False, torch.bfloat16, has_bias=False)
    schedule = KINDS[number]._replace(tiles=2)
    for choices in (1, 2):
        x = torch.randn(300 // choices, 256, device="cuda", dtype=torch.bfloat16)
        index = torch.zeros(300, dtype=torch.int64, device="cuda")
        out = torch.empty(300, 256, device="cuda", dtype=torch.bfloat16)
        launch(x, *problem.tensors, None, index, 128, out, schedule)
    torch.cuda.synchronize()


def check_products() -> dict[str, Any]:
    """Random problems and the shapes of models, in several processes because compiling takes the time."""
    models = [("Qwen3-30B-A3B", 64), ("Qwen3-30B-A3B", 500), ("gpt-oss-20b, 2880 -> 2944", 100)]
    with process_pool() as pool:
        compiled = [pool.submit(compile_kind, number) for number in range(len(KINDS))]
        shapes = {f"{name}, {tokens} tokens": pool.submit(run_shape, name, tokens) for name, tokens in models}
        results = [case for cases in pool.map(run_variant, range(VARIANTS)) for case in cases]
        errors = {name: round(future.result(), 4) for name, future in shapes.items()}
        for future in compiled:
            future.result()
    return summary_of(results, errors)


def eager_time(calls: list[Callable[[], Any]]) -> float:
    """Median microseconds of a call from one event to the next, without a graph."""
    times = []
    for call in calls[:2] + calls:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return statistics.median(times[2:])


@torch.no_grad()
def measure_prefill(bandwidth: float) -> list[dict[str, Any]]:
    """Times of the experts of Qwen3-30B-A3B: ours, ours one by one, and bf16 as transformers runs them."""
    shape = SHAPES["Qwen3-30B-A3B"]
    ours = [int4_experts(qwen_experts) for _ in range(2)]
    theirs = [bf16_experts(qwen_experts) for _ in range(2)]
    rows = []
    for tokens in TOKENS:
        batches = [random_inputs(shape, tokens) for _ in range(4)]
        hidden = torch.randn(
            tokens * shape.chosen, shape.projections[1][1], device="cuda", dtype=torch.bfloat16
        )

        def over(layers: list[Any], run: Callable[..., Any], batches: list[Any]) -> list[Callable[[], Any]]:
            return [partial(run, layers[i % len(layers)], *batch) for i, batch in enumerate(batches)]

        grouped = over(ours, HadaCoreExperts.forward, batches)
        alone = over(ours, products, [(x, index.flatten(), hidden) for x, index, _ in batches])
        us = {
            "int4": graph_time(grouped, 7),
            "int4, products only": graph_time(alone, 7),
            "int4, eager": eager_time(grouped),
            "int4 loop, eager": eager_time(over(ours, through_loop, batches)),
            "bf16 grouped_mm": graph_time(over(theirs, grouped_mm_experts_forward, batches), 7),
        }
        distinct = sum(len(index.unique()) for _, index, _ in batches) / len(batches)
        flop = 2 * tokens * shape.chosen * sum(n * k for n, k in shape.projections)
        rows.append(
            {
                "tokens": tokens,
                "us": {name: round(time, 1) for name, time in us.items()},
                "floor_us": round(distinct * expert_bytes(shape, True) / bandwidth * 1e6, 1),
                "products_tflop_per_s": round(flop / us["int4, products only"] / 1e6, 1),
                "times_faster_than_loop": round(us["int4 loop, eager"] / us["int4, eager"], 2),
                "times_faster_than_bf16": round(us["bf16 grouped_mm"] / us["int4"], 2),
            }
        )
    return rows


def tune() -> None:
    """Print the time of every kind of schedule for both projections of Qwen3-30B-A3B, sorting included."""
    shape = SHAPES["Qwen3-30B-A3B"]
    for (n, k), is_down in zip(shape.projections, (False, True), strict=True):
        problems = [random_problem(shape.experts, n, k, 128, False, torch.bfloat16, False) for _ in range(2)]
        for tokens in TUNED_TOKENS:
            index = route(shape, tokens).flatten()
            rows = len(index) if is_down else tokens
            x = torch.randn(rows, k, device="cuda", dtype=torch.bfloat16)
            out = torch.empty(len(index), n, device="cuda", dtype=torch.bfloat16)
            times = {}
            for kind in KINDS:
                schedule = kind._replace(tiles=k // 128)
                calls = [
                    partial(launch, x, *problem.tensors, None, index, 128, out, schedule)
                    for problem in problems
                ]
                times[kind] = graph_time(calls * 2, 5)
            best = min(times, key=times.__getitem__)
            chosen = choose_schedule(len(index), shape.experts, n, k, processors_of(0), 128)
            shown = "  ".join(
                f"{kind[0]}{type(kind).__name__[0]}{kind[2]} {times[kind]:.0f}" for kind in KINDS
            )
            print(f"{n}x{k}, {tokens} tokens: {shown}; best {best}, chosen {chosen}")


def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="Where to add the results.")] = None,
    only_tune: Annotated[bool, typer.Option("--tune", help="Time all kinds of schedules instead.")] = False,
) -> None:
    require_gpu(is_hopper=True)
    checked = check_products()
    if only_tune:
        print(f"worst error {checked['worst_error_in_floors']} floors: {checked['worst_case']}")
        return tune()
    qwen, gpt_oss = "Qwen3-30B-A3B", "gpt-oss-20b, 2880 -> 2944"
    layers = {
        qwen: check_layer(qwen_experts, SHAPES[qwen], (90, 700), repeats=30),
        gpt_oss: check_layer(gpt_oss_experts, SHAPES[gpt_oss], (90, 700), repeats=30),
    }
    bandwidth = copy_bandwidth()
    prefill = {
        **about_this_run("python scripts/check_experts_prefill_gpu.py", "transformers"),
        "products": checked,
        "layers": layers,
        "copy_bandwidth_tb_per_s": round(bandwidth / 1e12, 3),
        "times": measure_prefill(bandwidth),
    }
    written = json.loads(json_file.read_text()) if json_file is not None and json_file.exists() else {}
    prefill["failed"] = failures(checked, layers)
    write_report({**written, "prefill": prefill}, json_file)
    conclude(prefill, prefill["failed"], None, rows="times")


if __name__ == "__main__":
    typer.run(main)
