"""What an evaluation finds out about a checkpoint, as JSON that can be compared with other runs."""

import hashlib
import importlib.metadata
import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .._version import __version__
from ..attention.kv_cache import attention_mode
from ..errors import CheckpointError, EvaluationError
from ..inspection import format_size
from ..integrity import checkpoint_files, verify_files
from ..offline.checkpoint import find_source
from ..pretrained import load_pretrained
from .harness import require_lm_eval, run_tasks
from .multiple_choice import Item, multiple_choice, read_items
from .perplexity import Estimate, Perplexity, compare, encode, paired_difference, perplexity
from .task_result import TaskResult
from .text_source import Text, read_text

SCHEMA = "hadacore-evaluation/1"

_DEFAULT_WINDOWS = 20
_PACKAGES = ("transformers", "torch")


def evaluate_checkpoint(
    folder: str,
    *,
    baseline: str | None = None,
    text: str | None = None,
    context: int = 1024,
    windows: int | None = None,
    tasks: Sequence[str] = (),
    few_shot: int | None = None,
    limit: int | None = None,
    attention: str | None = None,
    device: str | None = None,
    baseline_device: str | None = None,
    dtype: str | None = None,
    batch_size: int = 8,
    progress: bool = True,
) -> dict[str, Any]:
    """Measure the quality of a checkpoint: perplexity and tasks, beside a baseline's.

    Args:
        folder: a checkpoint's folder or a model id.
        baseline: of the model to compare with, usually the full-precision one; in memory at the same time.
        text: for perplexity; see `read_text`. None takes its default, or no text at all if there are tasks.
        context: tokens of a window.
        windows: how many, spread over the text; None takes 20, or as many as there are.
        tasks: .jsonl files (see `read_items`), and tasks of lm-eval (see `run_tasks`).
        few_shot: examples before each question of lm-eval's tasks; None for the task's own number.
        limit: questions of each task, the first ones; None for all.
        attention: "fp8" or "int8-fp8", of the checkpoint, not of the baseline; None for the checkpoint's.
        device, baseline_device, dtype: as for `load_pretrained`; `dtype` is for both.
        batch_size: sequences at a time, of lm-eval's tasks.
        progress: show progress bars.

    Returns:
        The report; docs/evaluation.md describes it.

    Raises:
        CheckpointError, ConfigError: as `load_pretrained`.
        EvaluationError: a text or a task cannot be read, or is too short; the baseline is another model.
        MissingPackageError: a task needs lm-eval.
    """
    prose = read_text(text) if text is not None or not tasks else None
    questions = {task: read_items(task)[:limit] for task in tasks if task.endswith(".jsonl")}
    by_name = [task for task in tasks if task not in questions]
    if by_name:
        require_lm_eval()
    model, tokenizer = load_pretrained(folder, device=device, dtype=dtype, attention=attention)
    models = [(model, tokenizer)]
    if baseline is not None:
        place = baseline_device or device
        models.append(load_pretrained(baseline, device=place, dtype=dtype))
        _check_pair(folder, baseline, models)
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "date": datetime.now(UTC).date().isoformat(),
        "device": device_name(model.device),
        "versions": _versions(with_lm_eval=bool(by_name)),
        "model": _describe_model(folder, model),
        "baseline": None if baseline is None else _describe_model(baseline, models[1][0]),
    }
    if prose is not None:
        report["perplexity"] = _measure_perplexity(models, prose, context, windows, progress)
    if tasks:
        report["tasks"] = {}
    for task, items in questions.items():
        found = [answer_questions(*pair, items, progress) for pair in models]
        digest = hashlib.sha256(Path(task).read_bytes()).hexdigest()
        report["tasks"][Path(task).stem] = {"sha256": digest, **task_entry(found)}
    if by_name:
        results = [
            run_tasks(*pair, by_name, few_shot=few_shot, limit=limit, batch_size=batch_size)
            for pair in models
        ]
        for name in results[0]:
            found = [result[name] for result in results]
            report["tasks"][name] = {"few_shot": few_shot, **task_entry(found)}
    return report


