"""Int4 experts with random weights, and what they are held to.

Errors are relative L2 against float64 products with the weights exactly as stored, in multiples of the error
that rounding the exact result once would have. Every output is filled with NaN before the kernel runs.
"""

import copy
import random
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from check_w4a16 import beyond, in_floors, random_weight
from torch import nn
from transformers import GptOssConfig, Qwen3MoeConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from hf_hadacore import int4
from hf_hadacore.int4 import Int4Weight
from hf_hadacore.kernels.w4a16_experts import choose_schedule, launch, slots_by_expert
from hf_hadacore.kernels.w4a16_launch import processors_of
from hf_hadacore.kernels.w4a16_schedules import Schedule
from hf_hadacore.kernels.w4a16_tiles import to_tiles
from hf_hadacore.modules.experts import HadaCoreExperts, dequantize_experts, swap_experts

REPEATS = 200


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


def random_rows(draw: random.Random, rows: int, k: int, dtype: torch.dtype) -> tuple[str, torch.Tensor]:
    """One of the layouts that x may have, and an x ``[rows, k]`` of that layout."""
    wide = torch.randn(rows + 1, k + 64, device="cuda").to(dtype)
    layout = draw.choice(["contiguous", "rows", "offset"])
    x = {
        "contiguous": wide[:rows, :k].contiguous(),
        "rows": wide[:rows, :k],
        "offset": wide[1:, 3 : k + 3],
    }[layout]
    return layout, x


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


def summary_of(results: list[tuple[float, dict[str, Any]]], shapes: dict[str, float]) -> dict[str, Any]:
    """Of the errors of random problems, each with what it was, and of the shapes of models."""
    worst = max(results, key=lambda result: (result[0] != result[0], result[0]))
    return {
        "cases": len(results),
        "worst_error_in_floors": round(worst[0], 4),
        "worst_case": worst[1],
        "models_error_in_floors": shapes,
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


def failures(products: dict[str, Any], layers: dict[str, dict[str, Any]]) -> list[str]:
    """What is wrong in a `summary_of` and in what `check_layer` says of some models."""
    errors = {"random problems": products["worst_error_in_floors"], **products["models_error_in_floors"]}
    flags = ("is_as_exact_as_the_loop", "bit_identical", "graph_replays_equal_eager")
    wrong = [f"{name}: not {flag}" for name, layer in layers.items() for flag in flags if not layer[flag]]
    return beyond(errors) + wrong
