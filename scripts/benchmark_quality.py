"""What quantization costs on real models: perplexity, distance from bf16 and size, recipe by recipe.

    python scripts/benchmark_quality.py --data DATA --json scripts/results/quality.json

DATA holds wikipedia_eval.txt and wikipedia_calibration.txt. Every recipe is a checkpoint written by
`quantize_checkpoint`, loaded and run as users do, in bf16 with fp32 logits; plain min-max rounding, which
users are not offered, is put into the bf16 model as values. The models are dequantized GGUF files: what is
measured is a second quantization. SmolLM2's weights stem from a group-32 grid with real-valued minima, which
integer zeros, as here, do not rediscover; group 32 is left out all the same.
"""

import multiprocessing
import re
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from quality_report import about_model, about_quality, as_json, merge_report, scores
from real_models import MODELS, export_checkpoint
from torch import nn
from transformers import PreTrainedModel

from hf_hadacore import HadaCoreConfig
from hf_hadacore.errors import UnsupportedError
from hf_hadacore.evaluation.perplexity import compare, encode, paired_difference
from hf_hadacore.inspection import inspect_checkpoint
from hf_hadacore.layer_plan import plan_layers
from hf_hadacore.offline.calibration import Calibration
from hf_hadacore.offline.checkpoint import quantize_checkpoint
from hf_hadacore.pretrained import load_pretrained
from hf_hadacore.solvers.rtn import quantization_error, quantize_weight

TEXT, CALIBRATION = "wikipedia_eval.txt", "wikipedia_calibration.txt"
CONTEXT = 1024
WINDOWS = {"cuda": 100, "cpu": 20}
ACT_ORDERS: dict[bool | str, str] = {
    False: "GPTQ",
    "static": "GPTQ, act-order",
    "permuted": "GPTQ, act-order, permuted",
}
ROTATED = {"r2": ["values rotated"], "r1r2": ["rotated"]}


class Recipe(NamedTuple):
    """How a model is quantized.

    Attributes:
        method: None for full precision, "min-max", "rtn" or "gptq".
        group_size, act_order, quantize_lm_head, attention: as in `HadaCoreConfig`.
        rotation: as in `quantize_checkpoint`.
    """

    method: str | None
    group_size: int = 128
    act_order: bool | str = False
    quantize_lm_head: bool = False
    attention: str | None = None
    rotation: str = "none"

    @property
    def name(self) -> str:
        """For people."""
        parts = ["bf16"]
        if self.method is not None:
            kind = {"min-max": "min-max", "rtn": "searched", "gptq": ACT_ORDERS[self.act_order]}[self.method]
            parts = ["asymmetric", f"group {self.group_size}", kind]
        parts += ROTATED.get(self.rotation, [])
        parts += ["int4 head"] * self.quantize_lm_head
        return ", ".join([*parts, *([f"{self.attention} attention"] if self.attention else [])])

    @property
    def weights(self) -> "Recipe":
        """The recipe without its attention."""
        return self._replace(attention=None)

    def steps_before(self) -> dict[str, "Recipe"]:
        """The simpler recipes that this one is compared with, by the name of the gain."""
        if self.method is None or self.quantize_lm_head or self.attention:
            return {}
        plain = {
            "gain_over_minmax": Recipe("min-max", self.group_size),
            "gain_over_searched": Recipe("rtn", self.group_size),
            "gain_over_gptq": Recipe("gptq", self.group_size),
            "gain_over_act_order": Recipe("gptq", self.group_size, "static"),
        }
        return dict(takewhile(lambda step: step[1] != self, plain.items()))


RECIPES = [
    *(
        recipe
        for group_size in (64, 128)
        for recipe in (
            Recipe("min-max", group_size),
            Recipe("rtn", group_size),
            *(Recipe("gptq", group_size, act_order) for act_order in ACT_ORDERS),
            *(Recipe("gptq", group_size, "static", rotation=rotation) for rotation in ROTATED),
        )
    ),
    Recipe("rtn", 64, quantize_lm_head=True),
    *(
        recipe._replace(attention=mode)
        for recipe in (Recipe(None), Recipe("rtn", 128), Recipe("gptq", 64, "static"))
        for mode in ("fp8", "int8-fp8")
    ),
]


