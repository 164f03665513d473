"""A model of Llama-3-8B's shape on one GPU: load on the fly, generate, save, reload.

    python scripts/check_model_gpu.py --json scripts/results/check_model_gpu.json

The weights are random, so the figures are about loading, memory and speed, not about quality. The
full-precision checkpoint (16 GB at 32 layers) is written to a temporary folder first.
"""

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import typer
from benchmark_offline_memory import make_checkpoint
from gpu_report import JsonFile, about_this_run, conclude
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_hadacore import HadaCoreConfig, HadaCoreLinear

GIB = 2**30


def step_time(
    model: PreTrainedModel, batch: int, new_tokens: int = 32, prompt: int = 128
) -> dict[str, float]:
    """Seconds of one decode step of `generate` (eager, dynamic cache), and of the prompt's pass."""
    ids = torch.randint(
        100, 1000, (batch, prompt), device="cuda", generator=torch.Generator("cuda").manual_seed(0)
    )
    options: dict[str, Any] = dict(
        do_sample=False, pad_token_id=0, eos_token_id=None, attention_mask=torch.ones_like(ids)
    )
    generate: Any = model.generate
    times: dict[int, list[float]] = {1: [], new_tokens + 1: []}
    for repeat in range(4):
        for length in times:
            torch.cuda.synchronize()
            start = time.perf_counter()
            output = generate(ids, max_new_tokens=length, min_new_tokens=length, **options)
            torch.cuda.synchronize()
            if repeat:
                times[length].append(time.perf_counter() - start)
            assert output.shape == (batch, prompt + length)
    first, whole = (statistics.median(values) for values in times.values())
    step = (whole - first) / new_tokens
    return {
        "ms_per_step": round(step * 1e3, 2),
        "tokens_per_second": round(batch / step, 1),
        "prefill_ms": round(first * 1e3, 1),
    }


def load(folder: Path, **options: object) -> tuple[PreTrainedModel, dict[str, float]]:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map={"": 0}, **options)
    torch.cuda.synchronize()
    return model, {
        "load_seconds": round(time.perf_counter() - start, 1),
        "memory_gib": round(torch.cuda.memory_allocated() / GIB, 2),
        "peak_memory_gib": round(torch.cuda.max_memory_allocated() / GIB, 2),
    }


def main(
    layers: int = 32,
    json_file: JsonFile = None,
) -> None:
    results: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        source, saved = Path(temporary) / "bf16", Path(temporary) / "int4"
        make_checkpoint(source, layers, device="cuda")
        ids = torch.arange(100, 164, device="cuda")[None]

        model, results["int4"] = load(source, quantization_config=HadaCoreConfig())
        assert sum(isinstance(m, HadaCoreLinear) for m in model.modules()) == 7 * layers
        results["int4"] |= {f"batch_1_{k}": v for k, v in step_time(model, 1).items()}
        results["int4"] |= {f"batch_16_{k}": v for k, v in step_time(model, 16).items()}
        with torch.no_grad():
            expected = model(ids).logits
        model.save_pretrained(saved)
        del model

        model, loaded = load(saved)
        results["int4"]["reload_seconds"] = loaded["load_seconds"]
        with torch.no_grad():
            logits = model(ids).logits
        bit_identical = torch.equal(logits, expected) and bool(logits.isfinite().all())
        del model

        model, results["bf16"] = load(source)
        results["bf16"] |= {f"batch_1_{k}": v for k, v in step_time(model, 1).items()}
        results["bf16"] |= {f"batch_16_{k}": v for k, v in step_time(model, 16).items()}

    report = {
        **about_this_run(f"python scripts/check_model_gpu.py --layers {layers}", "transformers"),
        "model": f"Llama-3-8B shapes, {layers} layers, random weights",
        "reload_bit_identical": bit_identical,
        "results": results,
    }
    conclude(report, [] if bit_identical else ["reload_bit_identical"], json_file)


if __name__ == "__main__":
    typer.run(main)
