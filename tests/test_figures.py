"""README's tables say what the committed results say."""

import json
from pathlib import Path

import figure_plots
import figures
import make_figures
import pytest
import typer
from figures import BLOCKS, FiguresError, read_results, source, table
from make_figures import fill
from typer.testing import CliRunner

ROOT = Path(__file__).parents[1]


def run(*arguments: str):
    app = typer.Typer()
    app.command()(make_figures.main)
    return CliRunner().invoke(app, arguments)


@pytest.fixture
def readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A README with one block, whose results say 1."""
    file = tmp_path / "README.md"
    file.write_text("before\n<!-- figures:speed -->\nold\n<!-- /figures:speed -->\nafter\n")
    (tmp_path / "speed.json").write_text('{"tokens": 1}')
    monkeypatch.setattr(make_figures, "DOCUMENTS", (file,))
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    monkeypatch.setattr(figure_plots, "FOLDER", tmp_path)
    for name in list(BLOCKS):
        monkeypatch.delitem(BLOCKS, name)
    for name in list(figure_plots.PLOTS):
        monkeypatch.delitem(figure_plots.PLOTS, name)
    monkeypatch.setitem(BLOCKS, "speed", lambda: f"{read_results('speed')['tokens']} tok/s")
    monkeypatch.setitem(
        figure_plots.PLOTS, "bars", ("speed", lambda axes, result: axes.bar([0], [result["tokens"]]))
    )
    return file


def test_documents_are_up_to_date() -> None:
    result = run("--check")
    assert result.exit_code == 0, result.output


def test_results_say_how_they_were_measured_and_name_no_path() -> None:
    files = sorted((ROOT / "scripts" / "results").glob("*.json"))
    assert files
    for file in files:
        text = file.read_text()
        assert {"command", "date", "device", "versions"} <= json.loads(text).keys(), file.name
        assert not any(root in text for root in ("/root", "/home", "/tmp", "/work", "/Users")), file.name


def test_fills_its_blocks_and_nothing_else(readme: Path) -> None:
    assert run().exit_code == 0
    assert readme.read_text() == "before\n<!-- figures:speed -->\n1 tok/s\n<!-- /figures:speed -->\nafter\n"
    assert "<svg" in (readme.parent / "bars.svg").read_text()
    assert run("--check").exit_code == 0


def test_check_fails_when_results_have_changed_and_writes_nothing(readme: Path) -> None:
    assert run().exit_code == 0
    filled = readme.read_text()
    (readme.parent / "speed.json").write_text('{"tokens": 2}')
    result = run("--check")
    assert result.exit_code == 1
    assert "README.md, docs/bars.svg stale; run: make figures" in result.output
    assert readme.read_text() == filled


def test_missing_results_are_named(readme: Path) -> None:
    (readme.parent / "speed.json").unlink()
    result = run()
    assert result.exit_code == 1
    assert "results/speed.json is missing" in result.output


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "have blocks"),
        (
            "<!-- figures:speed -->\n<!-- /figures:speed -->\n<!-- figures:size -->\n<!-- /figures:size -->",
            "size",
        ),
        ("<!-- figures:speed -->\n", "figures:speed is not closed"),
    ],
)
def test_blocks_and_functions_belong_together(readme: Path, text: str, says: str) -> None:
    with pytest.raises(FiguresError, match=says):
        fill({"README.md": text})


def test_table() -> None:
    assert table(["a", "b"], [["x", 1], ["y", 2]]) == "| a | b |\n| --- | ---: |\n| x | 1 |\n| y | 2 |"


def test_source_of_figures() -> None:
    result = {"device": "CPU", "versions": {"torch": "2.13"}, "date": "2026-01-02", "command": "python x.py"}
    assert source(result) == "CPU; torch 2.13; 2026-01-02: `python x.py`"
