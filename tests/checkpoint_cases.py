"""Checkpoints of quantized models: what is on the disk, and processes that end while they write it."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hf_hadacore import HadaCoreConfig
from hf_hadacore.integrity import checkpoint_files
from hf_hadacore.offline.checkpoint import quantize_checkpoint


def quantize(src: Path, dst: Path, config: HadaCoreConfig | None = None, **options) -> dict:
    return quantize_checkpoint(src, dst, config or HadaCoreConfig(), **{"progress": False, **options})


def digests(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in checkpoint_files(folder) for name, tensor in load_file(file).items()}


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = stored(folder)
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


class Killed(BaseException):
    """Stands for the end of the process: nothing in the package may catch it."""


def raise_killed() -> None:
    raise Killed


def fail_at_call(
    monkeypatch: pytest.MonkeyPatch, number: int, die: Callable[[], None] = raise_killed
) -> list[str]:
    """Let the process "end" at the n-th call that changes the disk, before the call has done its work.

    Returns:
        What was called, as it grows.
    """
    calls: list[str] = []

    def dying(function: Callable) -> Callable:
        def wrapper(*args, **kwargs):
            calls.append(function.__name__)
            if len(calls) == number:
                die()
            return function(*args, **kwargs)

        return wrapper

    for module, name in ((os, "pwrite"), (os, "fsync"), (os, "replace"), (os, "ftruncate")):
        monkeypatch.setattr(module, name, dying(getattr(module, name)))
    for name in ("copyfile", "rmtree"):
        monkeypatch.setattr(shutil, name, dying(getattr(shutil, name)))
    return calls


def check_nothing_half_made_loads(dst: Path, whole: dict[str, str]) -> None:
    partial = dst.with_name(dst.name + ".partial")
    assert partial.exists()
    with pytest.raises((OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(partial)
    for folder in (dst, partial / "checkpoint"):
        assert not (folder / "config.json").exists() or digests(folder) == whole
