"""What the scripts that measure the quality of real models write down."""

import json
from pathlib import Path
from typing import Any

import torch
from gpu_report import about_this_run
from real_models import MODELS

from hf_hadacore.evaluation.perplexity import Comparison, Perplexity, paired_difference
from hf_hadacore.evaluation.report import as_json as estimate_as_json
from hf_hadacore.evaluation.report import device_name


def about_quality(command: str, device: str, text: str, context: int) -> dict[str, Any]:
    """The head of a report, without models.

    Args:
        command: that makes it again.
        device: where the models run.
        text: the name of what they read.
        context: tokens of a window.
    """
    return {
        **about_this_run(command, "transformers"),
        "device": device_name(torch.device(device)),
        "text": text,
        "context": context,
        "models": {},
    }


def about_model(name: str, expected: Perplexity) -> dict[str, Any]:
    """What a report says of a model besides its rows.

    Args:
        name: of `MODELS`.
        expected: the result in full precision.
    """
    return {
        "title": MODELS[name].title,
        "origin": "dequantized GGUF",
        "tokens": expected.token_nll.numel(),
        "baseline_perplexity": round(expected.perplexity, 3),
    }


def scores(result: Comparison, expected: Perplexity) -> dict[str, Any]:
    """What a row says of a model beside the one in full precision."""
    return {
        "perplexity": round(result.perplexity.perplexity, 3),
        "over_baseline": as_json(paired_difference(result.perplexity, expected)),
        "kl": estimate_as_json(result.kl),
        "top1_agreement": estimate_as_json(result.top1_agreement),
    }


def as_json(difference: tuple[float, float]) -> dict[str, float]:
    return {"nll": round(difference[0], 5), "standard_error": round(difference[1], 5)}


def merge_report(report: dict[str, Any], file: Path) -> None:
    """Write the report, and keep what the file says of other models measured in the same way."""
    if file.exists():
        before = json.loads(file.read_text())
        if all(before[key] == report[key] for key in ("device", "versions", "text", "context")):
            report["models"] = before["models"] | report["models"]
    file.write_text(json.dumps(report, indent=2) + "\n")
