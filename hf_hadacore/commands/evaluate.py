"""`hadacore evaluate`."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import EvaluationError
from .report_errors import reports_errors


@reports_errors
def evaluate(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="Folder of a checkpoint, or a model id.")],
    baseline: Annotated[
        str | None, typer.Option(metavar="DIR", help="Model to compare with: the full-precision one.")
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|DATASET",
            help="For perplexity: a file, or a dataset name[:config[:split]]; default: Python's docs.",
        ),
    ] = None,
    context: Annotated[int, typer.Option(min=2, help="Tokens of a window.")] = 1024,
    windows: Annotated[
        int | None, typer.Option(min=1, help="Windows, spread over the text; default: 20.")
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="TASK,...",
            help="Tasks of lm-eval, and .jsonl files with question, choices and answer in each line.",
        ),
    ] = None,
    few_shot: Annotated[
        int | None, typer.Option(min=0, help="Examples before each question of lm-eval's tasks.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Questions of each task; default: all.")] = None,
    attention: Annotated[
        str | None,
        typer.Option(metavar="MODE", help="fp8 or int8-fp8 for 8-bit attention; default: the checkpoint's."),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda or auto; default: the GPU if there is one.")
    ] = None,
    baseline_device: Annotated[
        str | None, typer.Option(help="Of the baseline, if both do not fit on one.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="Of the computation; default: the checkpoint's.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Of lm-eval's tasks.")] = 8,
    speed: Annotated[
        bool, typer.Option("--speed", help="Measure tokens per second, time to first token and memory, too.")
    ] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="OUT", help="Write the results as JSON.")
    ] = None,
) -> None:
    """Measure the quality of a checkpoint, beside the model that it was made from."""
    import torch
    from transformers.utils import logging

    from ..evaluation.evaluate import evaluate_checkpoint
    from ..evaluation.report import describe_evaluation

    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise EvaluationError(f"{json_file}: there is no folder {json_file.absolute().parent}")
    names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    options: dict[str, Any] = {
        "baseline": baseline,
        "text": text,
        "context": context,
        "windows": windows,
        "tasks": names,
        "few_shot": few_shot,
        "limit": limit,
        "attention": attention,
        "device": device,
        "baseline_device": baseline_device,
        "dtype": dtype,
        "batch_size": batch_size,
        "speed": speed,
    }
    logging.disable_progress_bar()
    try:
        report = evaluate_checkpoint(folder, **options)
    except torch.OutOfMemoryError:
        raise EvaluationError(
            "the GPU's memory is too small; try --baseline-device cpu, --device auto or a smaller --context"
        ) from None
    typer.echo(describe_evaluation(report))
    if json_file is not None:
        report = {"command": _command(folder, options), **report}
        try:
            json_file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise EvaluationError(f"{json_file}: cannot be written: {error.strerror}") from None


def _command(folder: str, options: dict[str, Any]) -> str:
    """The command that was given, without the folders of this machine and what has its default."""
    words = ["hadacore evaluate", _without_folders(folder)]
    for name, value in options.items():
        if (
            value is None
            or value is False
            or value == []
            or (name, value) in (("context", 1024), ("batch_size", 8))
        ):
            continue
        words.append(f"--{name.replace('_', '-')}")
        if value is not True:
            parts = value if isinstance(value, list) else [value]
            words.append(",".join(_without_folders(str(part)) for part in parts))
    return " ".join(words)


def _without_folders(name: str) -> str:
    """The last part of a path that exists; anything else, like the names of models, as it is."""
    return Path(name).resolve().name if Path(name).exists() else name
