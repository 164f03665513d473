"""Quantization that ends anywhere: nothing half made loads, and resumed it gives the same bytes."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import filelock
import pytest
import torch
from checkpoint_cases import Killed, check_nothing_half_made_loads, digests, fail_at_call, quantize, rewrite
from tiny_models import TINY_CONFIGS
from transformers import AutoModelForCausalLM

from hf_hadacore import HadaCoreConfig
from hf_hadacore.errors import CheckpointError
from hf_hadacore.integrity import checkpoint_files, verify_files
from hf_hadacore.offline import checkpoint, shard_writer
from hf_hadacore.offline.streaming import SourceModel


def killed_at(monkeypatch: pytest.MonkeyPatch, number: int, src: Path, dst: Path) -> bool:
    """Run (or resume) until the n-th such call; whether it came to that."""
    with monkeypatch.context() as patch:
        fail_at_call(patch, number)
        try:
            quantize(src, dst, max_shard_size="20KB", resume=True)
        except Killed:
            return True
    return False


@pytest.fixture
def one_layer(tmp_path: Path) -> Path:
    """A model of several shards with few places to be killed at."""
    config = TINY_CONFIGS["llama"]()
    config.num_hidden_layers = 1
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "one")
    return tmp_path / "one"


def test_killed_at_every_point_and_resumed(
    one_layer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize(one_layer, tmp_path / "whole", max_shard_size="20KB")
    whole = digests(tmp_path / "whole")
    number = 1
    while killed_at(monkeypatch, number, one_layer, tmp_path / f"dst{number}"):
        dst = tmp_path / f"dst{number}"
        check_nothing_half_made_loads(dst, whole)
        quantize(one_layer, dst, max_shard_size="20KB", resume=True)
        assert digests(dst) == whole
        assert not dst.with_name(dst.name + ".partial").exists()
        shutil.rmtree(dst)
        number += 1
    assert number > 60


def test_killed_again_and_again(one_layer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantize(one_layer, tmp_path / "whole", max_shard_size="20KB")
    number = 1
    while killed_at(monkeypatch, number, one_layer, tmp_path / "dst"):
        number += 1
    assert number > 10
    assert digests(tmp_path / "dst") == digests(tmp_path / "whole")


@pytest.mark.parametrize("units", [0, 1, 9, 20])
def test_what_is_done_is_not_done_again(
    llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, units: int
) -> None:
    done: list[str] = []
    realise = SourceModel.realise

    def dying_realise(self, unit):
        if len(done) == units:
            raise KeyboardInterrupt
        done.append(unit.name)
        return realise(self, unit)

    with monkeypatch.context() as patch:
        patch.setattr(SourceModel, "realise", dying_realise)
        with pytest.raises(KeyboardInterrupt):
            quantize(llama_dir, tmp_path / "dst")
    again: list[str] = []
    monkeypatch.setattr(
        SourceModel, "realise", lambda self, unit: again.append(unit.name) or realise(self, unit)
    )
    quantize(llama_dir, tmp_path / "dst", resume=True)
    assert not set(done) & set(again)
    assert len(done) + len(again) == 21
    quantize(llama_dir, tmp_path / "whole")
    assert digests(tmp_path / "dst") == digests(tmp_path / "whole")


def test_sigkill(llama_dir: Path, tmp_path: Path) -> None:
    quantize(llama_dir, tmp_path / "whole", max_shard_size="20KB")
    script = """
import os, signal, sys
from hf_hadacore import HadaCoreConfig
from hf_hadacore.offline import checkpoint, shard_writer
write, calls = shard_writer._write_tensor, []
def dying(*args):
    result = write(*args)
    calls.append(1)
    if len(calls) == 12:
        os.kill(os.getpid(), signal.SIGKILL)
    return result
