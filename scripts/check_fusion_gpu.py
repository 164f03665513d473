"""Are the pointwise ops and fused models right on this GPU, and what do they save?

    python scripts/check_fusion_gpu.py --json scripts/results/fusion.json
    compute-sanitizer python scripts/check_fusion_gpu.py --sanitize

Errors are relative L2 against float64, beside those of transformers' eager formulas on the same inputs. Times
are those of `fusion_times`.
"""

import copy
import random
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers
import typer
from fusion_times import EPS, check_times
from gpu_processes import process_pool
from gpu_report import JsonFile, SanitizeOnly, about_this_run, conclude, require_gpu, run_checks
from transformers import DynamicCache, StaticCache

from hf_hadacore import HadaCoreConfig, HadaCoreLinear
from hf_hadacore.fusion.fuse import fuse, unfuse
from hf_hadacore.kernels.gated_activation import ACTIVATIONS, gated_activation, gated_activation_reference
from hf_hadacore.kernels.rms_norm import add_rms_norm, rms_norm, rms_norm_reference
from hf_hadacore.kernels.rope import rope, rope_into_cache, rope_reference

CASES = 96
MODELS = ("llama", "qwen3", "gemma3_text", "mixtral")
FORMULAS = ((0.0, True), (1.0, False), (0.0, False))
# Ours may add the squares of a row in another order, no more.
SLACK = 1.02


def error(y: torch.Tensor, exact: torch.Tensor) -> float:
    norm = exact.double().norm()
    return float((y.double() - exact).norm() / norm) if norm else 0.0


def draw_tensor(draw: random.Random, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Of one of the layouts that a projection's output may have."""
    layout = draw.choice(["contiguous", "part", "transposed", "every second"])
    *leading, n = shape
    if layout == "contiguous":
        return torch.randn(shape, device="cuda").to(dtype)
    if layout == "part":
        return torch.randn((*leading, 3 * n), device="cuda").to(dtype)[..., n : 2 * n]
    if layout == "transposed":
        wide = torch.randn((*reversed(leading), n), device="cuda").to(dtype)
        return wide.permute(*reversed(range(len(leading))), len(leading))
    return torch.randn((*leading, 2 * n), device="cuda").to(dtype)[..., ::2]


def norm_case(draw: random.Random, dtype: torch.dtype) -> dict[str, float]:
    n = draw.choice([1, 40, 64, 128, 576, 2048, 3584, 4096, 8192, 18432])
    shape = (draw.choice([1, 2, 3]), draw.choice([1, 7, 33]), n)
    x, residual = draw_tensor(draw, shape, dtype), draw_tensor(draw, shape, dtype)
    weight = torch.randn(n, device="cuda").to(dtype)
    offset, round_first = draw.choice(FORMULAS)
    options: dict[str, Any] = dict(weight_offset=offset, round_before_weight=round_first)
    total = x
    if draw.random() < 0.5:
        y, total = add_rms_norm(x, residual, weight, EPS, **options)
        assert torch.equal(total, x + residual), "sum"
    else:
        y = rms_norm(x, weight, EPS, **options)
    eager = rms_norm_reference(total, weight, EPS, offset, round_first)
    wide = total.double()
    exact = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS) * (offset + weight.double())
    # Sums in another order may move a value that is rounded before the weight by a unit, and the result's own
    # rounding may move it by another.
    units = 4 if dtype == torch.float32 else 2 if round_first else 1
    spacing = torch.finfo(dtype).eps * units * eager.double().abs()
    assert ((y.double() - eager).abs() <= spacing + 1e-7).all(), f"more than {units} unit(s) from eager code"
    return {"ours": error(y, exact), "eager": error(eager, exact), "elements": y.numel()}


