"""`generate` with Llama-3-8B's shapes on one GPU: tokens per second, time to first token, memory.

    python scripts/benchmark_generate.py
    python scripts/benchmark_generate.py --model qwen3-30b-a3b --json scripts/results/generate_experts.json
    python scripts/benchmark_generate.py --part int4-graphs --batch 1 --profile

Weights are random and made on the GPU, so the figures are about speed and memory, not about quality. Parts
are bf16 and int4 weights, each with transformers' dynamic cache ("eager") and with CUDA graphs ("graphs").
"""

import functools
import gc
import json
import statistics
import time
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from gpu_report import about_this_run
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen3MoeConfig

from hf_hadacore import HadaCoreConfig
from hf_hadacore.decoding.generation import disable_cuda_graphs, enable_cuda_graphs
from hf_hadacore.quantizer import HadaCoreHfQuantizer

RESULT = Path(__file__).parent / "results" / "generate.json"
GIB = 2**30
PROMPT = 128
REPEATS = 3


class Part(StrEnum):
    # In this order: the first int4 call is the one that compiles.
    BF16_GRAPHS = "bf16-graphs"
    BF16_EAGER = "bf16-eager"
    INT4_GRAPHS = "int4-graphs"
    INT4_EAGER = "int4-eager"


def llama_8b(layers: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_attention_heads=32,
        num_key_value_heads=8,
        num_hidden_layers=layers,
        vocab_size=128256,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=False,
    )


def qwen3_30b_a3b(layers: int) -> Qwen3MoeConfig:
    return Qwen3MoeConfig(
        hidden_size=2048,
        moe_intermediate_size=768,
        num_experts=128,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,  # type: ignore[call-arg]  # of the checkpoint's config, no field of the class
        num_hidden_layers=layers,
        vocab_size=151936,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        tie_word_embeddings=False,
    )


class Model(NamedTuple):
    title: str
    layers: int
    config: Callable[[int], PreTrainedConfig]


MODELS = {
    "llama-3-8b": Model("Llama-3-8B", 32, llama_8b),
    "qwen3-30b-a3b": Model("Qwen3-30B-A3B", 48, qwen3_30b_a3b),
}


def meta_model(config: PreTrainedConfig, quantizer: HadaCoreHfQuantizer | None) -> Any:
    """A bf16 model on the meta device, as `from_pretrained` makes it before it loads.

    Args:
        config: of the model.
        quantizer: swaps linear layers for int4 ones; None leaves them.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    if quantizer is not None:
        torch.set_default_dtype(torch.bfloat16)  # that of the scales, as in from_pretrained
        quantizer.preprocess_model(model)
        torch.set_default_dtype(torch.float32)
    return model


def fill_randomly(model: Any) -> None:
    """Give a model random weights, int4 or not; one that is divided gets the same ones in every part."""
    generator_of = functools.cache(lambda device: torch.Generator(device).manual_seed(0))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(False)
        values = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        generator = generator_of(values.device)
        if values.dtype == torch.int32:
            values.random_(-(2**31), 2**31 - 1, generator=generator)
        elif name.endswith("_scale"):
            values.uniform_(0.003, 0.006, generator=generator)
        elif name.endswith("_zero"):
            values.random_(6, 10, generator=generator)
        elif values.dim() == 1:
            values.fill_(1)
        else:
            values.normal_(0, 0.02, generator=generator)


def make_model(config: PreTrainedConfig, is_int4: bool) -> Any:
    """A model with random weights on the GPU, made as `from_pretrained` makes it but without files.

    Args:
        config: of the model.
        is_int4: whether linear layers are int4 (the defaults of `HadaCoreConfig`), else all is bf16.
    """
    quantizer = HadaCoreHfQuantizer(HadaCoreConfig(), pre_quantized=True) if is_int4 else None
    model = meta_model(config, quantizer)
    model.to_empty(device="cuda")
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to("cuda")
    fill_randomly(model)
    if quantizer is not None:
        model = quantizer.postprocess_model(model)
        model.hf_quantizer = quantizer
    return model


def seconds(function: Callable[[], Any]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def captured_graph(model: Any) -> Any:
    """The graph of the last `generate` call.

    Raises:
        SystemExit: nothing was captured; the figures would not be what they are called.
    """
    state = model.get_compiled_call.__self__
    graphs = [] if state._session is None else list(state._session._graphs.values())
    if state._failure is not None or not graphs or graphs[-1]._replay is None:
        raise SystemExit(f"no graph was captured: {state._failure}")
    return graphs[-1]


def rewind(model: Any, steps: int) -> None:
    """Move the cache's position back: every replay advances it, and only what was generated has room."""
    progress = model.get_compiled_call.__self__._session.layers[0].progress
    for counter in (progress.position, *progress.counters):
        counter.sub_(steps)


def replay_ms(model: Any, graph: Any, repeats: int = 20) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    rewind(model, repeats + 1)
    graph._replay()
    begin.record()
    for _ in range(repeats):
        graph._replay()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / repeats