def read_evaluation(file: str | os.PathLike[str], folder: str | os.PathLike[str]) -> dict[str, Any]:
    """A report that was written to a file, if it is of a checkpoint.

    Args:
        file: JSON.
        folder: the checkpoint.

    Raises:
        EvaluationError: the file is no such report, or is of a checkpoint with other weights.
        CheckpointError: the folder is no checkpoint.
    """
    try:
        report = json.loads(Path(file).read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise EvaluationError(f"{file}: cannot be read as JSON: {error}") from None
    if not isinstance(report, dict) or report.get("schema") != SCHEMA:
        raise EvaluationError(f"{file}: is no evaluation ({SCHEMA}); `hadacore evaluate --json` writes one")
    if report["model"]["files"] != _digests(Path(folder)):
        raise EvaluationError(
            f"{file}: is of {report['model']['name']}, whose weights are not those in {folder}; evaluate it"
        )
    return report


def describe_evaluation(report: Mapping[str, Any]) -> str:
    """The report of `evaluate_checkpoint` as a table for people."""
    rows = evaluation_rows(report)
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(row[i].rjust(widths[i]) for i in (1, 2)), row[3]]).rstrip()
        for row in rows
    ]
    if text := report.get("perplexity"):
        lines.append(
            f"{text['tokens']:,} tokens of {text['text']}, {text['windows']} windows; {report['device']}"
        )
    return "\n".join(lines)


def evaluation_rows(report: Mapping[str, Any]) -> list[list[str]]:
    """The figures of a report for people, the header first: what, model, baseline and difference."""
    model, baseline = report["model"], report["baseline"]
    rows = [["", model["name"], baseline["name"] if baseline else "", "difference" if baseline else ""]]
    rows.append(["size", *(format_size(part["bytes"]) if part else "" for part in (model, baseline)), ""])
    rows.append(["attention", *(part["attention"] if part else "" for part in (model, baseline)), ""])
    if text := report.get("perplexity"):
        change = _signed(text["over_baseline"], 4) + " nats per token" if baseline else ""
        other = f"{text['baseline']['value']:.3f}" if baseline else ""
        rows.append(["perplexity", f"{text['value']:.3f}", other, change])
        if baseline:
            rows.append(["KL divergence", "", "", f"{_plain(text['kl'], 4)} nats per token"])
            rows.append(["same likeliest token", "", "", f"{_plain(text['top1_agreement'], 2, 100)} %"])
    for name, task in report.get("tasks", {}).items():
        for metric, entry in task["metrics"].items():
            other = _plain(entry["baseline"], 4) if "baseline" in entry else ""
            change = _signed(entry["over_baseline"], 4) if "over_baseline" in entry else ""
            rows.append([f"{name} {metric}", _plain(entry, 4), other, change])
    return rows


