"""README's table of the real models and its plot, from made-up evaluations."""

import json
from pathlib import Path
from typing import Any

import figure_models
import figures
import pytest
from figures import FiguresError

CPU_SPEED = {"model": 7.4, "baseline": 5.6}


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder for cards, where there are no other evaluations."""
    monkeypatch.setattr(figures, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(figure_models, "CARDS", tmp_path / "model_cards")
    speed = {part: {"batches": [{"tokens_per_second": value}]} for part, value in CPU_SPEED.items()}
    about = {"command": "python y.py", "date": "2026-01-02", "device": "a CPU", "versions": {"torch": "2"}}
    figures.RESULTS.mkdir()
    report = about | {"speeds": {"smollm2-135m/evaluation-fp8.json": speed}}
    (figures.RESULTS / "speed_cpu.json").write_text(json.dumps(report))
    return tmp_path / "model_cards"


def estimate(value: float, error: float = 0.0) -> dict[str, float]:
    return {"value": value, "standard_error": error}


def task(change: float, error: float) -> dict[str, Any]:
    acc = estimate(0.5) | {"baseline": estimate(0.4), "over_baseline": estimate(change, error)}
    return {"items": 10, "metrics": {"acc": acc}}


def write(folder: Path, attention: str = "sdpa", recipe: dict[str, Any] | None = None, **more: Any) -> None:
    """An evaluation of the checkpoint that the folder is named after."""
    model = {"name": folder.name, "dtype": "bfloat16", "attention": attention, "bytes": 90_400_000}
    rate = {"batches": [{"batch": 1, "tokens_per_second": 123.4}]}
    report = {
        **{"command": "python x.py", "date": "2026-01-02", "device": "a GPU", "versions": {"torch": "2"}},
        "model": model | {"quantization_config": recipe},
        "baseline": model
        | {"attention": "sdpa", "bytes": 200_000_000, "name": "smollm2-135m", "quantization_config": None},
        "perplexity": {
            **{"text": "prose.txt", "tokens": 1023, "value": 20.123, "baseline": {"value": 18.5}},
            **{"over_baseline": estimate(0.0841, 0.0012), "kl": estimate(0.0456)},
            "top1_agreement": estimate(0.8765),
        },
        "tasks": {"one": task(0.03, 0.003), "two": task(-0.01, 0.004)},
        "speed": {"model": rate, "baseline": {"batches": [{"batch": 1, "tokens_per_second": 61.7}]}},
        **more,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"evaluation-{attention}.json").write_text(json.dumps(report))


RTN = {"method": "rtn", "group_size": 128, "act_order": False}
GPTQ = {"method": "gptq", "group_size": 64, "act_order": "static"}


def test_real_models(cards: Path) -> None:
    write(cards / "smollm2-135m-int4-gptq", recipe=GPTQ, speed=None)
    write(cards / "smollm2-135m-int4", "int8-fp8", RTN)
    write(cards / "smollm2-135m-int4", recipe=RTN)
    others = figures.RESULTS / "evaluations"
    write(others / "smollm2-135m", "fp8")
    write(others / "qwen2.5-coder-0.5b-int4", recipe=RTN)
    first, second, *notes = figure_models.real_models().split("\n\n")
    quality = "20.12 | +0.084 ± 0.001 | 0.046 | 87.6 % | +1.0 ± 0.2"
    assert first.splitlines()[2:] == [
        "| bf16 | as it is | 200 MB | 18.50 |  |  |  | 40.0 % | 62 | 6 |",
        f"| bf16 | fp8 | 90 MB | {quality} | 123 | 7 |",
        f"| int4, group 128 | as it is | 90 MB | {quality} | 123 |  |",
        f"| int4, group 128 | int8-fp8 | 90 MB | {quality} | 123 |  |",
        f"| int4, group 64, GPTQ, act-order | as it is | 90 MB | {quality} |  |  |",
    ]
    assert first.startswith("| SmolLM2-135M-Instruct | attention | size |")
    assert second.startswith("| Qwen2.5-Coder-0.5B-Instruct | attention |") and second.count("\n") == 3
    assert notes[1:] == [
        "1,023 tokens of prose.txt; a GPU; torch 2; 2026-01-02: `python x.py`",
        "tok/s, CPU: a CPU; torch 2; 2026-01-02: `python y.py`",
    ]


def test_what_is_missing_or_unknown_is_named(cards: Path) -> None:
    with pytest.raises(FiguresError, match="there are no evaluations"):
        figure_models.real_models()
    write(cards / "other-int4", recipe=RTN)
    with pytest.raises(FiguresError, match="other-int4: is none of smollm2-135m"):
        figure_models.real_models()


def test_quality_against_size(tmp_path: Path) -> None:
    """Of what is a checkpoint of its own."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def recipe(name: str, size: int | None, nll: float, **more: Any) -> dict[str, Any]:
        cost = {"nll": nll, "standard_error": 0.01}
        row = {"recipe": f"asymmetric, group 64, {name}", "method": "rtn", "bytes": size, "group_size": 64}
        row["attention"] = None
        return row | {"over_baseline": cost} | more

    recipes = [
        recipe("min-max", None, 0.3, method="min-max"),
        recipe("searched", 80_000_000, 0.2),
        recipe("with fp8", 80_000_000, 0.25, attention="fp8"),
        recipe("bf16 with fp8", 270_000_000, 0.01, method=None, attention="fp8"),
    ]
    model = {"title": "A model", "baseline_bytes": 270_000_000, "recipes": recipes}
    figure, axes = plt.subplots()
    figure_models.quality_size(axes, {"models": {"a": model}})
    (point,) = axes.containers
    assert point[0].get_xydata().tolist() == [[pytest.approx(100 * 80 / 270), 0.2]]
    assert axes.get_legend_handles_labels()[1] == ["A model", "searched"]
    plt.close(figure)
