"""Are grouped int4 experts right on this GPU, and how fast do they decode?

    python scripts/check_experts_gpu.py --json scripts/results/experts.json
    compute-sanitizer python scripts/check_experts_gpu.py --sanitize

Errors are relative L2 against float64 products with the weights exactly as stored, in multiples of the error
that rounding the exact result once would have. Every output is filled with NaN before the kernel runs.

Times are those of the experts of one layer of Qwen3-30B-A3B (routing excluded), replayed in a CUDA graph, the
tokens of every call routed at random over layers that together do not fit the L2 cache. The floor is the time
in which a device-to-device copy moves as many bytes as the chosen experts hold, each read once.
"""

import copy
import json
import multiprocessing
import os
import random
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import typer
from check_w4a16 import in_floors, random_weight
from gpu_report import JsonFile, SanitizeOnly, about_this_run, write_report
from torch import nn
from transformers import GptOssConfig, Qwen3MoeConfig
from transformers.integrations.moe import batched_mm_experts_forward, grouped_mm_experts_forward
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from hf_hadacore import int4
from hf_hadacore.int4 import Int4Weight
from hf_hadacore.kernels.measure import copy_bandwidth, graph_time
from hf_hadacore.kernels.w4a16_experts import choose_schedule, launch, slots_by_expert
from hf_hadacore.kernels.w4a16_launch import processors_of
from hf_hadacore.kernels.w4a16_schedules import PrefillSchedule, Schedule, SkinnySchedule, WideSchedule
from hf_hadacore.kernels.w4a16_tiles import to_tiles
from hf_hadacore.modules.experts import HadaCoreExperts, dequantize_experts, swap_experts

VARIANTS = 28
CASES_OF_A_VARIANT = 6
REPEATS = 200
TOKENS = (1, 4, 16)
CALLS = 12


class Shape(NamedTuple):
    """The experts of a model.

    Attributes:
        experts: E.
        chosen: experts of a token.
        projections: (N, K) of both.
        has_bias: whether they have one.
    """

    experts: int
    chosen: int
    projections: tuple[tuple[int, int], tuple[int, int]]
    has_bias: bool = False


SHAPES = {
    "Mixtral-8x7B": Shape(8, 2, ((28672, 4096), (4096, 14336))),
    "Qwen3-30B-A3B": Shape(128, 8, ((1536, 2048), (2048, 768))),
    # 2880 inputs, as gpt-oss-20b has them, are no whole tiles.
    "gpt-oss-20b, 2880 -> 2944": Shape(32, 4, ((5888, 2944), (2944, 2944)), has_bias=True),
}


class Problem(NamedTuple):
    """Experts as the op takes them, and as they are stored."""

    stored: Int4Weight
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
    bias: torch.Tensor | None


def random_problem(
    experts: int, n: int, k: int, group_size: int, symmetric: bool, dtype: torch.dtype, has_bias: bool
) -> Problem:
    weight = random_weight(experts * n, k, group_size, symmetric, dtype)
    packed, scale, zero = (None if t is None else t.view(experts, n, -1) for t in weight[:3])
    assert packed is not None and scale is not None
    tensors = (
        to_tiles(packed),
        scale.mT.contiguous().mT,
        None if zero is None else zero.mT.contiguous().mT,
    )
    bias = torch.randn(experts, n, device="cuda", dtype=dtype) if has_bias else None
    return Problem(Int4Weight(packed, scale, zero, group_size), tensors, bias)