def activation_case(draw: random.Random, dtype: torch.dtype) -> dict[str, float]:
    shape = (draw.choice([1, 2]), draw.choice([1, 5, 17]), draw.choice([8, 100, 1024, 2055, 14336]))
    gate, up = 3 * draw_tensor(draw, shape, dtype), draw_tensor(draw, shape, dtype)
    activation = draw.choice(ACTIVATIONS)
    y = gated_activation(gate, up, activation)
    eager = gated_activation_reference(gate, up, activation)
    exact = gated_activation_reference(gate.double(), up.double(), activation)
    return {"ours": error(y, exact), "eager": error(eager, exact), "elements": y.numel()}


def rope_case(draw: random.Random, dtype: torch.dtype) -> dict[str, float]:
    batch, tokens = draw.choice([(1, 1), (16, 1), (2, 9), (1, 130)])
    q_heads, kv_heads, d = draw.choice([(32, 8, 128), (14, 2, 64), (4, 1, 256), (3, 3, 80), (64, 8, 128)])
    sizes = [q_heads * d, kv_heads * d, kv_heads * d]
    fused = torch.randn((batch, tokens, sum(sizes)), device="cuda").to(dtype)
    q, k, v = (part.view(batch, tokens, -1, d) for part in fused.split(sizes, -1))
    if draw.random() < 0.3:
        q, k = (draw_tensor(draw, tuple(part.shape), dtype) for part in (q, k))
    angles = 9 * torch.randn((draw.choice([1, batch]), tokens, d), device="cuda")
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    has_norm = draw.random() < 0.5
    weights = [torch.randn(d, device="cuda").to(dtype) if has_norm else None for _ in range(2)]
    offset, round_first = draw.choice(FORMULAS)
    options: dict[str, Any] = dict(eps=EPS, weight_offset=offset, round_before_weight=round_first)
    q_out, k_out = rope(q, k, cos, sin, *weights, **options)

    start, capacity = 5, tokens + 8
    keys, values = torch.full((2, batch, kv_heads, capacity, d), float("nan"), device="cuda").to(dtype)
    position = torch.tensor([start], device="cuda")
    q_cached = rope_into_cache(q, k, v, cos, sin, keys, values, position, *weights, **options)
    written = slice(start, start + tokens)
    assert torch.equal(q_cached, q_out) and torch.equal(keys[:, :, written], k_out), "cache and no cache"
    assert torch.equal(values[:, :, written], v.transpose(1, 2)), "values"
    assert bool(keys[:, :, :start].isnan().all() and keys[:, :, start + tokens :].isnan().all()), "bounds"

    results = {"ours": 0.0, "eager": 0.0, "elements": q_out.numel()}
    for y, x, weight in ((q_out, q, weights[0]), (k_out, k, weights[1])):
        eager = rope_reference(x, cos, sin, weight, EPS, offset, round_first)
        y = y.transpose(1, 2)
        assert has_norm or dtype == torch.float32 or torch.equal(y, eager), "differs from eager code"
        wide = x.double()
        if weight is not None:
            root = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
            wide = wide * root * (offset + weight.double())
        exact = rope_reference(wide, cos.double(), sin.double(), None, 0, 0, True)
        results["ours"] = max(results["ours"], error(y, exact))
        results["eager"] = max(results["eager"], error(eager, exact))
    return results


KINDS = {"rms_norm": norm_case, "gated_activation": activation_case, "rope": rope_case}


def run_case(case: int) -> tuple[str, str, dict[str, float] | str]:
    """Kind, dtype and errors of one random problem, or the traceback."""
    draw = random.Random(case)
    torch.manual_seed(case)
    kind = list(KINDS)[case % len(KINDS)]
    dtype = draw.choice([torch.float16, torch.bfloat16, torch.bfloat16, torch.float32])
    try:
        return kind, str(dtype), KINDS[kind](draw, dtype)
    except Exception:
        return kind, str(dtype), f"case {case}, {dtype}: {traceback.format_exc()}"