def print_kernels(run: Callable[[], Any], title: str, top: int = 30) -> None:
    """Print the kernels that a function launches, by the time they take together."""
    run()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        run()
        torch.cuda.synchronize()
    rows = [
        (event.self_device_time_total, event.count, event.key)
        for event in profiler.key_averages()
        if event.device_type == torch.autograd.DeviceType.CUDA and event.self_device_time_total > 0
    ]
    total, count = sum(row[0] for row in rows), sum(row[1] for row in rows)
    print(f"{title}: {count} kernels, {total / 1e3:.3f} ms")
    for spent, calls, name in sorted(rows, reverse=True)[:top]:
        print(f"  {spent:9.1f} us  {calls:5d} x {spent / calls:7.2f} us  {spent / total:5.1%}  {name[:110]}")


def measure(model: Any, batch: int, new_tokens: int, graphs: bool, profile: bool) -> dict[str, float]:
    """Times of `generate` with a prompt of 128 tokens per sequence, greedy."""
    generator = torch.Generator("cuda").manual_seed(1)
    ids = torch.randint(100, 1000, (batch, PROMPT), device="cuda", generator=generator)
    mask = torch.ones_like(ids)

    def generate(length: int) -> Any:
        # Random weights do not say that they are done; if one did, the times would mean something else.
        options: dict[str, Any] = dict(do_sample=False, pad_token_id=0, eos_token_id=128001)
        options |= dict(max_new_tokens=length, disable_compile=not graphs)
        output = model.generate(ids, attention_mask=mask, **options)
        assert output.shape == (batch, PROMPT + length) and not (output == 128001).any()

    torch.cuda.reset_peak_memory_stats()
    # Four tokens: the prompt's pass, the step that compiles, the one that is captured, the first replay.
    first_call = seconds(lambda: generate(4))
    # The buffers may have to be larger for the measured length.
    second_call = seconds(lambda: generate(new_tokens))
    prefill = [seconds(lambda: generate(1)) for _ in range(REPEATS)]
    whole = [seconds(lambda: generate(new_tokens)) for _ in range(REPEATS)]
    step = (statistics.median(whole) - statistics.median(prefill)) / (new_tokens - 1)
    result = {
        "new_tokens": new_tokens,
        "first_call_seconds": round(first_call, 2),
        "second_call_seconds": round(second_call, 2),
        "time_to_first_token_ms": round(statistics.median(prefill) * 1e3, 1),
        "ms_per_step": round(step * 1e3, 3),
        "tokens_per_second": round(batch / step, 1),
        "tokens_per_second_with_prompt": round(batch * new_tokens / statistics.median(whole), 1),
        "peak_memory_gib": round(torch.cuda.max_memory_allocated() / GIB, 2),
    }
    if graphs:
        graph = captured_graph(model)
        result["replay_ms"] = round(replay_ms(model, graph), 3)
        if profile:
            rewind(model, 2)
            print_kernels(graph._replay, f"one replay, batch {batch}")
    if profile:
        print_kernels(lambda: generate(1), f"prompt's pass, batch {batch}", top=15)
    return result


def main(
    part: Annotated[list[Part] | None, typer.Option(help="What to measure; default everything.")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Batch sizes; default 1 and 16.")] = None,
    model_name: Annotated[str, typer.Option("--model", help=f"Of {list(MODELS)}.")] = "llama-3-8b",
    layers: Annotated[int | None, typer.Option(help="Default all.")] = None,
    new_tokens: int = 128,
    profile: Annotated[bool, typer.Option(help="Print the kernels of one decoding step.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help=f"Default {RESULT.name}.")] = None,
) -> None:
    parts, batches = part or list(Part), batch or [1, 16]
    kind = MODELS[model_name]
    layers = layers or kind.layers
    results: dict[str, Any] = {}
    for weights in ("bf16", "int4"):
        wanted = [one for one in parts if one.startswith(weights)]
        if not wanted:
            continue
        gc.collect()
        torch.cuda.empty_cache()
        start = time.perf_counter()
        model = make_model(kind.config(layers), weights == "int4")
        torch.cuda.synchronize()
        made = round(time.perf_counter() - start, 1)
        print(f"{weights}: made in {made} s", flush=True)
        for one in wanted:
            disable_cuda_graphs(model)
            if one.endswith("graphs"):
                enable_cuda_graphs(model)
            memory = round(torch.cuda.memory_allocated() / GIB, 2)
            results[one] = {"made_in_seconds": made, "memory_gib": memory}
            for size in batches:
                graphs = one.endswith("graphs")
                # An eager step takes ten times as long and as many of them say no more.
                tokens = new_tokens if graphs else max(2, new_tokens // 4)
                results[one][f"batch_{size}"] = measure(model, size, tokens, graphs=graphs, profile=profile)
                print(f"{one} batch {size}: {results[one][f'batch_{size}']}", flush=True)
        del model
    options = f"--model {model_name} --layers {layers} --new-tokens {new_tokens}"
    report = {
        **about_this_run(f"python scripts/benchmark_generate.py {options}", "transformers"),
        "model": f"{kind.title} shapes, {layers} layers, random weights",
        "prompt_tokens": PROMPT,
        "results": results,
    }
    path = json_file or RESULT
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    typer.run(main)