def exact_outputs(x: torch.Tensor, problem: Problem, index: torch.Tensor) -> torch.Tensor:
    packed, scale, zero, group_size = problem.stored
    exact = torch.zeros(len(index), packed.shape[1], dtype=torch.float64, device="cuda")
    for expert, slots in slots_by_expert(index, len(packed)):
        weight = Int4Weight(
            packed[expert], scale[expert], None if zero is None else zero[expert], group_size
        ).dequantize(torch.float64)
        exact[slots] = x[slots // (len(index) // len(x))].double() @ weight.T
        if problem.bias is not None:
            exact[slots] += problem.bias[expert].double()
    return exact


def error_of(x: torch.Tensor, problem: Problem, index: torch.Tensor, schedule: Schedule) -> float:
    """The error of the kernel in floors; infinite if a sentinel's row is not zero."""
    n = problem.tensors[0].shape[1]
    out = torch.full((len(index), n), float("nan"), device="cuda", dtype=x.dtype)
    launch(x, *problem.tensors, problem.bias, index, problem.stored.group_size, out, schedule)
    is_sentinel = (index < 0) | (index >= len(problem.tensors[0]))
    if (out[is_sentinel] != 0).any():
        return float("inf")
    return in_floors(out[~is_sentinel], exact_outputs(x, problem, index)[~is_sentinel])


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
        wide = torch.randn(rows + 1, k + 64, device="cuda").to(dtype)
        layout = draw.choice(["contiguous", "rows", "offset"])
        x = {
            "contiguous": wide[:rows, :k].contiguous(),
            "rows": wide[:rows, :k],
            "offset": wide[1:, 3 : k + 3],
        }[layout]
        index = torch.randint(-1, experts + 1, (rows * choices,), device="cuda", dtype=index_dtype)
        index[0] = 0
        what = {
            "experts": experts, "n": n, "k": k, "rows": rows, "choices": choices, "layout": layout,
            "group_size": group_size, "symmetric": symmetric, "dtype": str(dtype), "schedule": repr(schedule),
        }  # fmt: skip
        results.append((error_of(x, problem, index, schedule), what))
    return results


def route(shape: Shape, tokens: int) -> torch.Tensor:
    """Distinct experts for each token, at random: ``[tokens, chosen]``."""
    return torch.rand(tokens, shape.experts, device="cuda").topk(shape.chosen).indices


def run_shape(name: str, tokens: int) -> float:
    """The worse error of both projections of a model, with the schedules that the op chooses."""
    shape = SHAPES[name]
    torch.manual_seed(tokens)
    errors = []
    for (n, k), rows in zip(shape.projections, (tokens, tokens * shape.chosen), strict=True):
        problem = random_problem(shape.experts, n, k, 128, False, torch.bfloat16, shape.has_bias)
        index = route(shape, tokens).flatten()
        schedule = choose_schedule(len(index), shape.experts, n, k, processors_of(0), 128)
        x = torch.randn(rows, k, device="cuda", dtype=torch.bfloat16)
        errors.append(error_of(x, problem, index, schedule))
    return max(errors, key=lambda error: (error != error, error))


def check_products() -> dict[str, Any]:
    """Random problems and the shapes of models, in several processes because compiling takes the time."""
    workers = min(14, os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        models = {
            f"{name}, {tokens} tokens": pool.submit(run_shape, name, tokens)
            for name in SHAPES
            for tokens in TOKENS
        }
        results = [case for cases in pool.map(run_variant, range(VARIANTS)) for case in cases]
        errors = {name: round(future.result(), 4) for name, future in models.items()}
    worst = max(results, key=lambda result: (result[0] != result[0], result[0]))
    return {
        "cases": len(results),
        "worst_error_in_floors": round(worst[0], 4),
        "worst_case": worst[1],
        "models_error_in_floors": errors,
    }


def parameter(value: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=False)


def qwen_experts() -> Qwen3MoeExperts:
    """Of one layer of Qwen3-30B-A3B, without weights."""
    config = Qwen3MoeConfig(
        hidden_size=2048, moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8
    )
    with torch.device("meta"):
        return Qwen3MoeExperts(config)


def gpt_oss_experts() -> GptOssExperts:
    config = GptOssConfig(hidden_size=2944, intermediate_size=2944, num_local_experts=32)
    with torch.device("meta"):
        return GptOssExperts(config)


def int4_experts(make: Callable[[], nn.Module]) -> HadaCoreExperts:
    """With random weights, ready to decode in bf16."""
    module = make()
    swap_experts(module, group_size=128, symmetric=False, dtype=torch.bfloat16)
    assert isinstance(module, HadaCoreExperts)
    for name in module.projections:
        experts, n, words = module.get_parameter(name).shape
        weight = random_weight(experts * n, words * int4.NIBBLES_PER_WORD, 128, False, torch.bfloat16)
        for suffix, value in zip(("", "_scale", "_zero"), weight[:3], strict=True):
            assert value is not None
            setattr(module, name + suffix, parameter(value.view(experts, n, -1)))
        if module.has_bias:
            bias = torch.randn(experts, n, device="cuda", dtype=torch.bfloat16)
            setattr(module, f"{name}_bias", parameter(bias))
    module.prepare()
    assert module._is_tiled, "the experts are not in tile order on this GPU"
    return module


def bf16_experts(make: Callable[[], nn.Module]) -> nn.Module:
    module = make()
    for name, value in list(module.named_parameters()):
        setattr(module, name, parameter(torch.randn(value.shape, device="cuda", dtype=torch.bfloat16) * 0.02))
    return module


def random_inputs(shape: Shape, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    index = route(shape, tokens)
    x = torch.randn(tokens, shape.projections[0][1], device="cuda", dtype=torch.bfloat16)
    return x, index, torch.rand(index.shape, device="cuda").softmax(-1).bfloat16()


@torch.no_grad()
def through_loop(
    module: HadaCoreExperts, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """The module's forward pass as it is for training: one expert after the other."""
    with patch.object(type(module), "_needs_gradient", lambda module, x: True):
        return module(x, index, weights)


@torch.no_grad()
def check_layer(
    make: Callable[[], nn.Module], shape: Shape, counts: tuple[int, int] = (4, 16), repeats: int = REPEATS
) -> dict[str, Any]:
    """A whole module: as right as the loop over its experts, the same bits every time and from a graph.

    Args:
        make: an empty module.
        shape: of its experts.
        counts: tokens of two batches; of the first, errors and graph replays are looked at.
        repeats: of both.
    """
    module = int4_experts(make)
    exact_module: Any = copy.deepcopy(module)
    dequantize_experts(exact_module, torch.float64)
    exact_module.double().config._experts_implementation = "eager"
    batches = [random_inputs(shape, tokens) for tokens in counts]
    x, index, weights = batches[0]
    exact = exact_module(x.double(), index, weights.double())
    del exact_module
    errors = {
        path: float((run(x, index, weights).double() - exact).norm() / exact.norm())
        for path, run in (("grouped", module), ("loop", partial(through_loop, module)))
    }
    first = [module(*batch) for batch in batches]
    repeated = all(
        torch.equal(module(*batch), y)
        for _ in range(repeats)
        for batch, y in zip(batches, first, strict=True)
    )
    static = tuple(value.clone() for value in batches[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = module(*static)
    replayed = True
    for _ in range(5):
        batch = random_inputs(shape, counts[0])
        for target, value in zip(static, batch, strict=True):
            target.copy_(value)
        graph.replay()
        replayed &= torch.equal(output, module(*batch))
    return {
        "relative_error": {path: round(error, 6) for path, error in errors.items()},
        "is_as_exact_as_the_loop": errors["grouped"] <= 1.05 * errors["loop"],
        "repeats": repeats,
        "bit_identical": repeated,
        "graph_replays_equal_eager": replayed,
    }


def expert_bytes(shape: Shape, is_int4: bool) -> float:
    """Bytes of one expert's weights; int4 with bf16 scales and uint8 zeros for groups of 128."""
    per_weight = 0.5 + 3 / 128 if is_int4 else 2
    return sum(n * k for n, k in shape.projections) * per_weight


def products(layer: HadaCoreExperts, x: torch.Tensor, index: torch.Tensor, hidden: torch.Tensor) -> None:
    """Both projections, without what lies between and after them."""
    layer._project_slots("gate_up_proj", x, index)
    layer._project_slots("down_proj", hidden, index)


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
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        raise SystemExit("this check needs a Hopper GPU")
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
    write_report(report, json_file)
    print(json.dumps(report, indent=1))
    checked, layers = report["products"], report["layers"].values()
    errors = [checked["worst_error_in_floors"], *checked["models_error_in_floors"].values()]
    flags = ("is_as_exact_as_the_loop", "bit_identical", "graph_replays_equal_eager")
    is_right = all(error <= 1.1 for error in errors) and all(layer[f] for layer in layers for f in flags)
    print(f"{checked['cases']} cases, errors in floors {errors}; {'right' if is_right else 'NOT RIGHT'}")
    for row in report["decoding"]:
        print(
            f"{row['tokens']} tokens: int4 {row['us']['int4']} us ({row['share_of_floor']:.0%} of the floor, "
            f"products alone {row['products_share_of_floor']:.0%}), {row['times_faster_than_bf16']}x bf16"
        )
    if not is_right:
        raise SystemExit("grouped experts are not right on this GPU")


if __name__ == "__main__":
    typer.run(main)
