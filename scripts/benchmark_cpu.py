"""Decode and prefill speed of a model on the CPU: int4 beside bf16, in one run.

    python scripts/benchmark_cpu.py [SRC] --json scripts/results/cpu_speed.json

SRC is a full-precision checkpoint folder. In a small model the output head, attention and Python take a share
of the time that int4 cannot change, so a second model with TinyLlama-1.1B's shapes, of fewer layers and with
random weights, is measured too. Both forms of a model are timed in turn, repeat by repeat, so that a machine
that gets slower gets slower for both; the figures are medians. Where the system tells (Linux), a timing that
other processes disturbed is taken again.
"""

import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from gpu_report import JsonFile, about_this_run, write_report
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, PreTrainedModel

from hf_hadacore import HadaCoreConfig

PREFILL_LENGTHS = (32, 128, 512)
LARGER = LlamaConfig(
    vocab_size=32000,
    hidden_size=2048,
    intermediate_size=5632,
    num_attention_heads=32,
    num_key_value_heads=4,
    num_hidden_layers=8,
)
MAX_BUSY_ELSEWHERE = 0.2  # cores


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


def undisturbed(timing: Callable[[], float], attempts: int = 500) -> float:
    """The result of a timing during which other processes left the CPU alone.

    Raises:
        SystemExit: there was no such moment in that many attempts.
    """
    for _ in range(attempts):
        start, others = time.perf_counter(), _seconds_of_others()
        result = timing()
        busy = (_seconds_of_others() - others) / (time.perf_counter() - start)
        if busy <= MAX_BUSY_ELSEWHERE:
            return result
        time.sleep(1)
    raise SystemExit("the machine is too busy to measure speed")


def _seconds_of_others() -> float:
    """CPU time that all other processes have used since the system started; 0 where it does not tell."""
    statistics_file = Path("/proc/stat")
    if not statistics_file.exists():
        return 0.0
    user, nice, system, _, _, irq, softirq, *_ = map(int, statistics_file.read_text().split()[1:9])
    ticks = user + nice + system + irq + softirq
    return ticks / os.sysconf("SC_CLK_TCK") - time.process_time()


@torch.inference_mode()
def measure(models: dict[str, PreTrainedModel], repeats: int, steps: int) -> dict[str, dict[str, float]]:
    """Median tokens per second by model and task."""
    prompt = torch.arange(16)[None] + 100
    tasks: dict[str, Callable[[PreTrainedModel], float]] = {
        "decode": lambda model: decode_rate(model, prompt, steps),
        **{f"prefill_{n}": partial(prefill_rate, length=n) for n in PREFILL_LENGTHS},
    }
    rates: dict[str, dict[str, list[float]]] = {name: {task: [] for task in tasks} for name in models}
    for task, rate in tasks.items():
        for model in models.values():  # warms up
            rate(model)
        for _ in range(repeats):
            for name, model in models.items():
                rates[name][task].append(undisturbed(partial(rate, model)))
    return {
        name: {task: round(statistics.median(values), 2) for task, values in by_task.items()}
        for name, by_task in rates.items()
    }


def _cpu_name() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return names[0] if names else f"CPU, {platform.machine()}"


def compare(src: Path, title: str, group_size: int, repeats: int, steps: int) -> dict[str, Any]:
    """Speeds of one checkpoint in bf16 and in int4."""
    config = HadaCoreConfig(group_size=group_size)
    models: dict[str, Any] = {
        "bf16": AutoModelForCausalLM.from_pretrained(src, dtype=torch.bfloat16),
        "int4": AutoModelForCausalLM.from_pretrained(src, dtype=torch.bfloat16, quantization_config=config),
    }
    rates = measure(models, repeats, steps)
    ratios = {task: round(rates["int4"][task] / rates["bf16"][task], 3) for task in rates["bf16"]}
    for task, ratio in ratios.items():
        both = f"bf16 {rates['bf16'][task]:9.1f}   int4 {rates['int4'][task]:9.1f} tok/s"
        print(f"{title}: {task:12} {both}  {ratio:.2f}x", flush=True)
    return {"model": title, "tokens_per_second": rates, "int4_over_bf16": ratios}


def main(
    src: Annotated[Path | None, typer.Argument(help="Full-precision checkpoint folder.")] = None,
    group_size: int = 64,
    repeats: int = 5,
    steps: int = 24,
    json_file: JsonFile = None,
) -> None:
    models = [compare(src, src.name, group_size, repeats, steps)] if src else []
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(LARGER, dtype=torch.bfloat16).save_pretrained(folder)
        title = f"TinyLlama-1.1B shapes, {LARGER.num_hidden_layers} layers"
        models.append(compare(Path(folder), title, group_size, repeats, steps))
    result = {
        **about_this_run(
            f"python scripts/benchmark_cpu.py {src.name if src else ''} --group-size {group_size}",
            "transformers",
        ),
        "device": f"{_cpu_name()}, {torch.get_num_threads()} threads",
        "isa": torch.backends.cpu.get_cpu_capability(),
        "group_size": group_size,
        "repeats": repeats,
        "models": models,
    }
    write_report(result, json_file)


if __name__ == "__main__":
    typer.run(main)
