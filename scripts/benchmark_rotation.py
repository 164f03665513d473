"""What rotations folded into the weights change in perplexity: int4 by both methods, and 8-bit attention.

    python scripts/benchmark_rotation.py --text wikipedia_calibration.txt --json scripts/results/rotation.json

It is for choosing defaults, so the text is not the one that results are published on: its first part
calibrates, and the rest is read. The models are dequantized GGUF files.
"""

import re
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from quality_report import about_model, about_quality, as_json, merge_report
from real_models import MODELS, export_checkpoint
from transformers import PreTrainedModel

from hf_hadacore import HadaCoreConfig
from hf_hadacore.errors import UnsupportedError
from hf_hadacore.evaluation.perplexity import Perplexity, encode, paired_difference, perplexity
from hf_hadacore.offline.calibration import Calibration
from hf_hadacore.offline.checkpoint import quantize_checkpoint
from hf_hadacore.offline.rotation_search import rotate_model
from hf_hadacore.offline.weight_rotation import ROTATIONS
from hf_hadacore.pretrained import load_pretrained

CALIBRATION_SHARE = 0.8


class Recipe(NamedTuple):
    """A model.

    Attributes:
        method: None for full precision, "rtn" or "gptq" with act-order.
        group_size: as in `HadaCoreConfig`.
        attention: None, "fp8" or "int8-fp8".
        rotation: of `ROTATIONS`.
    """

    method: str | None
    group_size: int | None = None
    attention: str | None = None
    rotation: str = "none"

    @property
    def name(self) -> str:
        """For people."""
        weights = "bf16" if self.method is None else f"{self.method}, group {self.group_size}"
        attention = f", {self.attention} attention" if self.attention else ""
        return f"{weights}{attention}, {self.rotation}"


RECIPES = [
    *(
        recipe._replace(rotation=rotation)
        for recipe in (Recipe(None), *(Recipe(m, g) for m in ("rtn", "gptq") for g in (64, 128)))
        for rotation in ROTATIONS
    ),
    *(
        Recipe(None, attention=attention, rotation=rotation)
        for attention in ("fp8", "int8-fp8")
        for rotation in ("none", "r2")
    ),
]


class Options(NamedTuple):
    """What is measured, and where."""

    text: str
    work: Path
    recipes: list[Recipe]
    device: str
    dtype: str
    context: int
    windows: int
    samples: int


def make_model(recipe: Recipe, src: Path, folder: Path, options: Options) -> PreTrainedModel:
    """The model of a recipe.

    Raises:
        UnsupportedError: it cannot be rotated so.
    """
    loading: dict[str, Any] = {"device": options.device, "dtype": options.dtype}
    if recipe.method is None:
        model, _ = load_pretrained(str(src), attention=recipe.attention, **loading)
        return rotate_model(model, recipe.rotation)
    is_gptq = recipe.method == "gptq"
    prose = folder / "calibration.txt"
    prose.write_text(options.text[: int(CALIBRATION_SHARE * len(options.text))], encoding="utf-8")
    dst = folder / recipe.name
    quantize_checkpoint(
        src,
        dst,
        HadaCoreConfig(method=recipe.method, act_order=is_gptq, group_size=recipe.group_size or 0),
        calibration=Calibration(prose, options.samples, options.context) if is_gptq else None,
        rotation=recipe.rotation,
        device=options.device,
    )
    return load_pretrained(str(dst), **loading)[0]


def measure(name: str, options: Options) -> dict[str, Any]:
    """Every recipe on one model."""
    src = export_checkpoint(name, options.work / name)
    baseline, tokenizer = load_pretrained(str(src), device=options.device, dtype=options.dtype)
    ids, bos = encode(tokenizer, options.text[int(CALIBRATION_SHARE * len(options.text)) :])

    def read(model: PreTrainedModel) -> Perplexity:
        return perplexity(
            model, ids, bos=bos, context=options.context, windows=options.windows, progress=True
        )

    expected = read(baseline)
    results: dict[Recipe, Perplexity] = {}
    rows = []
    for recipe in options.recipes:
        row: dict[str, Any] = {**recipe._asdict(), "recipe": recipe.name}
        with tempfile.TemporaryDirectory(dir=options.work) as temporary:
            try:
                model = make_model(recipe, src, Path(temporary), options)
            except UnsupportedError as error:
                rows.append(row | {"unsupported": str(error)})
                continue
        results[recipe] = result = read(model)
        row["perplexity"] = round(result.perplexity, 3)
        row["over_baseline"] = as_json(paired_difference(result, expected))
        plain = recipe._replace(rotation="none")
        if plain != recipe and plain in results:
            row["gain_over_no_rotation"] = as_json(paired_difference(results[plain], result))
        rows.append(row)
        print(f"{name}: {recipe.name:32} {row['perplexity']:8.3f}", row.get("gain_over_no_rotation", ""))
    return {
        **about_model(name, expected),
        "recipes": rows,
    }


def main(
    text: Annotated[Path, typer.Option(help="Text to calibrate and choose with, UTF-8.")],
    model: Annotated[list[str] | None, typer.Option(help=f"Of {list(MODELS)}; repeatable.")] = None,
    only: Annotated[str, typer.Option(metavar="REGEX", help="Recipes to measure, by their names.")] = "",
    context: Annotated[int, typer.Option(help="Tokens of a window and of a calibration sample.")] = 1024,
    windows: Annotated[int, typer.Option(help="Windows to read.")] = 20,
    samples: Annotated[int, typer.Option(help="Calibration samples.")] = 128,
    work: Annotated[Path, typer.Option(help="Where checkpoints are exported to.")] = Path("demo_output"),
    device: Annotated[str | None, typer.Option(help="Default: the GPU if there is one.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the computation.")] = "bfloat16",
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Where to write the results; other models' are kept.")
    ] = None,
) -> None:
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    recipes = [recipe for recipe in RECIPES if re.search(only, recipe.name)]
    content = text.read_text(encoding="utf-8")
    options = Options(content, work, recipes, device, dtype, context, windows, samples)
    command = (
        f"python scripts/benchmark_rotation.py --text {text.name} --context {context} "
        f"--windows {windows} --samples {samples} --dtype {dtype}" + (f" --only '{only}'" if only else "")
    )
    report = about_quality(command, device, text.name, context)
    for name in model or list(MODELS):
        start = time.perf_counter()
        measured = measure(name, options)
        report["models"][name] = measured | {"seconds": round(time.perf_counter() - start)}
        if json_file is not None:
            merge_report(report, json_file)


if __name__ == "__main__":
    typer.run(main)