def check_cases() -> dict[str, Any]:
    # Most cases compile a kernel of their own, which takes the time: several processes share the GPU.
    with process_pool() as pool:
        outcomes = list(pool.map(run_case, range(CASES), chunksize=4))
    report: dict[str, Any] = {"cases": CASES, "failed": 0}
    for kind, dtype, outcome in outcomes:
        if isinstance(outcome, str):
            print(outcome)
            report["failed"] += 1
            continue
        entry = report.setdefault(f"{kind} {dtype}", {"cases": 0, "worst_error": 0.0, "worst_to_eager": 0.0})
        entry["cases"] += 1
        entry["worst_error"] = max(entry["worst_error"], outcome["ours"])
        # A few elements have no average error to compare.
        if outcome["elements"] >= 512 and outcome["eager"]:
            entry["worst_to_eager"] = max(entry["worst_to_eager"], outcome["ours"] / outcome["eager"])
    for kind, entry in report.items():
        # fp32 results carry the roundings inside an activation or a product, which differ.
        if isinstance(entry, dict) and "float32" not in kind and entry["worst_to_eager"] > SLACK:
            print(f"{kind}: {entry['worst_to_eager']} times the error of eager code")
            report["failed"] += 1
    return report


def check_beyond_int32() -> dict[str, bool]:
    """Tensors with more than 2^31 elements."""
    right = {}
    n, rows = 4096, (1 << 19) + 3
    x = torch.randn(rows, n, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(n, device="cuda", dtype=torch.bfloat16)
    y = rms_norm(x, weight, EPS)
    right["rms_norm"] = torch.equal(y[-5:], rms_norm(x[-5:].clone(), weight, EPS))
    y = gated_activation(x, x)
    right["gated_activation"] = torch.equal(y[-5:], gated_activation(x[-5:].clone(), x[-5:].clone()))
    del x, y
    torch.cuda.empty_cache()
    heads, d, capacity = 8, 128, (1 << 21) + 9
    keys, values = torch.zeros(2, 1, heads, capacity, d, device="cuda", dtype=torch.bfloat16)
    q = torch.randn(1, 2, 32, d, device="cuda", dtype=torch.bfloat16)
    k, v = torch.randn(2, 1, 2, heads, d, device="cuda", dtype=torch.bfloat16)
    cos = torch.randn(1, 2, d, device="cuda", dtype=torch.bfloat16)
    position = torch.tensor([capacity - 2], device="cuda")
    rope_into_cache(q, k, v, cos, cos, keys, values, position)
    right["rope_into_cache"] = torch.equal(keys[:, :, -2:], rope(q, k, cos, cos)[1]) and torch.equal(
        values[:, :, -2:], v.transpose(1, 2)
    )
    return right


def check_overlap() -> bool:
    """Kernels that start while the one before runs never read or overwrite what is not finished.

    A captured chain, in which each op reads what the one before has written into memory that is used again
    and again, gives what the same chain gives with a pause after every op.
    """
    torch.manual_seed(0)
    rows, n = 3, 4096
    weight = torch.randn(n, device="cuda", dtype=torch.bfloat16)
    inputs = torch.randn(20, rows, 2 * n, device="cuda", dtype=torch.bfloat16)
    both = torch.empty_like(inputs[0])

    def chain(pause: Callable[[], None]) -> list[torch.Tensor]:
        results = []
        residual = torch.zeros(rows, n, device="cuda", dtype=torch.bfloat16)
        for value in inputs:
            both.copy_(value)
            pause()
            y = gated_activation(both[:, :n], both[:, n:])
            pause()
            y, residual = add_rms_norm(y, residual, weight, EPS)
            pause()
            y = rms_norm(y, weight, EPS)
            pause()
            both[:, :n] = y
            results += [y, residual]
        return results

    expected = [result.clone() for result in chain(torch.cuda.synchronize)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = chain(lambda: None)
    for _ in range(200):
        graph.replay()
    torch.cuda.synchronize()
    return all(map(torch.equal, results, expected))


def tiny_model(name: str) -> Any:
    common: dict[str, Any] = dict(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=256,
        pad_token_id=0,
        dtype=torch.bfloat16,
    )
    config = transformers.AutoConfig.for_model(name, **common)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).to("cuda", torch.bfloat16).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Weights of a few times their usual size, so that the layers matter beside the residual.
            parameter.normal_(1, 0.1) if parameter.ndim == 1 else parameter.mul_(3)
    layers = [item for item in model.named_modules() if type(item[1]) is torch.nn.Linear]
    for path, linear in layers:
        if "lm_head" not in path and "gate" != path.rpartition(".")[2]:
            model.set_submodule(path, HadaCoreLinear.from_linear(linear, HadaCoreConfig(), name=path))
    return model


@torch.no_grad()
def logits_of(model: Any, cache: Any) -> torch.Tensor:
    """A prompt with padding on the left, then eight tokens one by one."""
    ids = torch.randint(1, 256, (2, 20), device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    mask = torch.ones(2, 20, dtype=torch.int64, device="cuda")
    mask[0, :5] = 0
    parts = [model(ids[:, :12], attention_mask=mask[:, :12], past_key_values=cache).logits]
    for end in range(13, 21):
        step = model(ids[:, end - 1 : end], attention_mask=mask[:, :end], past_key_values=cache)
        parts.append(step.logits)
    return torch.cat(parts, dim=1)[mask.bool()]


def check_model(name: str) -> dict[str, float]:
    """Relative L2 of fused against unfused logits, beside that of unfused bf16 against fp32."""
    model = tiny_model(name)
    makers: dict[str, Callable[[], Any]] = {
        "dynamic": lambda: DynamicCache(config=model.config),
        "static": lambda: StaticCache(config=model.config, max_cache_len=32),
    }
    plain = {kind: logits_of(model, make()) for kind, make in makers.items()}
    exact = logits_of(copy.deepcopy(model).float(), makers["dynamic"]()).double()
    counts = fuse(model)
    results: dict[str, float] = {f"fused_{kind}": count for kind, count in counts.items()}
    for kind, make in makers.items():
        fused = logits_of(model, make())
        results[f"{kind}_fused_to_unfused"] = error(fused, plain[kind].double())
        results[f"{kind}_fused_to_fp32"] = error(fused, exact)
        results[f"{kind}_unfused_to_fp32"] = error(plain[kind], exact)
    unfuse(model)
    assert torch.equal(logits_of(model, makers["static"]()), plain["static"]), "unfuse"
    for kind in makers:
        ratio = results[f"{kind}_fused_to_fp32"] / results[f"{kind}_unfused_to_fp32"]
        assert ratio < 1.2, (name, results)
    return results


def sanitize() -> None:
    """One small problem of every kind, for compute-sanitizer."""
    for case in range(24):
        outcome = run_case(case)[2]
        assert not isinstance(outcome, str), outcome
    torch.cuda.synchronize()
    print("sanitize: every kind ran")


def main(
    json_file: JsonFile = None,
    sanitize_only: SanitizeOnly = False,
) -> None:
    require_gpu()
    if sanitize_only:
        return sanitize()
    report: dict[str, Any] = about_this_run("python scripts/check_fusion_gpu.py", "transformers")
    checks: dict[str, Callable[[], Any]] = {
        "random_shapes": check_cases,
        "beyond_2_31_elements": check_beyond_int32,
        "overlapping_launches_are_right": check_overlap,
        **{f"model {name}": partial(check_model, name) for name in MODELS},
        "times": check_times,
    }
    failed = run_checks(report, checks)
    if report.get("random_shapes", {}).get("failed"):
        failed.append("random_shapes")
    right = [*report.get("beyond_2_31_elements", {}).values(), report.get("overlapping_launches_are_right")]
    if not all(right):
        failed.append("large tensors or overlapping launches")
    conclude(report, failed, json_file, rows="times")


if __name__ == "__main__":
    typer.run(main)
