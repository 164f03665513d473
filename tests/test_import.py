"""`hadacore import`: what other libraries' checkpoints mean, bit for bit, and which of them are refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from packed_checkpoints import (
    Grid,
    awq_tensors,
    compressed_tensors,
    gptq_tensors,
    random_grid,
    random_grids,
    write_packed,
)
from safetensors.torch import load_file
from tiny_models import make_model, token_ids
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_hadacore.importing import import_checkpoint

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}


def compressed(group_size: int, *, symmetric: bool, **more: Any) -> dict[str, Any]:
    strategy = (
        {"strategy": "channel"} if group_size == -1 else {"strategy": "group", "group_size": group_size}
    )
    weights = {"num_bits": 4, "type": "int", "symmetric": symmetric, **strategy, **more}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }


def convert(src: Path, dst: Path) -> dict[str, Any]:
    return import_checkpoint(src, dst, progress=False)


def load(folder: Path, **options: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", **options)


def restored(folder: Path) -> dict[str, torch.Tensor]:
    return load(folder, dequantize_config=None).state_dict()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The weights that an imported checkpoint stands for, as it stores them: in fp16, columns in order."""
    model = load(folder, dtype=torch.float16)
    return {
        f"{name}.weight": module.dequantize(torch.float16).weight.detach()
        for name, module in model.named_modules()
        if hasattr(module, "int4_weight")
    }


@pytest.fixture
def llama() -> PreTrainedModel:
    return make_model("llama", torch.float16)


FORMATS: dict[str, tuple[Callable[[Grid], dict[str, torch.Tensor]], dict[str, Any], bool]] = {
    "gptq-v1": (gptq_tensors, GPTQ, True),
    "gptq-v2": (lambda grid: gptq_tensors(grid, version=2), {**GPTQ, "checkpoint_format": "gptq_v2"}, True),
    "gptq-asymmetric": (gptq_tensors, {**GPTQ, "sym": False, "checkpoint_format": "gptq"}, False),
    "gptq-without-g_idx": (lambda grid: gptq_tensors(grid, g_idx=False), GPTQ, True),
    "awq": (awq_tensors, AWQ, False),
    "awq-symmetric": (awq_tensors, {**AWQ, "zero_point": False, "version": "GEMM"}, True),
    "compressed-tensors": (
        lambda grid: compressed_tensors(grid, symmetric=True),
        compressed(32, symmetric=True),
        True,
    ),
    "compressed-tensors-asymmetric": (
        lambda grid: compressed_tensors(grid, symmetric=False),
        compressed(32, symmetric=False),
        False,
    ),
    "compressed-tensors-channel": (
        lambda grid: compressed_tensors(grid, symmetric=True),
        compressed(-1, symmetric=True),
        True,
    ),
}


@pytest.mark.transformers_versions
@pytest.mark.parametrize("name", FORMATS)
def test_weights_are_those_of_the_source(name: str, llama: PreTrainedModel, tmp_path: Path) -> None:
    tensors_of, recipe, symmetric = FORMATS[name]
    grids = random_grids(llama, -1 if name.endswith("channel") else 32, symmetric=symmetric)
    expected = write_packed(tmp_path / "src", llama, grids, tensors_of, recipe)
    report = convert(tmp_path / "src", tmp_path / "dst")
    assert len(report["layers"]) == len(grids) == 14
    found = weights(tmp_path / "dst")
    assert found.keys() == {f"{layer}.weight" for layer in grids}
    for layer, weight in found.items():
        assert torch.equal(weight, expected[layer]), layer
    stored = load_file(tmp_path / "dst" / "model.safetensors")
    assert ("model.layers.0.mlp.down_proj.weight_zero" in stored) != symmetric
    assert not any(name.endswith("input_perm") for name in stored)


def test_compressed_tensors_dequantizes_alike(llama: PreTrainedModel, tmp_path: Path) -> None:
    base = pytest.importorskip("compressed_tensors.compressors.pack_quantized.base")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    for symmetric, group_size in ((True, 32), (False, 32), (True, -1), (False, -1)):
        grid = random_grid(24, 64, group_size, symmetric=symmetric, dtype=torch.bfloat16)
        recipe = compressed(group_size, symmetric=symmetric)
        scheme = quantization.QuantizationScheme.model_validate(recipe["config_groups"]["group_0"])
        state = base.PackedQuantizationCompressor.decompress(
            compressed_tensors(grid, symmetric=symmetric), scheme
        )
        assert torch.equal(state["weight"], grid.dequantize())


def test_autoawq_layout_is_what_compressed_tensors_reads() -> None:
    autoawq = pytest.importorskip("compressed_tensors.entrypoints.convert.converters.autoawq")
    grid = random_grid(24, 64, 32, symmetric=False)
    tensors = {f"layer.{suffix}": tensor for suffix, tensor in awq_tensors(grid).items()}
    found = autoawq.AutoAWQConverter(group_size=32).process(tensors)
    for suffix, tensor in compressed_tensors(grid, symmetric=False).items():
        assert torch.equal(found[f"layer.{suffix}"], tensor), suffix


@pytest.mark.transformers_versions
@pytest.mark.parametrize("symmetric", [True, False])
def test_act_order(symmetric: bool, tmp_path: Path) -> None:
    """down_proj's order is baked into gate_proj and up_proj; other orders are stored; nothing changes."""
    model = make_model("llama", torch.float16)
    # Before g_idx says so, a group has as many inputs as the others: 104 inputs have a short one.
    grids = random_grids(model, 32, symmetric=symmetric, act_order=True)
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


def check_logits(folder: Path, plain: dict[str, torch.Tensor], grids: dict[str, Grid]) -> None:
    """The imported model computes what the full-precision model with the source's weights does."""
    imported = load(folder, dtype=torch.float32)
    reference = AutoModelForCausalLM.from_config(imported.config, dtype=torch.float32).eval()
    exact = {f"{layer}.weight": grid.dequantize(torch.float32) for layer, grid in grids.items()}
    reference.load_state_dict({name: tensor.float() for name, tensor in {**plain, **exact}.items()})
    with torch.no_grad():
        expected = reference(token_ids()).logits
        torch.testing.assert_close(imported(token_ids()).logits, expected, rtol=1e-5, atol=1e-6)
