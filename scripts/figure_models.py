"""The table of the real models, from the evaluations of `evaluate_models.py`, and quality against size."""

import json
import math
from pathlib import Path
from typing import Any

import figures
from evaluate_models import Variant
from figure_plots import plot
from figures import FiguresError, block, read_results, source, table
from real_models import MODELS

CARDS = Path(__file__).parents[1] / "model_cards"
# Of what has no card: models as they are, and those that nobody may publish.
WITHOUT_CARD = "evaluations"
_8BIT_ATTENTION = ("fp8", "int8-fp8")
_MARKERS = "os^vD*PX"
_METHODS = {"rtn": "", "gptq": ", GPTQ"}


def read_evaluations() -> dict[str, list[dict[str, Any]]]:
    """By key of `real_models.MODELS`; by checkpoint, the model itself first, then by attention.

    Raises:
        FiguresError: there are none, or one is of no such model.
    """
    files = sorted(
        file
        for folder in (CARDS, figures.RESULTS / WITHOUT_CARD)
        for file in folder.glob("*/evaluation*.json")
    )
    if not files:
        raise FiguresError("there are no evaluations; scripts/evaluate_models.py writes them")
    found: dict[str, list[dict[str, Any]]] = {}
    for file in files:
        name = next((name for name in MODELS if file.parent.name.startswith(name)), None)
        if name is None:
            raise FiguresError(f"{file.parent.name}: is none of {', '.join(MODELS)}")
        found.setdefault(name, []).append(json.loads(file.read_text("utf-8")))
    for evaluations in found.values():
        evaluations.sort(key=lambda one: (one["model"]["name"], _mode(one["model"])))
    return {name: found[name] for name in MODELS if name in found}


@block
def real_models() -> str:
    cpu = read_results("speed_cpu")
    header = ["attention", "size", "perplexity", "nats over bf16", "KL", "same likeliest token"]
    header += ["multiple choice", "tok/s, GPU", "tok/s, CPU"]
    parts: list[str] = []
    runs: dict[str, None] = {}
    for name, evaluations in read_evaluations().items():
        rows = [_baseline_row(evaluations[0], cpu["speeds"])]
        rows += [_row(evaluation, cpu["speeds"]) for evaluation in evaluations]
        parts.append(table([MODELS[name].title, *header], rows))
        for one in evaluations:
            text = one["perplexity"]
            runs[f"{text['tokens']:,} tokens of {text['text']}; {source(one)}"] = None
    note = (
        "The models are dequantized GGUF files: this is a second quantization. Differences ± standard errors "
        "are paired. Multiple choice: accuracy of bf16, and its mean change over the tasks in points. tok/s: "
        "greedy `generate`, one sequence, as it runs without further options; on the CPU of "
        "checkpoints of the same recipe."
    )
    return "\n\n".join([*parts, note, *runs, f"tok/s, CPU: {source(cpu)}"])


def _baseline_row(evaluation: dict[str, Any], cpu: dict[str, Any]) -> list[object]:
    model, text = evaluation["baseline"], evaluation["perplexity"]["baseline"]
    tasks = [task["metrics"]["acc"]["baseline"]["value"] for task in evaluation["tasks"].values()]
    accuracy = f"{100 * sum(tasks) / len(tasks):.1f} %"
    quality = [f"{text['value']:.2f}", "", "", "", accuracy]
    return [*_names(model), _size(model), *quality, *_rates(evaluation, "baseline", cpu)]


def _row(evaluation: dict[str, Any], cpu: dict[str, Any]) -> list[object]:
    model, text = evaluation["model"], evaluation["perplexity"]
    return [
        *_names(model),
        _size(model),
        f"{text['value']:.2f}",
        _with_error(text["over_baseline"], "+.3f"),
        f"{text['kl']['value']:.3f}",
        f"{100 * text['top1_agreement']['value']:.1f} %",
        _with_error(_mean_change(evaluation), "+.1f", 100),
        *_rates(evaluation, "model", cpu),
    ]


def _mean_change(evaluation: dict[str, Any]) -> dict[str, float]:
    """Of the accuracies; the tasks' questions are independent of each other."""
    changes = [task["metrics"]["acc"]["over_baseline"] for task in evaluation["tasks"].values()]
    return {
        "value": sum(change["value"] for change in changes) / len(changes),
        "standard_error": math.hypot(*(change["standard_error"] for change in changes)) / len(changes),
    }


def _with_error(entry: dict[str, Any], form: str, scale: int = 1) -> str:
    error = entry["standard_error"]
    known = "" if error is None else f" ± {error * scale:{form.removeprefix('+')}}"
    return f"{entry['value'] * scale:{form}}{known}"


def _names(model: dict[str, Any]) -> list[str]:
    """Of recipe and attention."""
    recipe = model["quantization_config"]
    name = {"bfloat16": "bf16"}.get(model["dtype"], model["dtype"])
    if recipe is not None:
        order = ", act-order" if recipe["act_order"] else ""
        name = f"int4, group {recipe['group_size']}{_METHODS[recipe['method']]}{order}"
    return [name, _mode(model) or "as it is"]


def _mode(model: dict[str, Any]) -> str:
    """Of 8-bit attention, else nothing."""
    return model["attention"] if model["attention"] in _8BIT_ATTENTION else ""


def _size(model: dict[str, Any]) -> str:
    return f"{model['bytes'] / 1e6:.0f} MB"


def _rates(evaluation: dict[str, Any], which: str, cpu: dict[str, Any]) -> list[str]:
    """Tokens/s where it was evaluated, and on the CPU."""
    found = evaluation.get("speed"), _find_speed(cpu, evaluation, which)
    return [f"{speed[which]['batches'][0]['tokens_per_second']:.0f}" if speed else "" for speed in found]


def _find_speed(speeds: dict[str, Any], evaluation: dict[str, Any], which: str) -> dict[str, Any] | None:
    """That of an evaluation; all of a model's have the same baseline."""
    name = evaluation[which]["name"]
    if which == "baseline":
        return next(
            (speed for key, speed in speeds.items() if key.startswith((f"{name}/", f"{name}-"))), None
        )
    return speeds.get(Variant(name, _mode(evaluation["model"])).file)


@plot("quality")
def quality_size(axes: Any, result: dict[str, Any]) -> None:
    """What recipes cost, in nats per token over bf16, against their checkpoints' size; hollow: group 128."""
    kinds: dict[str, str] = {}
    for color, model in enumerate(result["models"].values()):
        axes.plot([], [], "s", color=f"C{color}", label=model["title"])
        for recipe in model["recipes"]:
            # What is no checkpoint, or one of these with 8-bit attention, has no size of its own.
            if not recipe.get("bytes") or recipe["method"] is None or recipe["attention"]:
                continue
            kind = recipe["recipe"].removeprefix(f"asymmetric, group {recipe['group_size']}, ")
            axes.errorbar(
                100 * recipe["bytes"] / model["baseline_bytes"],
                recipe["over_baseline"]["nll"],
                yerr=recipe["over_baseline"]["standard_error"],
                marker=kinds.setdefault(kind, _MARKERS[len(kinds) % len(_MARKERS)]),
                color=f"C{color}",
                markerfacecolor="white" if recipe["group_size"] == 128 else None,
                linewidth=1,
            )
    for kind, marker in kinds.items():
        axes.plot([], [], marker, color="0.4", label=kind)
    axes.set_xlabel("checkpoint, % of bf16 (hollow: group 128)")
    axes.set_ylabel("nats per token over bf16")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8, loc="upper right")
