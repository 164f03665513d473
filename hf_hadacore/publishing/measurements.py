"""The evaluations of a checkpoint as tables of a model card, those that can be compared side by side."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from ..attention.operands import ATTENTION_NAMES
from ..evaluation.report import describe_speed, format_estimate, format_signed
from ..inspection import format_size

Evaluation = Mapping[str, Any]


def measured_sections(evaluations: Sequence[Evaluation]) -> list[dict[str, Any]]:
    """What a card shows of evaluations: a section for all that were measured in the same way.

    Args:
        evaluations: of one checkpoint, as `hadacore evaluate --json` writes them.

    Returns:
        For each section the rows of its tables, "quality" and "speed" (the header first; None for none),
        the "text" and the "speed_note" that say of what, and its "runs": device, versions, date and commands.
    """
    # The model's own attention comes first.
    in_order = sorted(
        evaluations, key=lambda one: (repr(_conditions(one)), one["model"]["attention"] in ATTENTION_NAMES)
    )
    return [_section(list(group)) for _, group in groupby(in_order, key=_conditions)]


def _conditions(evaluation: Evaluation) -> list[Any]:
    """What must be the same for two evaluations to be comparable."""
    baseline, text = evaluation["baseline"], evaluation.get("perplexity")
    return [
        evaluation["device"],
        baseline and [baseline["name"], baseline["attention"], baseline["dtype"], baseline["files"]],
        text and [text[key] for key in ("text", "text_sha256", "context", "windows")],
        [
            [name, task["items"], task.get("sha256"), task.get("few_shot")]
            for name, task in evaluation.get("tasks", {}).items()
        ],
    ]


def _section(group: list[Evaluation]) -> dict[str, Any]:
    text = group[0].get("perplexity")
    timed = [one for one in group if one.get("speed")]
    return {
        "quality": _quality(group),
        "text": text and f"{text['tokens']:,} tokens of {text['text']}, in {text['windows']} windows",
        "speed": _speed(timed) if timed else None,
        "speed_note": describe_speed(timed[0]["speed"]) if timed else None,
        "runs": _runs(group),
    }


def _header(group: Sequence[Evaluation]) -> list[str]:
    baseline = group[0]["baseline"]
    first = [f"{baseline['name']}, {baseline['dtype']}"] if baseline else []
    return ["", *first, *(f"attention `{one['model']['attention']}`" for one in group)]


def _quality(group: Sequence[Evaluation]) -> list[list[str]]:
    """Every row has a cell for the baseline, if there is one, and for each evaluation."""
    has_baseline = group[0]["baseline"] is not None
    rows = [_header(group)]

    def add(title: str, cells: Sequence[str], baseline: str = "") -> None:
        rows.append([title, *([baseline] if has_baseline else []), *cells])

    if text := group[0].get("perplexity"):
        values = [f"{one['perplexity']['value']:.3f}" for one in group]
        add("perplexity", values, f"{text['baseline']['value']:.3f}" if has_baseline else "")
        if has_baseline:
            texts = [one["perplexity"] for one in group]
            changes = [format_signed(entry["over_baseline"], 4) for entry in texts]
            add("nats per token over the original", changes)
            add("KL divergence, nats per token", [format_estimate(entry["kl"], 4) for entry in texts])
            shares = [format_estimate(entry["top1_agreement"], 2, 100) for entry in texts]
            add("same likeliest token, %", shares)
    for name, task in group[0].get("tasks", {}).items():
        for metric, entry in task["metrics"].items():
            found = [one["tasks"][name]["metrics"][metric] for one in group]
            before = format_estimate(entry["baseline"], 4) if has_baseline else ""
            add(f"{name} {metric}", [format_estimate(each, 4) for each in found], before)
            if "over_baseline" in entry:
                add("difference", [format_signed(each["over_baseline"], 4) for each in found])
    return rows if len(rows) > 1 else []


def _speed(timed: Sequence[Evaluation]) -> list[list[str]]:
    """As `_quality`, of the evaluations that have speeds."""
    parts = [one["speed"]["model"] for one in timed]
    has_baseline = timed[0]["baseline"] is not None
    if has_baseline:
        parts.insert(0, timed[0]["speed"]["baseline"])
    rows = [_header(timed)]
    for batch in dict.fromkeys(one["batch"] for part in parts for one in part["batches"]):
        found = [next((one for one in part["batches"] if one["batch"] == batch), None) for part in parts]
        for name, key, scale in (
            ("tokens per second", "tokens_per_second", 1),
            ("first token, ms", "time_to_first_token", 1e3),
        ):
            cells = [f"{one[key] * scale:,.1f}" if one else "" for one in found]
            rows.append([f"{name}, batch {batch}", *cells])
    for name, key in (("weights in memory", "weight_bytes"), ("peak memory of the GPU", "peak_bytes")):
        if any(part[key] for part in parts):
            rows.append([name, *(format_size(part[key]) if part[key] else "" for part in parts)])
    return rows


def _runs(group: Sequence[Evaluation]) -> list[str]:
    """Where, when, with what and how: one line for all that have it in common, and their commands."""
    runs: dict[str, dict[str, None]] = {}
    for one in group:
        versions = ", ".join(f"{name} {version}" for name, version in one["versions"].items())
        commands = runs.setdefault(f"{one['device']}; {versions}; {one['date']}", {})
        if one.get("command"):
            commands[f"`{one['command']}`"] = None
    return [": ".join([run, *([", ".join(commands)] if commands else [])]) for run, commands in runs.items()]
