"""Model cards: the text and metadata of a checkpoint on the Hub, from its reports alone."""

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from math import prod
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..config import HadaCoreConfig
from ..errors import CheckpointError, EvaluationError
from ..evaluation.report import read_evaluation
from ..inspection import format_size
from ..offline.licenses import find_license
from ..offline.staging import REPORT_NAME
from .measurements import measured_sections

CARD_NAME = "README.md"
EVALUATION_PATTERN = "evaluation*.json"

_TAGS = ["hadacore", "int4", "4-bit"]
_METRIC_TYPES = {"acc": "accuracy", "acc_norm": "accuracy"}
_OPTIONS = ("method", "group_size", "symmetric")  # shown even if they have their defaults
_MARK = re.compile(r"<!-- hadacore card, sha256 of what is above: ([0-9a-f]{64}) -->\n?\Z")
_MAX_PATTERNS = 8


def write_card(
    folder: str | os.PathLike[str],
    *,
    evaluations: Sequence[str | os.PathLike[str]] | None = None,
    repo_id: str | None = None,
    base_model: str | None = None,
    license_id: str | None = None,
    force: bool = False,
) -> Path:
    """Write the model card of a checkpoint, its README.md.

    Args:
        folder: the checkpoint; needs a quantization report.
        evaluations, repo_id, base_model, license_id: as for `card_of`.
        force: replace a card that a person has written or changed.

    Raises:
        CheckpointError: the folder has no readable report, or a card that a person has written.
        EvaluationError: an evaluation is of other weights.
    """
    file = Path(folder) / CARD_NAME
    if file.exists() and not force and not is_generated(file.read_text("utf-8", errors="replace")):
        raise CheckpointError(
            f"{file}: was written or changed by a person and is kept; force=True (--force) replaces it"
        )
    card = card_of(
        folder, evaluations=evaluations, repo_id=repo_id, base_model=base_model, license_id=license_id
    )
    file.write_text(card, "utf-8")
    return file


def card_of(
    folder: str | os.PathLike[str],
    *,
    evaluations: Sequence[str | os.PathLike[str]] | None = None,
    repo_id: str | None = None,
    base_model: str | None = None,
    license_id: str | None = None,
) -> str:
    """The model card of a checkpoint.

    Args:
        folder: the checkpoint.
        evaluations: what `hadacore evaluate --json` wrote; None takes `evaluation*.json` of the folder.
        repo_id: where it will be on the Hub, for the title and the code that loads it; None takes the name
            of the folder.
        base_model: id of the model it was made from; None takes the report's source if that is an id.
        license_id: as the Hub calls it; None takes the report's, or what a LICENSE file says.

    Raises:
        CheckpointError: the folder has no readable report.
        EvaluationError: an evaluation is of other weights.
    """
    folder = Path(folder)
    sources = sorted(folder.glob(EVALUATION_PATTERN)) if evaluations is None else evaluations
    report = _read_report(folder)
    return render_card(
        report,
        [read_evaluation(source, folder) for source in sources],
        repo_id=repo_id or folder.resolve().name,
        base_model=base_model,
        license_data={"license": license_id} if license_id else report.get("license") or find_license(folder),
    )


def render_card(
    report: Mapping[str, Any],
    evaluations: Sequence[Mapping[str, Any]] = (),
    *,
    repo_id: str,
    base_model: str | None = None,
    license_data: Mapping[str, Any],
    note: str | None = None,
) -> str:
    """A model card from what was written down when the checkpoint was made and measured.

    Args:
        report: `quantization_report.json`.
        evaluations: of this checkpoint, each as `hadacore evaluate --json` writes it.
        repo_id: id on the Hub, or a folder's name.
        base_model: id of the source; None takes the report's source if that is an id.
        license_data: "license", "license_name" and "license_link", as far as they are known.
        note: what else must be known about the source, in Markdown.

    Raises:
        CheckpointError: the report lacks something that every report has.
        EvaluationError: an evaluation does.
    """
    try:
        content = _content(report, repo_id, base_model)
    except (KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise CheckpointError(f"{REPORT_NAME}: is no report of hadacore quantize: {error!r}") from None
    try:
        sections = measured_sections(evaluations)
        results = [result for evaluation in evaluations for result in _eval_results(evaluation)]
    except (KeyError, TypeError, AttributeError) as error:
        raise EvaluationError(f"an evaluation lacks what all have: {error!r}") from None
    data = ModelCardData(
        **license_data,
        library_name="transformers",
        pipeline_tag="text-generation" if content["is_causal"] else None,
        base_model=content["base_model"],
        base_model_relation="quantized" if content["base_model"] else None,
        quantized_by=repo_id.split("/")[0] if "/" in repo_id else "hf_hadacore",
        tags=_TAGS,
        model_name=content["title"] if results else None,
        eval_results=results or None,
    )
    template = files(__package__).joinpath("templates/model_card.md.jinja").read_text("utf-8")
    content |= {"repo_id": repo_id, "sections": sections, "license_data": license_data, "note": note}
    card = ModelCard.from_template(data, template_str=template, **content)
    text = f"{str(card).rstrip()}\n\n"
    return f"{text}<!-- hadacore card, sha256 of what is above: {_digest(text)} -->\n"


def is_generated(card: str) -> bool:
    """Whether a card is as `render_card` made it; False once a person has changed a letter."""
    mark = _MARK.search(card)
    return mark is not None and _digest(card[: mark.start()]) == mark[1]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _read_report(folder: Path) -> dict[str, Any]:
    file = folder / REPORT_NAME
    try:
        report = json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder}: has no {REPORT_NAME}, from which cards are made; `hadacore quantize` writes it"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: cannot be read: {error}") from None
    if not isinstance(report, dict):
        raise CheckpointError(f"{file}: must be a JSON object, found {type(report).__name__}")
    return report


