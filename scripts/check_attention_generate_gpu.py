"""Models with 8-bit attention and cache on one GPU: correctness, memory, and decoding at 32k tokens.

    python scripts/check_attention_generate_gpu.py --json scripts/results/attention_generate.json
    python scripts/check_attention_generate_gpu.py --part tokens --part logits

Weights are random. Every part runs, whatever the others do; the summary comes last.
"""

import gc
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from benchmark_generate import captured_graph, llama_8b, make_model, print_kernels
from gpu_report import JsonFile, about_this_run, write_report
from transformers import AutoModelForCausalLM, DynamicCache

from hf_hadacore import HadaCoreCache
from hf_hadacore.attention import decode_cache
from hf_hadacore.decoding.generation import enable_cuda_graphs
from hf_hadacore.kernels import attention
from hf_hadacore.kernels.measure import copy_bandwidth

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from tiny_models import token_ids
from varied_models import LENGTH, left_padded, varied_model

NAMES = ("llama", "qwen3", "gemma3+sliding", "gpt-oss+sliding")
IMPLEMENTATIONS = ("hadacore", "hadacore-int8-fp8")
CONTEXT = 32768
LONG = 131072


class Part(StrEnum):
    TOKENS = "tokens"
    LOGITS = "logits"
    MEMORY = "memory"
    SPEED = "speed"


@contextmanager
def reference_path() -> Iterator[None]:
    """Attention in plain torch."""
    kernel = attention._kernel
    attention._kernel = lambda name: None  # type: ignore[assignment]
    try:
        yield
    finally:
        attention._kernel = kernel


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def forced(model: Any, ids: torch.Tensor, prompt: int, cache: Any) -> torch.Tensor:
    """Logits of all tokens: the prompt in one pass, a few in another, then one by one."""
    with torch.no_grad():
        parts = [model(ids[:, :prompt], past_key_values=cache).logits]
        parts.append(model(ids[:, prompt : prompt + 8], past_key_values=cache).logits)
        for end in range(prompt + 9, ids.shape[1] + 1):
            parts.append(model(ids[:, end - 1 : end], past_key_values=cache).logits)
    return torch.cat([part.float() for part in parts], 1)


def check_tokens() -> dict[str, Any]:
    """`generate` with graphs against itself without, greedy; sums in another order may change tokens."""
    results = {}
    for name in NAMES:
        for implementation in IMPLEMENTATIONS:
            model: Any = varied_model(name, torch.bfloat16).cuda()
            model.set_attn_implementation(implementation)
            for padded in (False, True):
                inputs = left_padded() if padded else {"inputs": token_ids(3, LENGTH)}
                inputs = {key: value.cuda() for key, value in inputs.items()}
                options: dict[str, Any] = dict(**inputs, do_sample=False, max_new_tokens=300)
                options |= dict(return_dict_in_generate=True, output_logits=True)
                expected = model.generate(**options)
                assert type(expected.past_key_values) is HadaCoreCache
                enable_cuda_graphs(model)
                got = [model.generate(**options) for _ in range(2)]
                captured_graph(model)
                assert torch.equal(got[0].sequences, got[1].sequences), "two calls differ"
                same = (got[0].sequences == expected.sequences).all(0).tolist()
                agreed = (same.index(False) if False in same else len(same)) - LENGTH
                # The first step that the sequences had in common.
                one, other = (torch.stack(x.logits[: max(agreed, 1)]) for x in (got[0], expected))
                error = relative_error(one, other)
                case = f"{implementation} {name}{' padded' if padded else ''}"
                results[case] = {"tokens_agreed": agreed, "logits_relative_difference": round(error, 6)}
                print(case, results[case], flush=True)
                assert error < 0.05, f"{case}: logits differ by {error}"
    return results


def check_logits() -> dict[str, Any]:
    """Cached decoding of a model with heads of 128: the kernels' error against the reference path's."""
    config = llama_8b(4)
    results = {}
    for implementation in IMPLEMENTATIONS:
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().cuda()
        ids = torch.randint(100, 1000, (2, 1100), device="cuda")
        model.set_attn_implementation("eager")
        exact = forced(model.float(), ids, 1024, DynamicCache(config=config))
        model.bfloat16()
        plain = forced(model, ids, 1024, DynamicCache(config=config))
        model.set_attn_implementation(implementation)
        kernels = forced(model, ids, 1024, HadaCoreCache(config))
        with reference_path():
            reference = forced(model, ids, 1024, HadaCoreCache(config))
        errors = {
            name: round(relative_error(got, exact), 6)
            for name, got in (("bf16", plain), ("kernels", kernels), ("reference", reference))
        }
        top, second = exact.topk(2).values.unbind(-1)
        is_clear = top - second > 2 * (reference - exact).abs().amax(-1)
        same = kernels.argmax(-1) == exact.argmax(-1)
        results[implementation] = errors | {
            "clear_tokens": int(is_clear.sum()),
            "clear_tokens_equal": int((is_clear & same).sum()),
            "tokens_equal": round(float(same.float().mean()), 4),
        }
        print(implementation, results[implementation], flush=True)
        assert errors["kernels"] <= 1.1 * errors["reference"], errors
        assert (same | ~is_clear).all(), "a token with a clear margin differs"
    return results


