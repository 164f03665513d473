"""`hadacore export`: compressed-tensors reads the very weights that hadacore has."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from packed_checkpoints import gptq_tensors, random_grid, random_grids, write_packed
from safetensors.torch import load_file
from tiny_models import make_model, token_ids
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedModel
from typer.testing import CliRunner

from hf_hadacore import HadaCoreConfig
from hf_hadacore.cli import app
from hf_hadacore.errors import CheckpointError, UnsupportedError
from hf_hadacore.interchange.exporting import export_checkpoint
from hf_hadacore.interchange.importing import import_checkpoint
from hf_hadacore.modules.linear import HadaCoreLinear
from hf_hadacore.offline.checkpoint import quantize_checkpoint


def quantized(tmp_path: Path, config: HadaCoreConfig, name: str = "llama") -> Path:
    make_model(name).save_pretrained(tmp_path / "full")
    quantize_checkpoint(tmp_path / "full", tmp_path / "int4", config, progress=False)
    return tmp_path / "int4"


def export(src: Path, dst: Path) -> dict[str, Any]:
    return export_checkpoint(src, dst, progress=False)


def load(folder: Path, **options: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", **options).eval()


# 104 inputs of down_proj are a whole number of groups only for -1.
DIVIDING = {"mlp.down_proj": {"group_size": -1}}
RECIPES = {
    "symmetric": HadaCoreConfig(group_size=32, symmetric=True, overrides=DIVIDING),
    "asymmetric": HadaCoreConfig(group_size=64, overrides=DIVIDING),
    "channel": HadaCoreConfig(group_size=-1, symmetric=True),
    "mixed": HadaCoreConfig(
        group_size=32,
        symmetric=True,
        overrides={**DIVIDING, r"layers\.0.*q_proj": {"symmetric": False}, "v_proj": {"skip": True}},
    ),
    "head": HadaCoreConfig(group_size=32, symmetric=True, quantize_lm_head=True, overrides=DIVIDING),
}


def decompressed(folder: Path) -> dict[str, torch.Tensor]:
    """The linear weights of a checkpoint as the compressed-tensors library reads them, by its own config."""
    quantization = pytest.importorskip("compressed_tensors.quantization")
    base = pytest.importorskip("compressed_tensors.compressors.pack_quantized.base")
    recipe = json.loads((folder / "config.json").read_text()).pop("quantization_config")
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    quantization.apply_quantization_config(
        model, quantization.QuantizationConfig.model_validate(recipe), show_progress=False
    )
    stored = load_file(folder / "model.safetensors")
    found = {}
    for name, module in model.named_modules():
        own = {k.rpartition(".")[2]: t for k, t in stored.items() if k.rpartition(".")[0] == name}
        if getattr(module, "quantization_scheme", None) is not None:
            state = base.PackedQuantizationCompressor.decompress(own, module.quantization_scheme)
            found[name] = state["weight"]
        elif isinstance(module, torch.nn.Linear):
            found[name] = own["weight"]
    return found


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_library_reads_the_same_weights(recipe: str, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    src = quantized(tmp_path, RECIPES[recipe])
    report = export(src, tmp_path / "dst")
    ours = load(src)
    found = decompressed(tmp_path / "dst")
    assert len(report["layers"]) >= 12
    assert len(found) == 15
    for name, weight in found.items():
        module = ours.get_submodule(name)
        expected = module.dequantize() if isinstance(module, HadaCoreLinear) else module
        assert torch.equal(weight, expected.weight), name


@pytest.mark.transformers_versions
@pytest.mark.parametrize("recipe", ["symmetric", "channel", "head"])
def test_transformers_loads_the_same_model(recipe: str, tmp_path: Path) -> None:
    """Symmetric only: for zeros, transformers makes room of another shape than the library writes."""
    pytest.importorskip("compressed_tensors")
    src = quantized(tmp_path, RECIPES[recipe])
    export(src, tmp_path / "dst")
    theirs = load(tmp_path / "dst")
    reference = load(src, quantization_config=HadaCoreConfig(dequantize=True))
    with torch.no_grad():
        assert torch.equal(theirs(token_ids()).logits, reference(token_ids()).logits)


@pytest.mark.parametrize("recipe", RECIPES)
def test_import_undoes_export(recipe: str, tmp_path: Path) -> None:
    src = quantized(tmp_path, RECIPES[recipe])
    export(src, tmp_path / "exported")
    import_checkpoint(tmp_path / "exported", tmp_path / "again", progress=False)
    before, after = load_file(src / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.transformers_versions
def test_experts_become_a_layer_each(tmp_path: Path) -> None:
    """As Mixtral's own checkpoints name them; importing fuses the very same tensors."""
    src = quantized(
        tmp_path, HadaCoreConfig(group_size=32, overrides={"experts": {"group_size": -1}}), "mixtral"
    )
    report = export(src, tmp_path / "dst")
    stored = load_file(tmp_path / "dst" / "model.safetensors")
    full = load_file(tmp_path / "full" / "model.safetensors")
    names = {name.rpartition(".")[0] for name in stored if name.endswith("weight_packed")}
    assert names == {n.removesuffix(".weight") for n in full if "expert" in n or "_proj" in n}
    assert len(report["layers"]) == 12
    recipe = json.loads((tmp_path / "dst" / "config.json").read_text())["quantization_config"]
    gates = {n.removesuffix(".weight") for n in full if n.endswith("gate.weight")}
    assert set(recipe["ignore"]) == {"lm_head", *gates}
    import_checkpoint(tmp_path / "dst", tmp_path / "again", progress=False)
    before, after = load_file(src / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def imported(tmp_path: Path, order: torch.Tensor, group_size: int = 32) -> Path:
    """A checkpoint whose o_proj has an order of its own."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float16)
    grids = random_grids(model, group_size, symmetric=False, lowest_zero=1)
    layer = "model.layers.0.self_attn.o_proj"
    grids[layer] = random_grid(64, 64, group_size, symmetric=False, lowest_zero=1, act_order=order)
    recipe = {"quant_method": "gptq", "bits": 4, "group_size": group_size, "sym": False, "desc_act": True}
    write_packed(tmp_path / "src", model, grids, gptq_tensors, recipe)
    import_checkpoint(tmp_path / "src", tmp_path / "int4", progress=False)
    return tmp_path / "int4"


def test_groups_that_only_change_places_are_put_back(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    src = imported(tmp_path, torch.arange(64).roll(32))
    assert "model.layers.0.self_attn.o_proj.input_perm" in load_file(src / "model.safetensors")
    export(src, tmp_path / "dst")
    ours = load(src, dtype=torch.float16)
    for name, weight in decompressed(tmp_path / "dst").items():
        if name != "lm_head":
            assert torch.equal(weight, ours.get_submodule(name).dequantize().weight), name


def test_scattered_groups_are_refused(tmp_path: Path) -> None:
    src = imported(tmp_path, torch.randperm(64, generator=torch.Generator().manual_seed(0)))
    with pytest.raises(UnsupportedError, match=r"o_proj\.input_perm: act-order has scattered"):
        export(src, tmp_path / "dst")
    assert not (tmp_path / "dst").exists() and not (tmp_path / "dst.partial").exists()


def test_short_groups_are_refused(tmp_path: Path) -> None:
    src = quantized(tmp_path, HadaCoreConfig(group_size=32))
    with pytest.raises(UnsupportedError, match=r"down_proj.*groups of 32 do not divide 104 inputs"):
        export(src, tmp_path / "dst")
    assert not (tmp_path / "dst").exists() and not (tmp_path / "dst.partial").exists()


def test_fused_experts_without_a_layout_are_refused(tmp_path: Path) -> None:
    src = quantized(tmp_path, HadaCoreConfig(group_size=-1), "gpt-oss")
    with pytest.raises(UnsupportedError, match="no layout for these fused experts"):
        export(src, tmp_path / "dst")


def test_other_checkpoints_are_refused(tmp_path: Path) -> None:
    src = quantized(tmp_path, RECIPES["channel"])
    with pytest.raises(CheckpointError, match=r"full: is no hadacore checkpoint \(quant_method None\)"):
        export(tmp_path / "full", tmp_path / "dst")
    export(src, tmp_path / "dst")
    with pytest.raises(CheckpointError, match=r"quant_method 'compressed-tensors'"):
        export(tmp_path / "dst", tmp_path / "again")
    stored = src / "model.safetensors"
    stored.write_bytes(stored.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="truncated"):
        export(src, tmp_path / "again")


def test_command(tmp_path: Path) -> None:
    src = quantized(tmp_path, RECIPES["symmetric"])
    result = CliRunner().invoke(
        app, ["export", str(src), str(tmp_path / "dst"), "--format", "compressed-tensors"]
    )
    assert result.exit_code == 0, result.output
    assert "14 int4 weights" in result.stdout
    result = CliRunner().invoke(app, ["export", str(src), str(tmp_path / "other"), "--format", "gguf"])
    assert result.exit_code == 2 and "compressed-tensors" in result.stderr
