"""Offline quantization gives the bytes of loading and saving, and a true report."""

import json
from pathlib import Path

import pytest
import torch
from checkpoint_cases import digests, quantize, rewrite, stored
from other_models import OTHER_MODELS
from tiny_models import TINY_CONFIGS, make_model
from transformers import AutoModelForCausalLM

from hf_hadacore import HadaCoreConfig
from hf_hadacore.offline import checkpoint
from hf_hadacore.offline.layer_record import relative_error
from hf_hadacore.offline.streaming import SourceModel

RECIPES = {
    "default": HadaCoreConfig(),
    "head": HadaCoreConfig(group_size=64, quantize_lm_head=True),
    "mixed": HadaCoreConfig(
        group_size=32,
        symmetric=True,
        overrides={r"layers\.0": {"skip": True}, "o_proj": {"symmetric": False}},
    ),
}


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    make_model("llama-tied").save_pretrained(tmp_path / "tied")
    return tmp_path / "tied"


@pytest.mark.transformers_versions
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_equals_loading_and_saving(tmp_path: Path, name: str, recipe: str) -> None:
    make_model(name).save_pretrained(tmp_path / "src", max_shard_size="50KB")
    config = RECIPES[recipe]
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "src", quantization_config=config, device_map="cpu"
    )
    model.save_pretrained(tmp_path / "saved", max_shard_size="30KB")

    quantize(tmp_path / "src", tmp_path / "dst", config, max_shard_size="30KB")

    offline, saved = digests(tmp_path / "dst"), digests(tmp_path / "saved")
    assert len(saved) > 4
    del offline["quantization_report.json"]
    assert offline == saved


