"""Placement: CPU and disk offload, and the memory it is planned with."""

import pytest
import torch
from tiny_models import make_model, token_ids
from transformers import AutoModelForCausalLM

from hf_hadacore import HadaCoreConfig, HadaCoreLinear
from hf_hadacore.errors import ConfigError, UnsupportedError

pytestmark = pytest.mark.transformers_versions

ON_DISK = {
    "model.embed_tokens": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "disk",
}


@pytest.fixture(params=["llama", "mixtral"])
def folders(request, tmp_path):
    make_model(request.param).save_pretrained(tmp_path / "source")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "source", quantization_config=HadaCoreConfig())
    model.save_pretrained(tmp_path / "int4")
    return tmp_path


def logits(model):
    with torch.no_grad():
        return model(token_ids()).logits


def test_prequantized_with_modules_on_disk(folders):
    expected = logits(AutoModelForCausalLM.from_pretrained(folders / "int4"))
    model = AutoModelForCausalLM.from_pretrained(
        folders / "int4", device_map=ON_DISK, offload_folder=folders / "offload"
    )
    assert model.model.layers[1].self_attn.q_proj.weight.is_meta
    for _ in range(2):
        assert torch.equal(logits(model), expected)
    for module in model.model.layers[1].modules():
        if isinstance(module, HadaCoreLinear):
            assert module.weight.is_meta and module._cpu_weight is None


def test_device_map_auto_within_a_small_memory(folders):
    expected = logits(AutoModelForCausalLM.from_pretrained(folders / "int4"))
    model = AutoModelForCausalLM.from_pretrained(
        folders / "int4",
        device_map="auto",
        max_memory={"cpu": 60_000},
        offload_folder=folders / "offload",
    )
    assert "disk" in model.hf_device_map.values()
    assert torch.equal(logits(model), expected)


def test_on_the_fly_with_modules_on_disk_is_refused(folders):
    with pytest.raises(ConfigError, match="quantize offline first"):
        AutoModelForCausalLM.from_pretrained(
            folders / "source",
            quantization_config=HadaCoreConfig(),
            device_map=ON_DISK,
            offload_folder=folders / "offload",
        )


def test_dequantize_with_modules_on_disk_is_refused(folders):
    with pytest.raises(ConfigError, match="dequantize=True cannot be combined"):
        AutoModelForCausalLM.from_pretrained(
            folders / "int4",
            quantization_config=HadaCoreConfig(dequantize=True),
            device_map=ON_DISK,
            offload_folder=folders / "offload",
        )
    model = AutoModelForCausalLM.from_pretrained(
        folders / "int4", device_map=ON_DISK, offload_folder=folders / "offload"
    )
    with pytest.raises(UnsupportedError, match="is offloaded"):
        model.dequantize()
