"""A calibrated run that was killed anywhere, and continued, gives the bytes of one that was not."""

import os
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_cases import check_nothing_half_made_loads, digests, fail_at_call
from test_calibrated import quantize, recipe, sample_tokens, save

from hf_hadacore.errors import CheckpointError
from hf_hadacore.offline.calibrated import CalibratedSource

OPTIONS: dict[str, Any] = {"calibration": sample_tokens(6, 16), "max_shard_size": "20KB", "resume": True}
KILLS = 24


@pytest.fixture
def src(tmp_path: Path) -> Path:
    # Biases go with the outputs that are permuted, so that they have to be read back, too.
    save("gpt-oss", tmp_path / "src", torch.bfloat16)
    return tmp_path / "src"


def sigkill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed_at(number: int, src: Path, dst: Path, config: Any) -> bool:
    """Run (or resume) in a process that is killed at its n-th change of the disk; whether it came to that."""
    child = os.fork()
    if not child:
        with pytest.MonkeyPatch.context() as patch:
            fail_at_call(patch, number, sigkill)
            quantize(src, dst, config, **OPTIONS)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


@pytest.mark.parametrize("act_order", ["static", "permuted"])
def test_killed_at_random_points_and_resumed(src: Path, tmp_path: Path, act_order: str) -> None:
    config = recipe(act_order)
    with pytest.MonkeyPatch.context() as patch:
        calls = fail_at_call(patch, -1)
        quantize(src, tmp_path / "whole", config, **OPTIONS)
    whole = digests(tmp_path / "whole")
    assert len(calls) > 100
    for number in random.Random(act_order).sample(range(1, len(calls) + 1), KILLS // 2):
        dst = tmp_path / f"dst{number}"
        assert killed_at(number, src, dst, config)
        check_nothing_half_made_loads(dst, whole)
        quantize(src, dst, config, **OPTIONS)
        assert digests(dst) == whole
        assert not dst.with_name(dst.name + ".partial").exists()
        shutil.rmtree(dst)


def test_killed_again_and_again(src: Path, tmp_path: Path) -> None:
    config, number, kills = recipe("permuted"), 5, 0
    quantize(src, tmp_path / "whole", config, **OPTIONS)
    while killed_at(number, src, tmp_path / "dst", config):
        number += 17
        kills += 1
    assert kills > 3
    assert digests(tmp_path / "dst") == digests(tmp_path / "whole")


def test_layers_that_are_done_are_not_solved_again(
    src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    realise = CalibratedSource.realise
    done: list[str] = []

    def dying(self: CalibratedSource, unit: Any) -> Any:
        if unit.name == "model.layers.1":
            raise KeyboardInterrupt
        return realise(self, unit)

    with monkeypatch.context() as patch:
        patch.setattr(CalibratedSource, "realise", dying)
        with pytest.raises(KeyboardInterrupt):
            quantize(src, tmp_path / "dst", **OPTIONS)
    monkeypatch.setattr(
        CalibratedSource, "realise", lambda self, unit: done.append(unit.name) or realise(self, unit)
    )
    quantize(src, tmp_path / "dst", **OPTIONS)
    assert done == ["model.layers.1"]
    quantize(src, tmp_path / "whole", **OPTIONS)
    assert digests(tmp_path / "dst") == digests(tmp_path / "whole")


def test_resume_refuses_other_calibration(src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(CalibratedSource, "realise", lambda self, unit: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            quantize(src, tmp_path / "dst", **OPTIONS)
    with pytest.raises(CheckpointError, match=r"cannot resume.*calibration"):
        quantize(src, tmp_path / "dst", **{**OPTIONS, "calibration": sample_tokens(6, 15)})
    with pytest.raises(CheckpointError, match=r"cannot resume.*quantization config"):
        quantize(src, tmp_path / "dst", recipe("static"), **OPTIONS)
    quantize(src, tmp_path / "dst", **OPTIONS)