class Options(NamedTuple):
    """What is measured, and where."""

    data: Path
    work: Path
    recipes: list[Recipe]
    device: str
    dtype: str
    windows: int
    samples: int
    sequence_length: int

    @property
    def calibration(self) -> Calibration:
        """What GPTQ is shown."""
        return Calibration(self.data / CALIBRATION, self.samples, self.sequence_length)


def quantize(recipe: Recipe, src: Path, dst: Path, options: Options) -> dict[str, Any]:
    """Write the checkpoint of a recipe as users do.

    Returns:
        What a row says of it.
    """
    config = HadaCoreConfig(
        method=recipe.method or "",
        group_size=recipe.group_size,
        act_order=recipe.act_order,
        quantize_lm_head=recipe.quantize_lm_head,
    )
    start = time.perf_counter()
    report = quantize_checkpoint(
        src,
        dst,
        config,
        device=options.device,
        calibration=options.calibration if recipe.method == "gptq" else None,
        rotation=recipe.rotation,
    )
    seconds = time.perf_counter() - start
    errors = [layer["relative_error"] for layer in report["layers"]]
    summary = inspect_checkpoint(dst)
    return {
        "bits_per_weight": round(summary["bits_per_weight"], 3),
        "bytes": summary["bytes"],
        "relative_weight_error": round(sum(errors) / len(errors), 5),
        "seconds_to_quantize": round(seconds, 1),
    }


def put_minmax_values(model: PreTrainedModel, group_size: int) -> dict[str, Any]:
    """Replace a model's weights by the values of min-max rounding.

    Returns:
        What a row says of them.
    """
    errors, bits, elements = [], 0, 0
    for name in plan_layers(model, HadaCoreConfig(group_size=group_size)).linears:
        linear = model.get_submodule(name)
        weight = linear.get_parameter("weight").detach()
        quantized = quantize_weight(
            weight,
            group_size=group_size,
            symmetric=False,
            scale_dtype=torch.bfloat16,
            search=False,
            name=name,
        )
        values = quantized.dequantize(torch.float32).to(weight.dtype)
        linear.register_parameter("weight", nn.Parameter(values, requires_grad=False))
        errors.append(quantization_error(weight, quantized))
        bits += sum(t.numel() * t.element_size() * 8 for t in quantized[:3] if t is not None)
        elements += weight.numel()
    return {
        "bits_per_weight": round(bits / elements, 3),
        "bytes": None,  # no checkpoint
        "relative_weight_error": round(sum(errors) / len(errors), 5),
    }


def make_models(
    src: Path, folder: Path, options: Options
) -> dict[Recipe, tuple[PreTrainedModel, dict[str, Any]]]:
    """The model of every recipe that the architecture allows, and what a row says of its weights."""
    made: dict[Recipe, tuple[Path, dict[str, Any]]] = {}
    models = {}
    for recipe in options.recipes:
        weights = recipe._replace(attention=None)
        if recipe.method in (None, "min-max"):
            made[weights] = src, {"bits_per_weight": 16, "bytes": inspect_checkpoint(src)["bytes"]}
        elif weights not in made:
            dst = folder / str(len(made))
            try:
                made[weights] = dst, quantize(recipe, src, dst, options)
            except UnsupportedError as error:
                print(f"{recipe.name}: {error}", flush=True)
                continue
        checkpoint, facts = made[weights]
        model = load(checkpoint, options, attention=recipe.attention)[0]
        if recipe.method == "min-max":
            facts = put_minmax_values(model, recipe.group_size)
        models[recipe] = model, facts
    return models


def load(folder: Path, options: Options, attention: str | None = None) -> tuple[PreTrainedModel, Any]:
    return load_pretrained(str(folder), device=options.device, dtype=options.dtype, attention=attention)


