"""A tiny model and texts in the places of those that the quality benchmarks read."""

from pathlib import Path

import benchmark_quality
import pytest
from evaluation_cases import random_words, word_tokenizer
from real_models import MODELS
from tiny_models import make_model


def make_tiny_benchmark(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make "tiny" one of the real models, exported to a folder, with windows of 16 tokens.

    Returns:
        The folder of the texts.
    """
    monkeypatch.setitem(MODELS, "tiny", MODELS["smollm2-135m"])
    monkeypatch.setattr(benchmark_quality, "CONTEXT", 16)
    make_model("llama").save_pretrained(folder / "tiny")
    word_tokenizer().save_pretrained(folder / "tiny")
    data = folder / "data"
    data.mkdir()
    (data / benchmark_quality.TEXT).write_text(random_words(100))
    (data / benchmark_quality.CALIBRATION).write_text(random_words(400, seed=1))
    return data
