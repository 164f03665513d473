"""Tuning, with a pretended clock: CI has no GPU."""

import pytest
import torch
from typer.testing import CliRunner

from hf_hadacore.cli import app
from hf_hadacore.errors import UnsupportedError
from hf_hadacore.kernels import w4a16_schedules as schedules
from hf_hadacore.kernels import w4a16_tune as tuning


class FakeProblem:
    """Likes one kind of schedule."""

    def __init__(self, n, k, m, group_size, dtype):
        self.m = m

    def time(self, schedule):
        if isinstance(schedule, schedules.SkinnySchedule):
            return 1.0 if (schedule.block_n, schedule.stages) == (64, 6) else 2.0
        return 1.0 if schedule.block_m == 64 else 2.0


@pytest.fixture
def pretended_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tuning, "prefers_tiles", lambda *_: True)
    monkeypatch.setattr(tuning, "_Problem", FakeProblem)
    monkeypatch.setattr(tuning, "_compile_all", lambda jobs, progress: None)


def test_the_fastest_candidate_is_taken(pretended_gpu, tmp_path):
    best = tuning.tune([(4096, 4096)], (1, 60), progress=False)
    assert set(best) == {"sm90 4096x4096 1", "sm90 4096x4096 64"}
    assert best["sm90 4096x4096 1"][1] == 64 and best["sm90 4096x4096 1"].stages == 6
    assert best["sm90 4096x4096 64"].block_m == 64
    schedules.write_table(tmp_path / "tuned.json", best, {})
    assert schedules.read_table(tmp_path / "tuned.json") == best


def test_shapes_without_tiles_are_refused(pretended_gpu):
    with pytest.raises(UnsupportedError, match="100x128: tuning needs N a multiple of 64"):
        tuning.tune([(100, 128)], (1,), progress=False)


def test_tuning_needs_a_hopper_gpu(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    result = CliRunner().invoke(app, ["tune", str(tmp_path / "tuned.json"), "--shape", "4096x4096"])
    assert result.exit_code == 1
    assert "needs a Hopper GPU" in result.output
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("shape", ["4096", "4096x", "axb", "-1x64"])
def test_shapes_are_parsed(shape, tmp_path):
    result = CliRunner().invoke(app, ["tune", str(tmp_path / "tuned.json"), "--shape", shape])
    assert result.exit_code == 2
    assert "is not NxK" in result.output


def test_what_a_kernel_depends_on():
    skinny = schedules.SkinnySchedule(8, 64, 8, 4, 4)
    wide = schedules.WideSchedule(64, 16, 3, 4)

    def kernel(n: int, k: int, schedule: schedules.Schedule):
        return tuning._kernel_of((n, k, 1, 128, torch.float16, schedule))

    assert kernel(64, 4096, skinny) == kernel(128, 4096, skinny)
    assert kernel(64, 4096, skinny) != kernel(64, 8192, skinny)
    # The wide kernel takes the number of tiles at run time; only the split is compiled in.
    assert kernel(64, 4096, wide) == kernel(64, 8192, wide._replace(tiles=32))
    assert kernel(64, 4096, wide) != kernel(64, 8192, wide)
