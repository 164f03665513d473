"""The script that evaluates the real models, on a tiny one."""

import json
from pathlib import Path

import evaluate_models
import pytest
from evaluate_models import Options, Variant, evaluate, make_checkpoints, time_variants, wanted
from evaluation_cases import random_words, word_tokenizer, write_task
from tiny_models import make_model

from hf_hadacore import HadaCoreConfig
from hf_hadacore.evaluation.report import read_evaluation
from hf_hadacore.evaluation.speed import BatchSpeed, Speed

SPEED = Speed(128, 64, [BatchSpeed(1, 10, 0.1)], 1000, None)


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Options:
    """Of a model "tiny" that is exported already, with data of its vocabulary."""
    monkeypatch.setattr(evaluate_models, "CONTEXT", 32)
    monkeypatch.setattr("hf_hadacore.evaluation.evaluate.measure_speed", lambda model: SPEED)
    make_model("llama").save_pretrained(tmp_path / "work" / "tiny")
    word_tokenizer().save_pretrained(tmp_path / "work" / "tiny")
    data = tmp_path / "data"
    data.mkdir()
    for name in (evaluate_models.TEXT, evaluate_models.CALIBRATION):
        (data / name).write_text(random_words(200))
    for task in evaluate_models.TASKS:
        write_task(data / task)
    return Options(data, tmp_path / "work", tmp_path / "out", "", "cpu", 3, 5, 4, 16, True)


def make(options: Options) -> None:
    variants = wanted("tiny", options)
    make_checkpoints("tiny", variants, options)
    evaluate("tiny", variants, time_variants("tiny", variants, options), options)


def test_every_checkpoint_with_every_attention(options: Options, capsys: pytest.CaptureFixture[str]) -> None:
    make(options)
    found = {str(file.relative_to(options.out)) for file in options.out.glob("*/*")}
    names = ["evaluation-fp8.json", "evaluation-int8-fp8.json"]
    assert found == {
        *(f"tiny/{name}" for name in names),
        *(
            f"tiny-int4{suffix}/{name}"
            for suffix in ("", "-gptq")
            for name in [*names, "evaluation.json", "quantization_report.json"]
        ),
    }
    for file in options.out.glob("*/evaluation*.json"):
        checkpoint = file.parent.name
        folder = options.work / ("tiny" if checkpoint == "tiny" else f"evaluated/{checkpoint}")
        report = read_evaluation(file, folder)
        mode = file.stem.removeprefix("evaluation").removeprefix("-") or "sdpa"
        assert report["model"]["attention"] == mode
        assert report["baseline"]["name"] == "tiny" and report["baseline"]["attention"] == "sdpa"
        assert report["perplexity"]["windows"] == 3 and len(report["tasks"]) == 3
        assert report["tasks"]["social_iqa"]["items"] == 5
        assert report["speed"]["model"]["batches"] == report["speed"]["baseline"]["batches"]
        assert str(options.data.parent) not in file.read_text()
    made = json.loads((options.out / "tiny-int4-gptq" / "quantization_report.json").read_text())
    assert made["quantization_config"]["method"] == "gptq" and made["calibration"]["samples"] == 4
    assert "tiny-int4/evaluation.json: perplexity " in capsys.readouterr().out


def test_what_is_there_is_not_made_again(options: Options) -> None:
    only_int4 = options._replace(only="int4/evaluation")
    assert len(wanted("tiny", options)) == 8 and len(wanted("tiny", only_int4)) == 3
    file = options.out / "tiny-int4" / "evaluation.json"
    file.parent.mkdir(parents=True)
    file.write_text("here")
    assert wanted("tiny", only_int4) == [Variant("tiny-int4", mode) for mode in ("fp8", "int8-fp8")]
    make(only_int4)
    assert file.read_text() == "here"
    assert not (options.work / "evaluated" / "tiny-int4-gptq").exists()
    assert wanted("tiny", only_int4) == []


def test_a_checkpoint_of_another_recipe_is_not_taken(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    variants = [Variant("tiny-int4", None)]
    make_checkpoints("tiny", variants, options)
    make_checkpoints("tiny", variants, options)
    monkeypatch.setitem(evaluate_models.RECIPES, "-int4", HadaCoreConfig(group_size=32))
    with pytest.raises(SystemExit, match="tiny-int4: was made with another recipe; delete it"):
        make_checkpoints("tiny", variants, options)
    calibrated = [Variant("tiny-int4-gptq", None)]
    make_checkpoints("tiny", calibrated, options)
    with pytest.raises(SystemExit, match="tiny-int4-gptq: was made with another recipe"):
        make_checkpoints("tiny", calibrated, options._replace(samples=3))
