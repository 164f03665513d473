"""What the GPU scripts write and how they end."""

import json
from pathlib import Path

import pytest
from gpu_report import conclude


def test_a_check_that_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "new" / "check.json"
    conclude({"cases": 3, "times": [{"n": 1, "us": 2.5}]}, [], file, rows="times")
    assert json.loads(file.read_text()) == {"cases": 3, "times": [{"n": 1, "us": 2.5}], "failed": []}
    printed = capsys.readouterr().out
    assert json.loads(printed[: printed.index("}") + 1]) == {"cases": 3, "failed": []}
    assert printed.endswith("n 1  us 2.5\nall right\n")


def test_a_check_that_fails_is_written_all_the_same(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="failed: \\['repeats'\\]"):
        conclude({}, ["repeats"], tmp_path / "check.json")
    assert json.loads((tmp_path / "check.json").read_text()) == {"failed": ["repeats"]}