def check_memory() -> dict[str, Any]:
    """A cache of 128k tokens with the sizes of an 8B model."""
    config = llama_8b(32)
    config._attn_implementation = "hadacore"
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    cache = HadaCoreCache(config)
    key, value = torch.randn(2, 1, 8, LONG, 128, device="cuda", dtype=torch.bfloat16)
    query = key[:, :, -1:].repeat_interleave(4, 1)
    new: Any
    for index in range(len(cache.layers)):
        new = cache.update(key, value, index)[0]
        new.store(query, None)
    bf16 = len(cache.layers) * (key.nbytes + value.nbytes)
    del key, value, query, new
    held = torch.cuda.memory_allocated() - before
    print(f"{held / 2**30:.2f} GiB for {LONG} tokens, bf16 takes {bf16 / 2**30:.2f}", flush=True)
    assert held < 0.53 * bf16
    return {"tokens": LONG, "bytes": held, "bf16_bytes": bf16, "bytes_per_token": cache.bytes_per_token}


def at_context(model: Any, batch: int, repeats: int = 20) -> float:
    """Milliseconds of a decoding step that is replayed behind 32k tokens."""
    ids = torch.randint(100, 1000, (batch, 128), device="cuda")
    model.generate(ids, do_sample=False, max_new_tokens=CONTEXT + 64, stopping_criteria=[_stop_after(136)])
    graph = captured_graph(model)
    progress = model.get_compiled_call.__self__._session.layers[0].progress
    graph._inputs["attention_mask"][:, : CONTEXT + 64] = 1
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for _ in range(2):
        for counter in (progress.position, *progress.counters):
            counter.fill_(CONTEXT)
        graph._replay()
        begin.record()
        for _ in range(repeats):
            graph._replay()
        end.record()
        torch.cuda.synchronize()
    return begin.elapsed_time(end) / repeats


def _stop_after(length: int) -> Callable[..., torch.Tensor]:
    def stop(input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= length, device=input_ids.device)

    return stop


def check_speed(profile: bool) -> dict[str, Any]:
    """Steps of an 8B model with int4 weights behind 32k tokens, bf16 cache and 8-bit; buffers hold noise."""
    config = llama_8b(32)
    config.max_position_embeddings = 2 * CONTEXT
    model = make_model(config, is_int4=True)
    # Room at once for what is pretended to be there.
    decode_cache._ROOM = CONTEXT + 64
    results: dict[str, Any] = {"copy_tb_per_second": round(copy_bandwidth() / 1e12, 3)}
    for batch in (1, 8):
        row: dict[str, float] = {}
        for implementation in ("sdpa", *IMPLEMENTATIONS):
            model.set_attn_implementation(implementation)
            enable_cuda_graphs(model)
            gc.collect()
            torch.cuda.empty_cache()
            row[implementation] = round(at_context(model, batch), 3)
            if profile:
                print_kernels(captured_graph(model)._replay, f"{implementation}, batch {batch}", top=12)
        results[f"batch_{batch}"] = {"ms_per_step": row} | {
            "tokens_per_second": {name: round(batch / ms * 1e3, 1) for name, ms in row.items()},
            "speedup": {name: round(row["sdpa"] / row[name], 3) for name in IMPLEMENTATIONS},
        }
        print(f"batch {batch}: {results[f'batch_{batch}']}", flush=True)
    return results


def main(
    part: Annotated[list[Part] | None, typer.Option(help="What to do; default everything.")] = None,
    profile: Annotated[bool, typer.Option(help="Print the kernels of a step.")] = False,
    json_file: JsonFile = None,
) -> None:
    transformers.logging.set_verbosity_error()
    parts: dict[Part, Callable[[], dict[str, Any]]] = {
        Part.TOKENS: check_tokens,
        Part.LOGITS: check_logits,
        Part.MEMORY: check_memory,
        Part.SPEED: lambda: check_speed(profile),
    }
    results, failed = {}, []
    for name in part or list(Part):
        try:
            results[str(name)] = parts[name]()
        except (Exception, SystemExit):
            failed.append(str(name))
            traceback.print_exc()
        gc.collect()
        torch.cuda.empty_cache()
    command = "python scripts/check_attention_generate_gpu.py"
    write_report(about_this_run(command, "transformers") | {"failed": failed, "results": results}, json_file)
    print(f"failed: {', '.join(failed)}" if failed else "all ok")
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    typer.run(main)