shard_writer._write_tensor = dying
checkpoint.quantize_checkpoint(
    sys.argv[1], sys.argv[2], HadaCoreConfig(), max_shard_size="20KB", progress=False
)
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(checkpoint.__file__).parents[2])}
    command = [sys.executable, "-c", script, str(llama_dir), str(tmp_path / "dst")]
    assert subprocess.run(command, env=environment, timeout=240).returncode == -signal.SIGKILL
    assert not (tmp_path / "dst").exists()
    quantize(llama_dir, tmp_path / "dst", max_shard_size="20KB", resume=True)
    assert digests(tmp_path / "dst") == digests(tmp_path / "whole")


@pytest.fixture
def interrupted(llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that was interrupted after ten writes; returns the folder it was to make."""
    write, calls = shard_writer._write_tensor, []

    def dying(*args):
        calls.append(1)
        if len(calls) > 10:
            raise KeyboardInterrupt
        return write(*args)

    with monkeypatch.context() as patch:
        patch.setattr(shard_writer, "_write_tensor", dying)
        with pytest.raises(KeyboardInterrupt):
            quantize(llama_dir, tmp_path / "dst", max_shard_size="20KB")
    return tmp_path / "dst"


def test_damaged_partial_tensors_are_made_again(llama_dir: Path, tmp_path: Path, interrupted: Path) -> None:
    for shard in (tmp_path / "dst.partial" / "checkpoint").iterdir():
        content = bytearray(shard.read_bytes())
        content[-1] ^= 1
        shard.write_bytes(content)
    quantize(llama_dir, interrupted, max_shard_size="20KB", resume=True)
    quantize(llama_dir, tmp_path / "whole", max_shard_size="20KB")
    assert digests(interrupted) == digests(tmp_path / "whole")


@pytest.mark.parametrize("rest", [b'{"unit": "model.nor', b"\0\0\0\0", b"[]\n", b"{}"])
def test_torn_journal(llama_dir: Path, tmp_path: Path, interrupted: Path, rest: bytes) -> None:
    with open(tmp_path / "dst.partial" / "journal.jsonl", "ab") as stream:
        stream.write(rest)
    quantize(llama_dir, interrupted, max_shard_size="20KB", resume=True)
    quantize(llama_dir, tmp_path / "whole", max_shard_size="20KB")
    assert digests(interrupted) == digests(tmp_path / "whole")


def test_unfinished_run_is_not_overwritten(llama_dir: Path, interrupted: Path) -> None:
    with pytest.raises(CheckpointError, match=r"dst\.partial: holds an unfinished run.*--resume"):
        quantize(llama_dir, interrupted)


def test_resume_refuses_another_source_or_config(llama_dir: Path, interrupted: Path) -> None:
    before = digests(interrupted.with_name("dst.partial"))
    resume = {"max_shard_size": "20KB", "resume": True}
    with pytest.raises(CheckpointError, match=r"cannot resume.*quantization config"):
        quantize(llama_dir, interrupted, HadaCoreConfig(symmetric=True), **resume)
    with pytest.raises(CheckpointError, match=r"cannot resume.*plan of the shards"):
        quantize(llama_dir, interrupted, max_shard_size="1GB", resume=True)
    with pytest.raises(CheckpointError, match=r"cannot resume.*dtype"):
        quantize(llama_dir, interrupted, dtype="float16", **resume)
    rewrite(llama_dir, lambda tensors: tensors["model.norm.weight"].mul_(2))
    with pytest.raises(CheckpointError, match=r"cannot resume.*source weights"):
        quantize(llama_dir, interrupted, **resume)
    assert digests(interrupted.with_name("dst.partial")) == before


def test_two_processes_do_not_share_a_run(llama_dir: Path, tmp_path: Path, interrupted: Path) -> None:
    with filelock.FileLock(tmp_path / "dst.partial" / "lock"):
        with pytest.raises(CheckpointError, match="another process"):
            quantize(llama_dir, interrupted, max_shard_size="20KB", resume=True)


def test_full_disk(llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
        with pytest.raises(CheckpointError, match="GB more are needed"):
            quantize(llama_dir, tmp_path / "dst")

    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(CheckpointError, match=r"No space left.*resume"):
            quantize(llama_dir, tmp_path / "dst", resume=True)
    quantize(llama_dir, tmp_path / "dst", resume=True)
    verify_files(checkpoint_files(tmp_path / "dst"))
