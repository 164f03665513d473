"""What an evaluation finds out about a checkpoint, as JSON that can be compared with other runs."""

import hashlib
import json
import math
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..attention.kv_cache import attention_mode
from ..errors import EvaluationError
from ..inspection import format_size
from ..integrity import checkpoint_files, verify_files
from ..offline.checkpoint import find_source
from .perplexity import Comparison, Estimate, Perplexity, paired_difference
from .speed import Speed
from .task_result import TaskResult

SCHEMA = "hadacore-evaluation/1"


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
    if speed := report.get("speed"):
        lines.append(describe_speed(speed))
    return "\n".join(lines)


def describe_speed(speed: Mapping[str, Any]) -> str:
    """Of what a report's speeds are, and where they were measured."""
    devices = {part["device"]: None for part in (speed["model"], speed["baseline"]) if part}
    return (
        f"greedy generate, prompts of {speed['prompt_tokens']} tokens, {speed['new_tokens']} new ones; "
        + " and ".join(devices)
    )


def evaluation_rows(report: Mapping[str, Any]) -> list[list[str]]:
    """The figures of a report for people, the header first: what, model, baseline and difference."""
    model, baseline = report["model"], report["baseline"]
    rows = [["", model["name"], baseline["name"] if baseline else "", "difference" if baseline else ""]]
    rows.append(["size", *(format_size(part["bytes"]) if part else "" for part in (model, baseline)), ""])
    rows.append(["attention", *(part["attention"] if part else "" for part in (model, baseline)), ""])
    if text := report.get("perplexity"):
        change = format_signed(text["over_baseline"], 4) + " nats per token" if baseline else ""
        other = f"{text['baseline']['value']:.3f}" if baseline else ""
        rows.append(["perplexity", f"{text['value']:.3f}", other, change])
        if baseline:
            rows.append(["KL divergence", "", "", f"{format_estimate(text['kl'], 4)} nats per token"])
            rows.append(
                ["same likeliest token", "", "", f"{format_estimate(text['top1_agreement'], 2, 100)} %"]
            )
    for name, task in report.get("tasks", {}).items():
        for metric, entry in task["metrics"].items():
            other = format_estimate(entry["baseline"], 4) if "baseline" in entry else ""
            change = format_signed(entry["over_baseline"], 4) if "over_baseline" in entry else ""
            rows.append([f"{name} {metric}", format_estimate(entry, 4), other, change])
    return rows + speed_rows(report)


def speed_rows(report: Mapping[str, Any]) -> list[list[str]]:
    """The speeds of a report for people, in the columns of `evaluation_rows`; none if there are none."""
    if (speed := report.get("speed")) is None:
        return []
    model, baseline = speed["model"], speed["baseline"]
    # Batches depend on the device.
    others = {one["batch"]: one for one in baseline["batches"]} if baseline else {}
    rows = []
    for one in model["batches"]:
        other = others.get(one["batch"])
        title = f"batch {one['batch']}"
        for name, key, scale in (
            ("generate, tok/s", "tokens_per_second", 1),
            ("first token, ms", "time_to_first_token", 1e3),
        ):
            values = [f"{part[key] * scale:,.1f}" if part else "" for part in (one, other)]
            ratio = f"{one[key] / other[key]:.2f}x" if other else ""
            rows.append([f"{name}, {title}", *values, ratio])
    for name, key in (("weights in memory", "weight_bytes"), ("peak memory", "peak_bytes")):
        values = [format_size(part[key]) if part and part[key] else "" for part in (model, baseline)]
        ratio = f"{model[key] / baseline[key]:.2f}x" if all(values) else ""
        if any(values):
            rows.append([name, *values, ratio])
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


def format_estimate(entry: Mapping[str, Any], digits: int, scale: int = 1) -> str:
    """An estimate of a report for people, with its error if that is known.

    Args:
        entry: as `as_json` makes it.
        digits: behind the point.
        scale: 100 for percent.
    """
    return f"{entry['value'] * scale:.{digits}f}{_error(entry, digits, scale)}"


def format_signed(entry: Mapping[str, Any], digits: int) -> str:
    """A difference of a report for people.

    Args:
        entry, digits: as for `format_estimate`.
    """
    return f"{entry['value']:+.{digits}f}{_error(entry, digits)}"


def perplexity_entry(
    found: Perplexity, expected: Perplexity | None = None, comparison: Comparison | None = None
) -> dict[str, Any]:
    """A perplexity in a report.

    Args:
        found: of the model.
        expected: of the baseline, if there is one.
        comparison: of both.
    """
    entry = _nll_entry(found)
    if expected is None or comparison is None:
        return entry
    return entry | {
        "baseline": _nll_entry(expected),
        "over_baseline": as_json(paired_difference(found, expected)),
        "kl": as_json(comparison.kl),
        "top1_agreement": as_json(comparison.top1_agreement),
    }


def task_entry(found: TaskResult, expected: TaskResult | None = None) -> dict[str, Any]:
    """A task's result in a report.

    Args:
        found: of the model.
        expected: of the baseline, if there is one.
    """
    metrics: dict[str, Any] = {name: as_json(estimate) for name, estimate in found.metrics.items()}
    if expected is not None:
        changes = found.over(expected)
        for name, entry in metrics.items():
            entry["baseline"] = as_json(expected.metrics[name])
            if name in changes:
                entry["over_baseline"] = as_json(changes[name])
    return {"items": found.items, "metrics": metrics}


def speed_entry(found: tuple[str, Speed], expected: tuple[str, Speed] | None = None) -> dict[str, Any]:
    """Speeds in a report.

    Args:
        found: the device's name, and what was measured there of the model.
        expected: the same of the baseline, if there is one.
    """

    def part(device: str, speed: Speed) -> dict[str, Any]:
        return {
            "device": device,
            "weight_bytes": speed.weight_bytes,
            "peak_bytes": speed.peak_bytes,
            "batches": [
                {
                    "batch": one.batch,
                    "tokens_per_second": round(one.tokens_per_second, 1),
                    "time_to_first_token": round(one.time_to_first_token, 5),
                }
                for one in speed.batches
            ],
        }

    return {
        "prompt_tokens": found[1].prompt_tokens,
        "new_tokens": found[1].new_tokens,
        "model": part(*found),
        "baseline": None if expected is None else part(*expected),
    }


def describe_model(source: str, model: PreTrainedModel) -> dict[str, Any]:
    """A model in a report: name, recipe, and what tells the checkpoint from all others.

    Args:
        source: a folder or a model id.
        model: loaded from there.
    """
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


def _nll_entry(result: Perplexity) -> dict[str, Any]:
    by_window = result.token_nll.double().mean(dim=1)
    return {
        "value": round(result.perplexity, 6),
        "nll": as_json(Estimate.of(by_window)),
        "nll_by_window": [round(nll, 6) for nll in by_window.tolist()],
    }


def _digests(folder: Path) -> dict[str, str]:
    """SHA-256 of the weight files: what the Hub calls their LFS oid."""
    digests = {}
    for file in checkpoint_files(folder):
        with open(file, "rb") as stream:
            digests[file.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return digests


def _error(entry: Mapping[str, Any], digits: int, scale: int = 1) -> str:
    error = entry["standard_error"]
    return "" if error is None else f" ± {error * scale:.{digits}f}"
