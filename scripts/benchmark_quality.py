"""What quantization costs in perplexity, on real models: min-max rounding beside the searched grid.

    python scripts/benchmark_quality.py --text wikipedia_eval.txt --json scripts/results/quality.json

Weights are replaced by the values that their int4 form stands for, and the model runs in fp32, so that only
the weights' error is measured. The models are dequantized GGUF files: what is measured is a second
quantization. SmolLM2's weights stem from a group-32 grid with real-valued minima, which integer zeros, as
here, do not rediscover; group 32 asymmetric is left out all the same.
"""

import json
import platform
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import transformers
import typer
from real_models import MODELS, export_checkpoint
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import hf_hadacore
from hf_hadacore import HadaCoreConfig
from hf_hadacore.evaluate import Perplexity, encode, paired_difference, perplexity
from hf_hadacore.layer_plan import plan_layers
from hf_hadacore.solvers.rtn import quantization_error, quantize_weight

WINDOWS = {"smollm2-135m": 20, "gemma-3-270m": 15}
CONTEXT = 1024


class Recipe(NamedTuple):
    group_size: int
    symmetric: bool
    search: bool
    quantize_lm_head: bool = False

    @property
    def name(self) -> str:
        kind = "symmetric" if self.symmetric else "asymmetric"
        head = ", int4 head" if self.quantize_lm_head else ""
        return f"{kind}, group {self.group_size}, {'searched' if self.search else 'min-max'}{head}"


# The search beside min-max, what an int4 head costs, and the default group size.
RECIPES = [
    Recipe(64, symmetric=False, search=False),
    Recipe(64, symmetric=False, search=True),
    Recipe(64, symmetric=False, search=True, quantize_lm_head=True),
    Recipe(128, symmetric=False, search=True),
]


def with_int4_values(model: PreTrainedModel, recipe: Recipe) -> tuple[dict[str, torch.Tensor], float, float]:
    """Put the values of the recipe's int4 weights into the model.

    Returns:
        The original weights to put back, the mean relative error, and bits per quantized weight.
    """
    config = HadaCoreConfig(
        group_size=recipe.group_size, symmetric=recipe.symmetric, quantize_lm_head=recipe.quantize_lm_head
    )
    plan = plan_layers(model, config)
    names = [*plan.linears, *filter(None, [plan.tied_head])]
    originals, errors, bits, elements = {}, [], 0, 0
    for name in names:
        linear = model.get_submodule(name)
        weight = linear.get_parameter("weight").detach()
        quantized = quantize_weight(
            weight,
            group_size=recipe.group_size,
            symmetric=recipe.symmetric,
            scale_dtype=torch.bfloat16,
            search=recipe.search,
            name=name,
        )
        originals[name] = weight
        # A tied head gets a Parameter of its own; the embedding keeps the original.
        linear.register_parameter(
            "weight", nn.Parameter(quantized.dequantize(torch.float32), requires_grad=False)
        )
        errors.append(quantization_error(weight, quantized))
        bits += sum(t.numel() * t.element_size() * 8 for t in quantized[:3] if t is not None)
        elements += weight.numel()
    return originals, sum(errors) / len(errors), bits / elements


def restore(model: PreTrainedModel, originals: dict[str, torch.Tensor]) -> None:
    for name, weight in originals.items():
        model.get_submodule(name).register_parameter("weight", nn.Parameter(weight, requires_grad=False))


def as_json(difference: tuple[float, float]) -> dict[str, float]:
    return {"nll": round(difference[0], 5), "standard_error": round(difference[1], 5)}


def measure(name: str, text: str, windows: int, work: Path) -> dict[str, Any]:
    """Every recipe on one model."""
    folder = export_checkpoint(name, work / name)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids, bos = encode(tokenizer, text)
    baseline = perplexity(model, ids, bos=bos, context=CONTEXT, windows=windows, progress=True)
    results: dict[Recipe, Perplexity] = {}
    rows = []
    for recipe in RECIPES:
        originals, error, bits = with_int4_values(model, recipe)
        results[recipe] = result = perplexity(
            model, ids, bos=bos, context=CONTEXT, windows=windows, progress=True
        )
        restore(model, originals)
        row: dict[str, Any] = recipe._asdict() | {
            "recipe": recipe.name,
            "bits_per_weight": round(bits, 3),
            "relative_weight_error": round(error, 5),
            "perplexity": round(result.perplexity, 3),
            "over_baseline": as_json(paired_difference(result, baseline)),
        }
        plain = recipe._replace(search=False)
        if recipe.search and plain in results:
            row["gain_over_minmax"] = as_json(paired_difference(results[plain], result))
        with_plain_head = recipe._replace(quantize_lm_head=False)
        if recipe.quantize_lm_head:
            row["cost_of_int4_head"] = as_json(paired_difference(result, results[with_plain_head]))
        rows.append(row)
        print(
            f"{name}: {recipe.name:40} perplexity {result.perplexity:.3f}  {row['over_baseline']}",
            row.get("gain_over_minmax", ""),
            flush=True,
        )
    return {
        "title": MODELS[name].title,
        "origin": "dequantized GGUF",
        "tokens": baseline.token_nll.numel(),
        "baseline_perplexity": round(baseline.perplexity, 3),
        "recipes": rows,
    }


def main(
    text: Annotated[Path, typer.Option(help="Evaluation text, UTF-8.")],
    model: Annotated[list[str] | None, typer.Option(help=f"Of {list(MODELS)}; repeatable.")] = None,
    windows: Annotated[int | None, typer.Option(help="Windows of 1024 tokens; default 20 and 15.")] = None,
    work: Annotated[Path, typer.Option(help="Where checkpoints are exported to.")] = Path("demo_output"),
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Where to write the results; other models' are kept.")
    ] = None,
) -> None:
    content = text.read_text(encoding="utf-8")
    names = model or list(MODELS)
    report: dict[str, Any] = {
        "command": f"python scripts/benchmark_quality.py --text {text.name}",
        "date": datetime.now(UTC).date().isoformat(),
        "device": f"CPU, {platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {
            "hf_hadacore": hf_hadacore.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "text": text.name,
        "context": CONTEXT,
        "models": {},
    }
    for name in names:
        start = time.perf_counter()
        measured = measure(name, content, windows or WINDOWS[name], work)
        report["models"][name] = measured | {"seconds": round(time.perf_counter() - start)}
        if json_file is not None:
            merge_report(report, json_file)


def merge_report(report: dict[str, Any], file: Path) -> None:
    """Write the report, and keep what the file says of other models measured in the same way."""
    if file.exists():
        before = json.loads(file.read_text())
        if all(before[key] == report[key] for key in ("device", "versions", "text", "context")):
            report["models"] = before["models"] | report["models"]
    file.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