@pytest.mark.parametrize("name", OTHER_MODELS)
def test_other_architectures_equal_loading_and_saving(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    model = OTHER_MODELS[name]().to(torch.bfloat16)
    model.save_pretrained(tmp_path / "src", max_shard_size="100KB")
    loaded = type(model).from_pretrained(
        tmp_path / "src", quantization_config=HadaCoreConfig(), device_map="cpu"
    )
    loaded.save_pretrained(tmp_path / "saved")
    quantize(tmp_path / "src", tmp_path / "dst")
    offline, saved = digests(tmp_path / "dst"), digests(tmp_path / "saved")
    del offline["quantization_report.json"]
    assert offline == saved


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_dtype_is_that_of_loading(llama_dir: Path, tmp_path: Path, dtype: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        llama_dir, quantization_config=HadaCoreConfig(), dtype=dtype, device_map="cpu"
    )
    model.save_pretrained(tmp_path / "saved")
    quantize(llama_dir, tmp_path / "dst", dtype=dtype)
    offline, saved = digests(tmp_path / "dst"), digests(tmp_path / "saved")
    del offline["quantization_report.json"]
    assert offline == saved


@pytest.mark.transformers_versions
def test_result_loads_and_its_report_is_true(llama_dir: Path, tmp_path: Path) -> None:
    report = quantize(llama_dir, tmp_path / "dst", RECIPES["mixed"])
    assert report == json.loads((tmp_path / "dst" / "quantization_report.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dst", device_map="cpu")
    original = stored(llama_dir)
    layers = {layer["name"]: layer for layer in report["layers"]}
    assert len(layers) == 7
    for name, layer in layers.items():
        module = model.get_submodule(name.removesuffix(".weight"))
        weight = module.int4_weight()
        exact = original[name].float()
        error = float((weight.dequantize(torch.float32) - exact).norm() / exact.norm())
        assert layer["relative_error"] == pytest.approx(error, rel=1e-4)
        assert layer["shape"] == list(exact.shape)
        assert (layer["group_size"], layer["symmetric"]) == (module.group_size, module.weight_zero is None)
        stored_bytes = sum(t.numel() * t.element_size() for t in weight[:3] if t is not None)
        assert layer["bits_per_weight"] == pytest.approx(8 * stored_bytes / exact.numel(), abs=1e-3)
    kept = {entry["name"]: entry for entry in report["full_precision"]}
    assert kept["model.layers.0.mlp.down_proj.weight"]["reason"] == "skipped by an override"
    assert sum(entry["share"] for entry in kept.values()) == pytest.approx(
        1 - report["quantized_share"], abs=1e-4
    )
    assert report["quantized_bytes"] == (tmp_path / "dst" / "model.safetensors").stat().st_size
    assert set(report["versions"]) == {"hf_hadacore", "transformers", "torch", "safetensors"}
    assert report["quantization_config"]["group_size"] == 32
    assert str(tmp_path) not in json.dumps(report)


def test_relative_error_over_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_hadacore.solvers.rtn import quantize_weight

    value = torch.randn(3, 5, 40, generator=torch.Generator().manual_seed(0))
    weight = quantize_weight(value, group_size=32, symmetric=False)
    expected = float((weight.dequantize() - value).norm() / value.norm())
    assert relative_error(value, weight) == pytest.approx(expected, rel=1e-6)
    monkeypatch.setattr("hf_hadacore.offline.layer_record._ERROR_CHUNK_ELEMENTS", 80)
    assert relative_error(value, weight) == pytest.approx(expected, rel=1e-6)
    zeros = torch.zeros(2, 40)
    assert relative_error(zeros, quantize_weight(zeros, group_size=32, symmetric=True)) == 0


def test_copies_what_belongs_to_the_model_and_nothing_else(llama_dir: Path, tmp_path: Path) -> None:
    copied = ["tokenizer.json", "tokenizer.model", "merges.txt", "chat_template.jinja", "LICENSE"]
    left = ["pytorch_model.bin", "modeling_x.py", "README.md", "old.safetensors", "x.bin.index.json", "a.pkl"]
    for name in copied + left:
        (llama_dir / name).write_text(name)
    (llama_dir / "additional_chat_templates").mkdir()
    (llama_dir / "additional_chat_templates" / "tools.jinja").write_text("tools")
    quantize(llama_dir, tmp_path / "dst")
    names = set(digests(tmp_path / "dst"))
    assert names == {
        *copied,
        "additional_chat_templates/tools.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "quantization_report.json",
    }
    assert (tmp_path / "dst" / "generation_config.json").read_bytes() == (
        llama_dir / "generation_config.json"
    ).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dst", "llama"]


def test_tied_pair_stored_twice_is_written_once(tied: Path, tmp_path: Path) -> None:
    quantize(tied, tmp_path / "once")
    rewrite(
        tied, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    )
    quantize(tied, tmp_path / "dst")
    assert "lm_head.weight" not in stored(tmp_path / "dst")
    assert stored(tmp_path / "dst").keys() == stored(tmp_path / "once").keys()


def test_tied_pair_of_which_only_the_head_is_stored(tied: Path, tmp_path: Path) -> None:
    quantize(tied, tmp_path / "once")
    rewrite(
        tied, lambda tensors: tensors.update({"lm_head.weight": tensors.pop("model.embed_tokens.weight")})
    )
    quantize(tied, tmp_path / "dst")
    once, got = stored(tmp_path / "once"), stored(tmp_path / "dst")
    assert once.keys() == got.keys()
    assert torch.equal(once["model.embed_tokens.weight"], got["model.embed_tokens.weight"])


def test_tied_by_config_but_not_by_data_keeps_both_as_transformers_does(tied: Path, tmp_path: Path) -> None:
    rewrite(
        tied, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"] * 2})
    )
    model = AutoModelForCausalLM.from_pretrained(tied, quantization_config=HadaCoreConfig(), device_map="cpu")
    model.save_pretrained(tmp_path / "saved")
    quantize(tied, tmp_path / "dst")
    expected, got = stored(tmp_path / "saved"), stored(tmp_path / "dst")
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_tensors_without_a_place_are_reported(llama_dir: Path, tmp_path: Path) -> None:
    rewrite(llama_dir, lambda tensors: tensors.update({"model.mystery": torch.ones(3)}))
    report = quantize(llama_dir, tmp_path / "dst")
    assert report["unused_source_tensors"] == ["model.mystery"]


def test_nothing_stays_in_memory(llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    realise = SourceModel.realise
    units = 0

    def checked(self, unit):
        nonlocal units
        units += 1
        result = realise(self, unit)
        assert all(tensor.is_meta for tensor in self.model.state_dict().values())
        return result

    monkeypatch.setattr(SourceModel, "realise", checked)
    quantize(llama_dir, tmp_path / "dst")
    assert units == 21


def test_model_id(llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def download(model_id, **kwargs):
        asked.update(kwargs, model_id=model_id)
        return str(llama_dir)

    monkeypatch.setattr(checkpoint, "snapshot_download", download)
    report = quantize("org/model", tmp_path / "dst")
    assert report["source"] == asked["model_id"] == "org/model"
    assert "*.safetensors" in asked["allow_patterns"]
    assert not {"*", "*.py", "*.bin", "*.pt"} & set(asked["allow_patterns"])