def device_name(device: torch.device) -> str:
    """The GPU's name, or what is known of the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {platform.machine()}, {torch.get_num_threads()} threads"


def as_json(estimate: Estimate) -> dict[str, float | None]:
    """An estimate in a report; an unknown error is null."""
    value, error = (None if math.isnan(number) else round(number, 6) for number in estimate)
    return {"value": value, "standard_error": error}


def answer_questions(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, items: Sequence[Item], progress: bool = True
) -> TaskResult:
    """`multiple_choice`, with the names that lm-eval has for its metrics.

    Args:
        model, tokenizer, items, progress: as there.
    """
    result = multiple_choice(model, tokenizer, items, progress=progress)
    return TaskResult(
        len(items),
        {"acc": result.accuracy, "acc_norm": result.normalized_accuracy},
        {"acc": result.correct.double(), "acc_norm": result.correct_normalized.double()},
    )


def task_entry(found: Sequence[TaskResult]) -> dict[str, Any]:
    """A result in a report.

    Args:
        found: of the model, and of the baseline if there is one.
    """
    metrics: dict[str, Any] = {name: as_json(estimate) for name, estimate in found[0].metrics.items()}
    for other in found[1:]:
        changes = found[0].over(other)
        for name, entry in metrics.items():
            entry["baseline"] = as_json(other.metrics[name])
            if name in changes:
                entry["over_baseline"] = as_json(changes[name])
    return {"items": found[0].items, "metrics": metrics}


def _measure_perplexity(
    models: Sequence[tuple[PreTrainedModel, PreTrainedTokenizerBase]],
    text: Text,
    context: int,
    windows: int | None,
    progress: bool,
) -> dict[str, Any]:
    model, tokenizer = models[0]
    longest = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if context < 2 or (longest is not None and context > longest):
        raise EvaluationError(
            f"context must be 2 to {longest} tokens, the longest of the model, got {context}"
        )
    ids, bos = encode(tokenizer, text.content)
    if windows is None:
        windows = max(1, min(_DEFAULT_WINDOWS, len(ids) // (context - (bos is not None))))
    options: dict[str, Any] = dict(bos=bos, context=context, windows=windows, progress=progress)
    entry: dict[str, Any] = {
        "text": text.name,
        "text_sha256": text.sha256,
        "context": context,
        "windows": windows,
        "tokens": windows * (context - 1),
    }
    if len(models) == 1:
        return entry | _nll_entry(perplexity(model, ids, **options))
    expected, (found,) = compare([model], models[1][0], ids, **options)
    return entry | {
        **_nll_entry(found.perplexity),
        "baseline": _nll_entry(expected),
        "over_baseline": as_json(paired_difference(found.perplexity, expected)),
        "kl": as_json(found.kl),
        "top1_agreement": as_json(found.top1_agreement),
    }


def _nll_entry(result: Perplexity) -> dict[str, Any]:
    by_window = result.token_nll.double().mean(dim=1)
    return {
        "value": round(result.perplexity, 6),
        "nll": as_json(Estimate.of(by_window)),
        "nll_by_window": [round(nll, 6) for nll in by_window.tolist()],
    }


def _describe_model(source: str, model: PreTrainedModel) -> dict[str, Any]:
    """Name, recipe, and what tells the checkpoint from all others."""
    folder = find_source(source)
    recipe = getattr(model.config, "quantization_config", None)
    mode = attention_mode(model.config)
    return {
        "name": folder.resolve().name if Path(source).is_dir() else source,
        "architecture": type(model).__name__,
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": mode or model.config.get_text_config(decoder=True)._attn_implementation,
        "quantization_config": None if recipe is None else recipe.to_dict(),
        "bytes": sum(info.nbytes for info in verify_files(checkpoint_files(folder)).values()),
        "files": _digests(folder),
    }


def _digests(folder: Path) -> dict[str, str]:
    """SHA-256 of the weight files: what the Hub calls their LFS oid."""
    digests = {}
    for file in checkpoint_files(folder):
        with open(file, "rb") as stream:
            digests[file.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return digests


def _check_pair(
    folder: str, baseline: str, models: Sequence[tuple[PreTrainedModel, PreTrainedTokenizerBase]]
) -> None:
    vocabularies = [tokenizer.get_vocab() for _, tokenizer in models]
    sizes = [model.config.get_text_config(decoder=True).vocab_size for model, _ in models]
    if vocabularies[0] != vocabularies[1] or sizes[0] != sizes[1]:
        raise CheckpointError(
            f"{baseline}: has another vocabulary than {folder}; a baseline is another form of the same model"
        )


def _versions(*, with_lm_eval: bool) -> dict[str, str]:
    packages = (*_PACKAGES, "lm_eval") if with_lm_eval else _PACKAGES
    return {
        "hf_hadacore": __version__,
        **{package: importlib.metadata.version(package) for package in packages},
        "python": platform.python_version(),
    }


def _plain(entry: Mapping[str, Any], digits: int, scale: int = 1) -> str:
    return f"{entry['value'] * scale:.{digits}f}{_error(entry, digits, scale)}"


def _signed(entry: Mapping[str, Any], digits: int) -> str:
    return f"{entry['value']:+.{digits}f}{_error(entry, digits)}"


def _error(entry: Mapping[str, Any], digits: int, scale: int = 1) -> str:
    error = entry["standard_error"]
    return "" if error is None else f" ± {error * scale:.{digits}f}"
