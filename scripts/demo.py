"""A real language model becomes int4 and talks, on a CPU: what `make demo` runs.

    python scripts/demo.py

SmolLM2-135M comes from a PyPI package (as a GGUF file, so the "bf16" model is itself a dequantized one), is
quantized offline, and compared with the original in size, perplexity and speed. Everything is written to
`--folder`.
"""

import shutil
import statistics
import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import Annotated, Any, NamedTuple

import torch
import typer
from benchmark_cpu import decode_rate
from real_models import MODELS, export_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, logging

from hf_hadacore import HadaCoreConfig
from hf_hadacore.commands.generate import generate
from hf_hadacore.errors import HadaCoreError
from hf_hadacore.evaluation.perplexity import Estimate, Perplexity, encode, paired_difference, perplexity
from hf_hadacore.inspection import format_size, inspect_checkpoint
from hf_hadacore.offline.checkpoint import quantize_checkpoint
from hf_hadacore.offline.staging import PARTIAL_SUFFIX

MODEL = "smollm2-135m"
GROUP_SIZE = 64
PROMPTS = ("What is the capital of France?", "Explain in two sentences why the sky is blue.")
CONTEXT = 512
DECODE_STEPS = 32
DECODE_REPEATS = 3


class Measured(NamedTuple):
    """What the demo finds out about one checkpoint.

    Attributes:
        nbytes: of the weight files' tensors.
        result: on the demo's text.
        tokens_per_second: of decoding.
    """

    nbytes: int
    result: Perplexity
    tokens_per_second: float


def evaluation_text() -> str:
    """English technical prose that every CPython carries."""
    return "\n".join(topics[name] for name in sorted(topics))


def measure_perplexity(folder: Path, windows: int) -> Perplexity:
    """Perplexity on `evaluation_text`, in fp32: fast on every CPU, and only the weights' error counts."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids, bos = encode(tokenizer, evaluation_text())
    return perplexity(model, ids, bos=bos, context=CONTEXT, windows=windows, progress=True)


@torch.inference_mode()
def measure_decoding(models: list[PreTrainedModel], steps: int, repeats: int) -> list[float]:
    """Median decoding speeds in tokens per second; models take turns, and a first round warms up."""
    prompt = torch.arange(16)[None] + 100
    rounds = [[decode_rate(model, prompt, steps) for model in models] for _ in range(repeats + 1)]
    return [statistics.median(rates) for rates in zip(*rounds[1:], strict=True)]


def summary(bf16: Measured, int4: Measured) -> str:
    """What int4 cost and what it saved, as a table."""
    cost: Estimate = paired_difference(int4.result, bf16.result)
    rows = [
        ("", "bf16", "int4", ""),
        ("size", format_size(bf16.nbytes), format_size(int4.nbytes), f"{int4.nbytes / bf16.nbytes:.0%}"),
        (
            "perplexity",
            f"{bf16.result.perplexity:.2f}",
            f"{int4.result.perplexity:.2f}",
            f"{cost.value:+.3f} ± {cost.standard_error:.3f} nats per token",
        ),
        (
            "decoding, tok/s",
            f"{bf16.tokens_per_second:.1f}",
            f"{int4.tokens_per_second:.1f}",
            f"{int4.tokens_per_second / bf16.tokens_per_second:.2f}x",
        ),
    ]
    return "\n".join(
        f"{name:<16}{one:>10}{other:>12}   {change}".rstrip() for name, one, other, change in rows
    )


def main(
    folder: Annotated[Path, typer.Option(help="Where the checkpoints go.")] = Path("demo_output"),
    windows: Annotated[int, typer.Option(min=2, help=f"Windows of {CONTEXT} tokens to evaluate.")] = 12,
) -> None:
    start = time.perf_counter()
    logging.disable_progress_bar()

    title = MODELS[MODEL].title
    _step(1, f"Unpack {title} (about a minute the first time)")
    src = export_checkpoint(MODEL, folder / MODEL)

    _step(2, f"Quantize it offline: hadacore quantize {src} {src}-int4 --group-size {GROUP_SIZE}")
    dst = folder / f"{MODEL}-int4"
    for previous in (dst, folder / (dst.name + PARTIAL_SUFFIX)):
        shutil.rmtree(previous, ignore_errors=True)
    quantize_checkpoint(src, dst, HadaCoreConfig(group_size=GROUP_SIZE))

    _step(3, f"Perplexity before and after, on {windows * CONTEXT:,} tokens of Python's documentation")
    results = [measure_perplexity(path, windows) for path in (src, dst)]

    _step(4, f"Decode {DECODE_REPEATS + 1} x {DECODE_STEPS} tokens with each model")
    models: list[Any] = [
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16) for path in (src, dst)
    ]
    speeds = measure_decoding(models, DECODE_STEPS, DECODE_REPEATS)

    _step(5, "Let the int4 model talk")
    for prompt in PROMPTS:
        typer.secho(f'hadacore generate {dst} "{prompt}"', bold=True)
        generate(str(dst), prompt, max_new_tokens=64, temperature=0.0, device="cpu", chat=True)

    sizes = [inspect_checkpoint(path)["bytes"] for path in (src, dst)]
    bf16, int4 = (Measured(*values) for values in zip(sizes, results, speeds, strict=True))
    _step(6, f"{title}: what it cost and what it saved")
    typer.echo(summary(bf16, int4))
    typer.echo(f"\n{time.perf_counter() - start:.0f} s in all; both checkpoints are in {folder}")


def _step(number: int, text: str) -> None:
    typer.secho(f"\n[{number}/6] {text}", fg=typer.colors.CYAN, bold=True)


if __name__ == "__main__":
    try:
        typer.run(main)
    except HadaCoreError as error:
        raise SystemExit(f"error: {error}") from None
