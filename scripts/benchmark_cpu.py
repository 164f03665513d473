"""Decode and prefill speed of a model on the CPU: int4 beside bf16, in one run.

    python scripts/benchmark_cpu.py SRC --json scripts/results/cpu_speed.json

SRC is a full-precision checkpoint folder. Both models are timed in turn, repeat by repeat, so that a machine
that gets slower gets slower for both; the figures are medians.
"""

import json
import platform
import statistics
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import torch
import transformers
import typer
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

import hf_hadacore
from hf_hadacore import HadaCoreConfig

PREFILL_LENGTHS = (32, 128, 512)


def decode_rate(model: PreTrainedModel, prompt: torch.Tensor, steps: int) -> float:
    """Tokens per second of greedy decoding after the prompt, the prompt's own pass not counted."""
    cache = DynamicCache(config=model.config)
    token = model(prompt, past_key_values=cache).logits[:, -1:].argmax(-1)
    start = time.perf_counter()
    for _ in range(steps):
        token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
    return steps / (time.perf_counter() - start)


def prefill_rate(model: PreTrainedModel, length: int) -> float:
    """Prompt tokens per second of one forward pass over `length` tokens (logits of the last one only)."""
    prompt = torch.arange(length)[None] % 1000 + 100
    start = time.perf_counter()
    model(prompt, logits_to_keep=1)
    return length / (time.perf_counter() - start)


@torch.inference_mode()
def measure(models: dict[str, PreTrainedModel], repeats: int, steps: int) -> dict[str, dict[str, float]]:
    """Median tokens per second by model and task."""
    rates: dict[str, dict[str, list[float]]] = {name: {} for name in models}
    prompt = torch.arange(16)[None] + 100
    for repeat in range(repeats + 1):
        for name, model in models.items():
            tasks = {"decode": decode_rate(model, prompt, steps)}
            tasks.update({f"prefill_{n}": prefill_rate(model, n) for n in PREFILL_LENGTHS})
            if repeat:  # the first round warms up
                for task, rate in tasks.items():
                    rates[name].setdefault(task, []).append(rate)
    return {
        name: {task: round(statistics.median(values), 2) for task, values in tasks.items()}
        for name, tasks in rates.items()
    }


def main(
    src: Annotated[Path, typer.Argument(help="Full-precision checkpoint folder.")],
    group_size: int = 64,
    repeats: int = 5,
    steps: int = 48,
    json_file: Annotated[Path | None, typer.Option("--json", help="Where to write the results.")] = None,
) -> None:
    bf16 = AutoModelForCausalLM.from_pretrained(src, dtype=torch.bfloat16)
    int4 = AutoModelForCausalLM.from_pretrained(
        src, dtype=torch.bfloat16, quantization_config=HadaCoreConfig(group_size=group_size)
    )
    rates = measure({"bf16": bf16, "int4": int4}, repeats, steps)
    ratios = {task: round(rates["int4"][task] / rates["bf16"][task], 3) for task in rates["bf16"]}
    result = {
        "command": f"python scripts/benchmark_cpu.py {src.name} --group-size {group_size}",
        "date": datetime.now(UTC).date().isoformat(),
        "device": f"CPU, {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
        "isa": torch.backends.cpu.get_cpu_capability(),
        "versions": {
            "hf_hadacore": hf_hadacore.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "model": src.name,
        "group_size": group_size,
        "repeats": repeats,
        "tokens_per_second": rates,
        "int4_over_bf16": ratios,
    }
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=2) + "\n")
    for task, ratio in ratios.items():
        print(
            f"{task:12} bf16 {rates['bf16'][task]:9.1f}   int4 {rates['int4'][task]:9.1f} tok/s  {ratio:.2f}x"
        )


if __name__ == "__main__":
    typer.run(main)
