"""Imported act-order checkpoints: orders are baked into producers where they can be, and nothing changes."""

from pathlib import Path

import pytest
import torch
from import_cases import check_logits, convert, mixtral_grids, weights
from packed_checkpoints import GPTQ, gptq_tensors, random_grid, random_grids, write_packed
from safetensors.torch import load_file
from tiny_models import make_model
from transformers import AutoModelForCausalLM, LlamaConfig

from hf_hadacore.errors import UnsupportedError
from hf_hadacore.interchange.importing import import_checkpoint


@pytest.mark.transformers_versions
@pytest.mark.parametrize("symmetric", [True, False])
def test_act_order(symmetric: bool, tmp_path: Path) -> None:
    """down_proj's order is baked into gate_proj and up_proj; other orders are stored; nothing changes."""
    model = make_model("llama", torch.float16)
    # Before g_idx says so, a group has as many inputs as the others: 104 inputs have a short one.
    grids = random_grids(model, 32, symmetric=symmetric, act_order=True, lowest_zero=1)
    recipe = {**GPTQ, "sym": symmetric, "desc_act": True}
    plain = write_packed(tmp_path / "src", model, grids, gptq_tensors, recipe)
    report = convert(tmp_path / "src", tmp_path / "dst")
    assert report["quantization_config"]["act_order"] == "permuted"
    assert report["act_order"] == {
        "baked": [r"^model\.layers\.\d+\.mlp\.down_proj$"],
        "input_perm": [
            r"^model\.layers\.\d+\.mlp\.gate_proj$",
            r"^model\.layers\.\d+\.mlp\.up_proj$",
            r"^model\.layers\.\d+\.self_attn\.k_proj$",
            r"^model\.layers\.\d+\.self_attn\.o_proj$",
            r"^model\.layers\.\d+\.self_attn\.q_proj$",
            r"^model\.layers\.\d+\.self_attn\.v_proj$",
        ],
        "not_row_parallel": [r"^model\.layers\.\d+\.self_attn\.o_proj$"],
        "dequantized": [],
    }
    stored = load_file(tmp_path / "dst" / "model.safetensors")
    for layer in (0, 1):
        at = f"model.layers.{layer}"
        assert f"{at}.mlp.down_proj.input_perm" not in stored
        for one, other in (("self_attn.q_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
            assert torch.equal(stored[f"{at}.{one}.input_perm"], stored[f"{at}.{other}.input_perm"])
    found = weights(tmp_path / "dst")
    for name, weight in found.items():
        order = torch.argsort(
            grids[name.replace("gate", "down").replace("up_proj", "down_proj")[:-7]].group_of, stable=True
        )
        if "down_proj" in name:
            assert torch.equal(weight, plain[name][:, order])
        elif "gate_proj" in name or "up_proj" in name:
            assert torch.equal(weight, plain[name][order])
        else:
            assert torch.equal(weight, plain[name])
    check_logits(tmp_path / "dst", plain, grids)


def test_for_tensor_parallelism_o_proj_keeps_its_weights_in_full_precision(tmp_path: Path) -> None:
    model = make_model("llama", torch.float16)
    grids = random_grids(model, 32, symmetric=True, act_order=True)
    plain = write_packed(tmp_path / "src", model, grids, gptq_tensors, {**GPTQ, "desc_act": True})
    report = import_checkpoint(tmp_path / "src", tmp_path / "dst", tensor_parallel=True, progress=False)
    assert report["act_order"]["dequantized"] == [r"^model\.layers\.\d+\.self_attn\.o_proj$"]
    assert report["act_order"]["not_row_parallel"] == []
    assert len(report["layers"]) == 12
    stored = load_file(tmp_path / "dst" / "model.safetensors")
    for layer in (0, 1):
        name = f"model.layers.{layer}.self_attn.o_proj.weight"
        assert torch.equal(stored[name], plain[name])
    check_logits(tmp_path / "dst", plain, {n: g for n, g in grids.items() if "o_proj" not in n})


def test_order_within_heads_is_baked_into_v_proj(tmp_path: Path) -> None:
    """Groups of a head's channels that all query heads of a KV head share need nothing at run time either."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(vocab_size=96, num_hidden_layers=1, **sizes), dtype=torch.float16
    )
    within = torch.cat(
        [
            torch.randperm(64).repeat(2) + 64 * torch.tensor([0, 1]).repeat_interleave(64) + start
            for start in (0, 128)
        ]
    )
    layer = "model.layers.0.self_attn.o_proj"
    grids = random_grids(model, 32, symmetric=True)
    grids[layer] = random_grid(256, 256, 32, symmetric=True, act_order=within)
    plain = write_packed(tmp_path / "src", model, grids, gptq_tensors, {**GPTQ, "desc_act": True})
    report = convert(tmp_path / "src", tmp_path / "dst")
    assert report["act_order"]["baked"] == [r"^model\.layers\.\d+\.self_attn\.o_proj$"]
    assert report["act_order"]["input_perm"] == report["act_order"]["not_row_parallel"] == []
    order = torch.argsort(grids[layer].group_of, stable=True)
    assert not torch.equal(order, torch.arange(256))
    assert torch.equal(weights(tmp_path / "dst")[f"{layer}.weight"], plain[f"{layer}.weight"][:, order])
    check_logits(tmp_path / "dst", plain, grids)


def test_biases_go_with_their_rows(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        mlp_bias=True,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float16)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data.normal_(1, 0.5)
    grids = random_grids(model, 32, symmetric=False, act_order=True, lowest_zero=1)
    # A layer that was left in full precision delivers its outputs in another order, too.
    del grids["model.layers.0.mlp.up_proj"]
    recipe = {**GPTQ, "sym": False, "desc_act": True}
    plain = write_packed(tmp_path / "src", model, grids, gptq_tensors, recipe)
    report = convert(tmp_path / "src", tmp_path / "dst")
    assert report["act_order"]["baked"] == [r"^model\.layers\.\d+\.mlp\.down_proj$"]
    assert "model.layers.0.mlp.up_proj.weight" in {entry["name"] for entry in report["full_precision"]}
    check_logits(tmp_path / "dst", plain, grids)


def test_experts_with_act_order_are_refused(tmp_path: Path) -> None:
    model = make_model("mixtral", torch.float16)
    grids = mixtral_grids(model, tmp_path, symmetric=True)
    name = next(name for name in grids if name.endswith("experts.2.w1"))
    grids[name] = random_grid(*grids[name].q.shape, 32, symmetric=True, act_order=torch.randperm(64))
    write_packed(tmp_path / "src", model, grids, gptq_tensors, {**GPTQ, "desc_act": True})
    with pytest.raises(UnsupportedError, match=rf"{name}: act-order in one of the parts of model"):
        convert(tmp_path / "src", tmp_path / "dst")
    assert not (tmp_path / "dst").exists()
