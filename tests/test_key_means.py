"""The means of keys: measured by calibration, stored in the checkpoint, subtracted by 8-bit attention."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_cases import rewrite, stored
from test_calibrated import quantize, recipe, sample_tokens, save
from test_kv_layer import contents
from tiny_models import TINY_CONFIGS, make_model, token_ids
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_hadacore import HadaCoreConfig
from hf_hadacore.attention import interface
from hf_hadacore.attention.decode_cache import Progress
from hf_hadacore.attention.key_means import key_mean_parameters, remove_key_means, stored_key_mean
from hf_hadacore.attention.kv_layer import Cursor, HadaCoreLayer
from hf_hadacore.errors import CheckpointError, ConfigError, FormatError
from hf_hadacore.inspection import inspect_checkpoint
from hf_hadacore.interchange.exporting import export_checkpoint
from hf_hadacore.offline import key_means
from hf_hadacore.offline.key_means import key_shapes

pytestmark = pytest.mark.transformers_versions
PATTERN = r"^model\.layers\.\d+\.self_attn$"
NAMES = {f"model.layers.{layer}.self_attn.k_mean" for layer in range(2)}


def load(folder: Path, attention: str | None = None, **options: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(
        folder, device_map="cpu", attn_implementation=attention, **options
    ).eval()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("key_means")
    save("llama", folder / "src")
    quantize(folder / "src", folder / "dst")
    return folder / "dst"


def change(src: Path, dst: Path, **options: Any) -> Path:
    """A copy with other options in its config."""
    dst.mkdir()
    for file in src.iterdir():
        (dst / file.name).write_bytes(file.read_bytes())
    config = json.loads((src / "config.json").read_text())
    config["quantization_config"] |= options
    (dst / "config.json").write_text(json.dumps(config))
    return dst


# Measuring


@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_whose_keys_are_cached_is_seen(name: str) -> None:
    model = make_model(name)
    names = [f"model.layers.{layer}.self_attn" for layer in range(2)]
    assert key_shapes(model) == dict.fromkeys(names, (2, 16))
    assert model.config._attn_implementation == "sdpa" or name == "gpt-oss"


def test_models_that_cannot_be_tried_do_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def tiny_model(model: PreTrainedModel) -> PreTrainedModel:
        raise RuntimeError("of another world")

    monkeypatch.setattr(key_means, "tiny_model", tiny_model)
    save("llama", tmp_path / "src")
    report = quantize(tmp_path / "src", tmp_path / "dst")
    assert "keys are not measured: no tiny model could be run: of another world" in caplog.text
    assert report["quantization_config"]["key_means"] == {}
    assert not NAMES & stored(tmp_path / "dst").keys()
    load(tmp_path / "dst")


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3-moe", "gpt-oss"])
def test_they_are_the_means_of_what_the_int4_model_caches(tmp_path: Path, name: str) -> None:
    save(name, tmp_path / "src")
    report = quantize(tmp_path / "src", tmp_path / "dst")
    assert report["quantization_config"]["key_means"] == {PATTERN: [2, 16]}
    model = load(tmp_path / "dst")
    with torch.no_grad():
        cache = model(sample_tokens(), use_cache=True).past_key_values
    for layer, (key, mean) in enumerate(key_mean_parameters(model).items()):
        assert key == f"model.layers.{layer}.self_attn.k_mean"
        assert not mean.requires_grad
        torch.testing.assert_close(mean.data, cache.layers[layer].keys.mean((0, 2)), rtol=1e-4, atol=1e-5)


def test_batches_of_different_sizes_count_by_their_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save("llama", tmp_path / "src")
    quantize(tmp_path / "src", tmp_path / "one")
    # 24 samples of 32 tokens: 10, 10 and 4.
    monkeypatch.setattr("hf_hadacore.offline.decoder._BATCH_TOKENS", 320)
    quantize(tmp_path / "src", tmp_path / "several")
    one, several = stored(tmp_path / "one"), stored(tmp_path / "several")
    assert one.keys() == several.keys() >= NAMES
    for name in NAMES:
        torch.testing.assert_close(one[name], several[name], rtol=1e-3, atol=1e-5)


# Using


@pytest.mark.parametrize("attention", ["hadacore", "hadacore-int8-fp8"])
def test_they_are_what_caches_subtract(checkpoint: Path, attention: str) -> None:
    model = load(checkpoint, attention)
    ids = token_ids(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=5, do_sample=False, return_dict_in_generate=True
    )
    for layer, mean in zip(out.past_key_values.layers, key_mean_parameters(model).values(), strict=True):
        # Heads of 16 are filled up to 64.
        assert torch.equal(layer.constant[..., :16], mean.float().expand(2, 2, 16))
        assert not layer.constant[..., 16:].any()


def test_they_are_read_with_the_first_tokens_only(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(checkpoint, "hadacore")
    read = []

    def counted(module: torch.nn.Module, shape: torch.Size) -> torch.Tensor | None:
        read.append(shape[2])
        return stored_key_mean(module, shape)

    monkeypatch.setattr(interface, "stored_key_mean", counted)
    model.generate(token_ids(2, 9), max_new_tokens=5, do_sample=False)
    assert read == [9, 9]


@pytest.mark.parametrize("use_cache", [False, True])
def test_the_own_mean_of_a_prompt_gives_the_same_as_none(checkpoint: Path, use_cache: bool) -> None:
    ids = token_ids(1, 9)
    plain = load(checkpoint)
    with torch.no_grad():
        cached = plain(ids, use_cache=True).past_key_values
        model = load(checkpoint, "hadacore-int8-fp8")
        stored_mean = model(ids, use_cache=use_cache).logits
        # The first layer's keys are the same with every kind of attention.
        model.model.layers[0].self_attn.k_mean.copy_(cached.layers[0].keys[0].mean(1))
        del model.model.layers[1].self_attn.k_mean
        own_mean = model(ids, use_cache=use_cache).logits
        remove_key_means(model)
        none = model(ids, use_cache=use_cache).logits
    torch.testing.assert_close(own_mean, none, rtol=1e-3, atol=1e-5)
    assert not torch.allclose(stored_mean, none, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_keys_behind_an_odd_first_token_are_stored_better(dtype: torch.dtype) -> None:
    progress = Progress()
    generator = torch.Generator().manual_seed(0)
    mean = 8 * torch.randn(1, 2, 64, generator=generator)
    key, value = (torch.randn(1, 2, 40, 64, generator=generator) for _ in range(2))
    key += mean[:, :, None]
    key[:, :, 0] = -mean
    errors = {}
    for name, constant in {"stored": mean, "of the first token": None}.items():
        layer = HadaCoreLayer(None, progress, Cursor(progress), True, dtype)
        for part in (slice(0, 1), slice(1, 40)):
            layer.update(key[:, :, part], value[:, :, part])[0].store(key[:, :, part], None, constant)
        rest = (contents(layer)[0] - key)[:, :, 1:]
        errors[name] = float(rest.norm())
    assert errors["stored"] < errors["of the first token"] / 4


# Keeping


def test_saving_and_dequantizing(checkpoint: Path, tmp_path: Path) -> None:
    model = load(checkpoint)
    model.save_pretrained(tmp_path / "again")
    again, before = stored(tmp_path / "again"), stored(checkpoint)
    assert again.keys() == before.keys() >= NAMES
    assert all(torch.equal(again[name], before[name]) for name in NAMES)
    plain = load(checkpoint, quantization_config=HadaCoreConfig(dequantize=True))
    assert not key_mean_parameters(plain)
    plain.save_pretrained(tmp_path / "plain")
    assert not NAMES & stored(tmp_path / "plain").keys()


def test_what_is_in_a_checkpoint_says_what_they_are_for(checkpoint: Path) -> None:
    summary = inspect_checkpoint(checkpoint)
    assert summary["parameters"] == inspect_checkpoint(checkpoint.parent / "src")["parameters"]
    kept = summary["full_precision"]
    (entry,) = [group for group in kept if group["name"].endswith("k_mean")]
    assert entry["name"] == "model.layers.*.self_attn.k_mean" and entry["count"] == 2
    assert entry["reason"] == "mean of the keys, for 8-bit attention"


def test_other_formats_have_no_place_for_them(checkpoint: Path, tmp_path: Path) -> None:
    save("llama", tmp_path / "src")
    quantize(tmp_path / "src", tmp_path / "int4", recipe(group_size=-1))
    assert stored(tmp_path / "int4").keys() >= NAMES
    export_checkpoint(tmp_path / "int4", tmp_path / "exported", progress=False)
    assert not NAMES & stored(tmp_path / "exported").keys()


# Refusing


@pytest.mark.parametrize(
    "wrong", [["self_attn"], {"(": [2, 16]}, {"a": [2]}, {"a": [2, 0]}, {"a": [2, True]}, {"a": "2"}]
)
def test_shapes_that_are_none_are_refused(wrong: Any) -> None:
    with pytest.raises(ConfigError, match="key_means"):
        HadaCoreConfig(key_means=wrong)


def test_a_checkpoint_in_full_precision_has_none(tmp_path: Path) -> None:
    save("llama", tmp_path / "src")
    with pytest.raises(ConfigError, match="key_means describes a quantized checkpoint"):
        load(tmp_path / "src", quantization_config=HadaCoreConfig(key_means={PATTERN: [2, 16]}))


def test_contradictions_name_the_tensor(checkpoint: Path, tmp_path: Path) -> None:
    change(checkpoint, tmp_path / "lacks")
    rewrite(tmp_path / "lacks", lambda tensors: tensors.pop("model.layers.1.self_attn.k_mean"))
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.k_mean: .*found no such tensor"):
        load(tmp_path / "lacks")
    other = change(checkpoint, tmp_path / "other", key_means={PATTERN: [4, 16]})
    with pytest.raises(
        CheckpointError, match=r"k_mean: expected floating point \[4, 16\], found .*\[2, 16\]"
    ):
        load(other)


def test_other_heads_than_those_of_the_keys_are_refused(checkpoint: Path) -> None:
    model = load(checkpoint, "hadacore")
    model.model.layers[0].self_attn.k_mean = torch.nn.Parameter(torch.zeros(1, 16), requires_grad=False)
    with pytest.raises(FormatError, match=r"k_mean of LlamaAttention: expected \[2, 16\] .* found \[1, 16\]"):
        model(token_ids())
