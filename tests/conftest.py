"""Tiny models that every test can afford, and one thread a worker so that two workers fit two cores."""

from pathlib import Path

import pytest
import torch
import transformers
from graph_recorder import CountedCaptures
from tiny_models import TINY_CONFIGS, make_model

from hf_hadacore.attention import decode_cache, kv_layer
from hf_hadacore.decoding.generation import DecodeGraphs

pytest_plugins = ["hub_fixtures"]

torch.set_num_threads(1)
transformers.logging.disable_progress_bar()


@pytest.fixture(params=list(TINY_CONFIGS))
def tiny_model(request: pytest.FixtureRequest) -> transformers.PreTrainedModel:
    return make_model(request.param)


@pytest.fixture
def llama_dir(tmp_path: Path) -> Path:
    """A full-precision tiny Llama with an untied head, saved."""
    path = tmp_path / "llama"
    make_model("llama").save_pretrained(path)
    return path


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> CountedCaptures:
    """Decode graphs on the CPU, counted."""
    counted = CountedCaptures()
    monkeypatch.setattr(DecodeGraphs, "device_types", ("cpu",))
    monkeypatch.setattr(DecodeGraphs, "capture", counted)
    return counted


@pytest.fixture
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers of caches that grow, and windows that move, every few tokens."""
    monkeypatch.setattr(decode_cache, "bucket", lambda length: -(-length // 16) * 16)
    monkeypatch.setattr(decode_cache, "_ROOM", 8)
    monkeypatch.setattr(kv_layer, "window_room", lambda window: window + 31)
    monkeypatch.setattr(kv_layer, "BUFFER_STEP", 16)
