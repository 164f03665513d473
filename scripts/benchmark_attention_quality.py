"""What 8-bit attention costs in perplexity on real models: without rotation, with it, with the K constant.

    python scripts/benchmark_attention_quality.py --text wikipedia_eval.txt \
        --json scripts/results/attention_quality.json

Weights and everything but attention are fp32. All kinds of attention read the same bf16 queries, keys and
values; the baseline is PyTorch's on them. The models are dequantized GGUF files.
"""

import time
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from quality_report import about_quality, as_json, merge_report
from real_models import MODELS, export_checkpoint
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer
from transformers.masking_utils import AttentionMaskInterface

from hf_hadacore.attention.functional import quantized_attention
from hf_hadacore.attention.interface import interval_mask
from hf_hadacore.evaluation.perplexity import Perplexity, encode, paired_difference, perplexity

NAME = "attention-benchmark"
CONTEXT = 1024
WINDOWS = {"cuda": 100, "cpu": 20}


class Variant(NamedTuple):
    """A kind of attention.

    Attributes:
        name: for people.
        options: of `quantized_attention`; None for PyTorch's.
    """

    name: str
    options: dict[str, Any] | None


BASELINE = Variant("bf16", None)
VARIANTS = [
    Variant("fp8, no rotation", {"mode": "fp8", "rotate": False, "k_mean": False}),
    Variant("fp8, rotation", {"mode": "fp8", "k_mean": False}),
    Variant("fp8, rotation, K constant", {"mode": "fp8"}),
    Variant("int8-fp8, rotation, K constant", {"mode": "int8-fp8"}),
]
# What each is compared with, besides the baseline: the step before it.
STEPS = dict(zip([v.name for v in VARIANTS[1:]], [v.name for v in VARIANTS], strict=False))


def use(variant: Variant) -> None:
    """Let models with the attention implementation `NAME` compute that."""

    def forward(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        sliding_window: int | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        query, key, value = query.bfloat16(), key.bfloat16(), value.bfloat16()
        if variant.options is None:
            n = torch.arange(query.shape[2], device=query.device)
            seen = n <= n[:, None]
            if sliding_window is not None:
                seen = seen & (n > n[:, None] - sliding_window)
            # Products and sums in fp32, as on a GPU.
            output = scaled_dot_product_attention(
                query.float(), key.float(), value.float(), attn_mask=seen, scale=scaling, enable_gqa=True
            )
        else:
            output = quantized_attention(
                query,
                key,
                value,
                is_causal=True,
                scale=scaling,
                window=sliding_window,
                **variant.options,
            )
        return output.transpose(1, 2).bfloat16().float(), None

    AttentionInterface.register(NAME, forward)
    AttentionMaskInterface.register(NAME, interval_mask)


def measure(name: str, text: str, device: str, windows: int, work: Path) -> dict[str, Any]:
    """Every variant on one model."""
    folder = export_checkpoint(name, work / name)
    use(BASELINE)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, device_map={"": device}, attn_implementation=NAME
    )
    ids, bos = encode(AutoTokenizer.from_pretrained(folder), text)

    def run(variant: Variant) -> Perplexity:
        use(variant)
        return perplexity(model, ids, bos=bos, context=CONTEXT, windows=windows, progress=True)

    results = {BASELINE.name: run(BASELINE)}
    rows = []
    for variant in VARIANTS:
        results[variant.name] = result = run(variant)
        row: dict[str, Any] = {
            "attention": variant.name,
            "perplexity": round(result.perplexity, 4),
            "over_baseline": as_json(paired_difference(result, results[BASELINE.name])),
        }
        if variant.name in STEPS:
            row["gain_over_the_one_before"] = as_json(paired_difference(results[STEPS[variant.name]], result))
        rows.append(row)
        print(f"{name}: {row}", flush=True)
    config = model.config
    return {
        "title": MODELS[name].title,
        "origin": "dequantized GGUF",
        "head_dim": getattr(config, "head_dim", config.hidden_size // config.num_attention_heads),
        "heads": [config.num_attention_heads, config.num_key_value_heads],
        "tokens": results[BASELINE.name].token_nll.numel(),
        "baseline_perplexity": round(results[BASELINE.name].perplexity, 4),
        "variants": rows,
    }


def main(
    text: Annotated[Path, typer.Option(help="Evaluation text, UTF-8.")],
    model: Annotated[list[str] | None, typer.Option(help=f"Of {list(MODELS)}; repeatable.")] = None,
    windows: Annotated[
        int | None, typer.Option(help="Windows of 1024 tokens; default: 100 on a GPU, else 20.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Default: the GPU if there is one.")] = None,
    work: Annotated[Path, typer.Option(help="Where checkpoints are exported to.")] = Path("demo_output"),
    threads: Annotated[int | None, typer.Option(help="Of PyTorch.")] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Where to write the results; other models' are kept.")
    ] = None,
) -> None:
    if threads is not None:
        torch.set_num_threads(threads)
    content = text.read_text(encoding="utf-8")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    windows = windows or WINDOWS[torch.device(device).type]
    command = f"python scripts/benchmark_attention_quality.py --text {text.name} --windows {windows}"
    report = about_quality(command, device, text.name, CONTEXT)
    for name in model or list(MODELS):
        start = time.perf_counter()
        measured = measure(name, content, device, windows, work)
        report["models"][name] = measured | {"seconds": round(time.perf_counter() - start)}
        if json_file is not None:
            merge_report(report, json_file)


if __name__ == "__main__":
    typer.run(main)
