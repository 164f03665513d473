"""`hadacore export`: compressed-tensors reads the very weights that hadacore has."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import make_model, token_ids
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from hf_hadacore import HadaCoreConfig
from hf_hadacore.checkpoint import quantize_checkpoint
from hf_hadacore.exporting import export_checkpoint
from hf_hadacore.linear import HadaCoreLinear


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