def _content(report: Mapping[str, Any], repo_id: str, base_model: str | None) -> dict[str, Any]:
    """The values of the template that the report gives."""
    recipe = report["quantization_config"]
    source = report["source"]
    architecture = report["architecture"]
    is_causal = architecture.endswith("ForCausalLM")
    layers = report["layers"]
    weights = sum(prod(layer["shape"]) for layer in layers)
    bits = sum(layer["bits_per_weight"] * prod(layer["shape"]) for layer in layers)
    return {
        "title": repo_id.rpartition("/")[2],
        "base_model": base_model or (source if "/" in source else None),
        "source": source,
        "is_causal": is_causal,
        "loader": "AutoModelForCausalLM" if is_causal else architecture,
        "recipe": {name: recipe[name] for name in _OPTIONS} | _without_defaults(recipe),
        "calibration": report.get("calibration"),
        "rotation": report.get("rotation"),
        "has_key_means": bool(recipe.get("key_means")),
        "dtype": report["dtype"],
        "versions": ", ".join(f"{name} {version}" for name, version in report["versions"].items()),
        "version": report["versions"]["hf_hadacore"],
        "source_size": format_size(report["source_bytes"]),
        "quantized_size": format_size(report["quantized_bytes"]),
        "size_ratio": report["size_ratio"],
        "parameters": report["parameters"],
        "quantized_share": report["quantized_share"],
        "bits_per_weight": bits / weights,
        "weight_error": _mean(layers, "relative_error"),
        "output_error": _mean(layers, "output_error"),
        "full_precision": _kept(report["full_precision"]),
    }


def _without_defaults(recipe: Mapping[str, Any]) -> dict[str, Any]:
    # Names of modules tell readers nothing.
    defaults = {**HadaCoreConfig().to_dict(), "key_means": recipe.get("key_means")}
    return {name: value for name, value in recipe.items() if value != defaults.get(name)}


def _mean(layers: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """Mean over the layers that have it; None if none has."""
    values = [layer[name] for layer in layers if name in layer]
    return sum(values) / len(values) if values else None


def _kept(entries: Sequence[Mapping[str, Any]]) -> list[tuple[str, int, float, str]]:
    """Patterns of the names that stayed in full precision, how many, their share and why; largest first."""
    groups: dict[tuple[str, str], list[float]] = {}
    for entry in entries:
        pattern = re.sub(r"(?<=\.)\d+(?=\.)", "*", entry["name"])
        groups.setdefault((pattern, entry["reason"]), []).append(entry["share"])
    rows = [(pattern, len(shares), sum(shares), reason) for (pattern, reason), shares in groups.items()]
    return sorted(rows, key=lambda row: -row[2])[:_MAX_PATTERNS]


def _eval_results(evaluation: Mapping[str, Any]) -> list[EvalResult]:
    """What the metadata say about quality; the Hub takes numbers without errors."""
    attention = f", attention {evaluation['model']['attention']}"
    results = []
    if text := evaluation.get("perplexity"):
        name = f"perplexity, windows of {text['context']} tokens{attention}"
        results.append(_eval_result(text["text"], "perplexity", text["value"], name))
    for task, entry in evaluation.get("tasks", {}).items():
        for metric, estimate in entry["metrics"].items():
            if estimate["value"] is not None:
                kind = _METRIC_TYPES.get(metric, metric)
                results.append(_eval_result(task, kind, estimate["value"], f"{metric}{attention}"))
    return results


def _eval_result(dataset: str, metric: str, value: float, name: str) -> EvalResult:
    return EvalResult(
        task_type="text-generation",
        dataset_type=re.sub(r"[^\w.-]+", "-", dataset),
        dataset_name=dataset,
        metric_type=metric,
        metric_value=round(value, 4),
        metric_name=name,
    )
