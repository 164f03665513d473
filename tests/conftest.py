"""Tiny models that every test can afford, and one thread a worker so that two workers fit two cores."""

from pathlib import Path

import pytest
import torch
import transformers
from tiny_models import TINY_CONFIGS, make_model

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