def measure(name: str, options: Options) -> dict[str, Any]:
    """Every recipe on one model."""
    start = time.perf_counter()
    src = export_checkpoint(name, options.work / name)
    baseline, tokenizer = load(src, options)
    ids, bos = encode(tokenizer, (options.data / TEXT).read_text("utf-8"))
    with tempfile.TemporaryDirectory(dir=options.work) as temporary:
        models = make_models(src, Path(temporary), options)
    expected, found = compare(
        [model for model, _ in models.values()],
        baseline,
        ids,
        bos=bos,
        context=CONTEXT,
        windows=options.windows,
        progress=True,
    )
    results = dict(zip(models, found, strict=True))
    rows = []
    for recipe, (_, facts) in models.items():
        nll = results[recipe].perplexity
        row: dict[str, Any] = {
            **recipe._asdict(),
            "recipe": recipe.name,
            **facts,
            **scores(results[recipe], expected),
        }
        for gain, step in recipe.steps_before().items():
            if step in results:
                row[gain] = as_json(paired_difference(results[step].perplexity, nll))
        full_head = recipe._replace(quantize_lm_head=False)
        if recipe.quantize_lm_head and full_head in results:
            row["cost_of_int4_head"] = as_json(paired_difference(nll, results[full_head].perplexity))
        rows.append(row)
        print(f"{name}: {describe(row)}", flush=True)
    return {
        **about_model(name, expected),
        "baseline_bytes": inspect_checkpoint(src)["bytes"],
        "recipes": rows,
        "seconds": round(time.perf_counter() - start),
    }


def describe(row: dict[str, Any]) -> str:
    """A row of the report on a line."""
    change = row["over_baseline"]
    return (
        f"{row['recipe']:58} perplexity {row['perplexity']:7.3f} "
        f"({change['nll']:+.4f} ± {change['standard_error']:.4f})  KL {row['kl']['value']:.4f}  "
        f"top-1 {row['top1_agreement']['value']:.3f}"
    )


def main(
    data: Annotated[Path, typer.Option(help="Folder of the text files and questions.")],
    model: Annotated[list[str] | None, typer.Option(help=f"Of {list(MODELS)}; repeatable.")] = None,
    only: Annotated[
        str, typer.Option(metavar="REGEX", help="Recipes to measure, by their names; default: all.")
    ] = "",
    windows: Annotated[
        int | None, typer.Option(help="Windows of 1024 tokens; default: 100 on a GPU, else 20.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Calibration samples.")] = Calibration.samples,
    sequence_length: Annotated[
        int, typer.Option(help="Tokens of a calibration sample.")
    ] = Calibration.sequence_length,
    work: Annotated[
        Path, typer.Option(help="Where checkpoints are exported to, unless they are there.")
    ] = Path("demo_output"),
    device: Annotated[str | None, typer.Option(help="Default: the GPU if there is one.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the computation.")] = "bfloat16",
    jobs: Annotated[int, typer.Option(help="Models to measure side by side, each in a process.")] = 1,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Where to write the results; other models' are kept.")
    ] = None,
) -> None:
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    recipes = [recipe for recipe in RECIPES if re.search(only, recipe.name)]
    if not recipes:
        raise typer.BadParameter(f"{only!r} matches no recipe", param_hint="--only")
    windows = windows or WINDOWS[torch.device(device).type]
    options = Options(data, work, recipes, device, dtype, windows, samples, sequence_length)
    command = [f"--samples {samples} --sequence-length {sequence_length} --windows {windows} --dtype {dtype}"]
    command += [f"--only '{only}'"] * bool(only)
    report = about_quality(
        " ".join(["python scripts/benchmark_quality.py --data DATA", *command]), device, TEXT, CONTEXT
    )
    names = model or list(MODELS)
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        running = {pool.submit(measure, name, options): name for name in names}
        for finished in as_completed(running):
            report["models"][running[finished]] = finished.result()
            if json_file is not None:
                merge_report(report, json_file)
    for name, measured in report["models"].items():
        print(f"\n{name}, {measured['tokens']} tokens, bf16 perplexity {measured['baseline_perplexity']}")
        print("\n".join(describe(row) for row in measured["recipes"]))


if __name__ == "__main__":
    typer.run(main)
