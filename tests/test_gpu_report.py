"""What the GPU scripts write and how they end."""

import json
from pathlib import Path

import pytest
import torch
from gpu_report import conclude, require_gpu, run_checks


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


def test_a_check_that_raises_keeps_no_other_from_running(capsys: pytest.CaptureFixture[str]) -> None:
    report: dict[str, int] = {"cases": 3}
    assert run_checks(report, {"first": lambda: 1 // 0, "second": lambda: 2}) == ["first"]
    assert report == {"cases": 3, "second": 2}
    assert "first: Traceback" in capsys.readouterr().out


def test_a_machine_that_cannot_run_a_script(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="needs a CUDA device"):
        require_gpu()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    require_gpu()
    with pytest.raises(SystemExit, match="needs a Hopper GPU"):
        require_gpu(is_hopper=True)
