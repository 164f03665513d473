"""The quality benchmark on a tiny model: every recipe, from its checkpoint to its row."""

from pathlib import Path

import pytest
from benchmark_quality import RECIPES, Options, Recipe, measure
from quality_cases import make_tiny_benchmark


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Options:
    return Options(
        *(make_tiny_benchmark(tmp_path, monkeypatch), tmp_path, RECIPES),
        **{"device": "cpu", "dtype": "bfloat16", "windows": 3, "samples": 8, "sequence_length": 32},
    )


def test_every_recipe(options: Options) -> None:
    report = measure("tiny", options)
    assert report["tokens"] == 45
    rows = {row["recipe"]: row for row in report["recipes"]}
    assert len(rows) == len(RECIPES)
    assert [file.name for file in sorted(options.work.iterdir())] == ["data", "tiny"]
    for row in rows.values():
        assert row["kl"]["value"] > 0 and 0 < row["top1_agreement"]["value"] <= 1
    assert rows["bf16, fp8 attention"]["bytes"] == report["baseline_bytes"]
    searched, minmax = rows["asymmetric, group 64, searched"], rows["asymmetric, group 64, min-max"]
    assert searched["bits_per_weight"] == minmax["bits_per_weight"]
    assert searched["relative_weight_error"] < minmax["relative_weight_error"]
    assert searched["gain_over_minmax"]["nll"] == pytest.approx(
        minmax["over_baseline"]["nll"] - searched["over_baseline"]["nll"], abs=2e-5
    )
    assert "cost_of_int4_head" in rows["asymmetric, group 64, searched, int4 head"]
    nlls = [row["over_baseline"]["nll"] for row in rows.values()]
    assert len(set(nlls)) == len(nlls)  # every recipe is another model


def test_what_recipes_are_compared_with() -> None:
    assert list(Recipe("min-max", 64).steps_before()) == []
    assert list(Recipe("rtn", 64).steps_before()) == ["gain_over_minmax"]
    assert list(Recipe("gptq", 64).steps_before()) == ["gain_over_minmax", "gain_over_searched"]
    steps = Recipe("gptq", 64, "static").steps_before()
    assert steps["gain_over_gptq"] == Recipe("gptq", 64) and len(steps) == 3
    rotated = Recipe("gptq", 64, "static", rotation="r1r2").steps_before()
    assert rotated["gain_over_act_order"] == Recipe("gptq", 64, "static")
    assert Recipe("rtn", 64, attention="fp8").steps_before() == {} == Recipe(None).steps_before()
