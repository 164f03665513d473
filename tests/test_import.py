"""`hadacore import`: what other libraries' checkpoints mean, bit for bit."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from import_cases import convert, load, mixtral_grids, weights
from packed_checkpoints import (
    AWQ,
    GPTQ,
    Grid,
    awq_tensors,
    compressed,
    compressed_tensors,
    gptq_tensors,
    random_grid,
    random_grids,
    write_packed,
)
from safetensors.torch import load_file
from tiny_models import make_model
from transformers import PreTrainedModel
from typer.testing import CliRunner

from hf_hadacore.cli import app
from hf_hadacore.errors import CheckpointError
from hf_hadacore.interchange.importing import import_checkpoint
from hf_hadacore.interchange.packed_source import PackedSource


def gptqmodel_tensors(grid: Grid) -> dict[str, torch.Tensor]:
    """Version 1 as GPTQModel makes it of version 2: 1 is subtracted from whole words."""
    tensors = gptq_tensors(grid, version=2)
    return {**tensors, "qzeros": tensors["qzeros"] - 0x11111111}


@pytest.fixture
def llama() -> PreTrainedModel:
    return make_model("llama", torch.float16)


FORMATS: dict[str, tuple[Callable[[Grid], dict[str, torch.Tensor]], dict[str, Any], bool]] = {
    "gptq-v1": (gptq_tensors, GPTQ, True),
    "gptq-v2": (lambda grid: gptq_tensors(grid, version=2), {**GPTQ, "checkpoint_format": "gptq_v2"}, True),
    "gptq-asymmetric": (gptq_tensors, {**GPTQ, "sym": False, "checkpoint_format": "gptq"}, False),
    "gptq-by-gptqmodel": (
        gptqmodel_tensors,
        {**GPTQ, "sym": False, "meta": {"quantizer": ["gptqmodel:5.0"]}},
        False,
    ),
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
    lowest = 1 if name == "gptq-asymmetric" else 0
    grids = random_grids(llama, -1 if "channel" in name else 32, symmetric=symmetric, lowest_zero=lowest)
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
def test_experts_are_fused(symmetric: bool, tmp_path: Path) -> None:
    model = make_model("mixtral", torch.float16)
    grids = mixtral_grids(model, tmp_path, symmetric=symmetric)
    recipe = {**AWQ, "zero_point": not symmetric, "modules_to_not_convert": ["gate"]}
    plain = write_packed(tmp_path / "src", model, grids, awq_tensors, recipe)
    convert(tmp_path / "src", tmp_path / "dst")
    experts = load(tmp_path / "dst", dtype=torch.float16).model.layers[1].mlp.experts
    at = "model.layers.1.block_sparse_moe.experts"
    for expert in range(4):
        gate_up = torch.cat([plain[f"{at}.{expert}.{part}.weight"] for part in ("w1", "w3")])
        assert torch.equal(experts.int4_weight("gate_up_proj", expert).dequantize(), gate_up)
        down = plain[f"{at}.{expert}.w2.weight"]
        assert torch.equal(experts.int4_weight("down_proj", expert).dequantize(), down)


def test_what_is_packed_decides_what_becomes_int4(llama: PreTrainedModel, tmp_path: Path) -> None:
    """A head that is packed, layers that are not, groups of several sizes."""
    grids = random_grids(llama, 32, symmetric=True)
    del grids["model.layers.1.self_attn.q_proj"]
    grids["lm_head"] = random_grid(96, 64, 64, symmetric=False)
    recipe = compressed(32, symmetric=True)
    recipe["config_groups"]["group_1"] = compressed(64, symmetric=False)["config_groups"]["group_0"]
    recipe["ignore"] = ["model.layers.1.self_attn.q_proj"]

    def tensors_of(grid: Grid) -> dict[str, torch.Tensor]:
        return compressed_tensors(grid, symmetric=grid is not grids["lm_head"])

    plain = write_packed(tmp_path / "src", llama, grids, tensors_of, recipe)
    report = convert(tmp_path / "src", tmp_path / "dst")
    assert report["quantization_config"]["overrides"] == {
        r"^model\.layers\.1\.self_attn\.q_proj$": {"skip": True},
        "^lm_head$": {"skip": False, "group_size": 64, "symmetric": False},
    }
    found = weights(tmp_path / "dst")
    assert found.keys() == {f"{layer}.weight" for layer in grids}
    assert all(torch.equal(weight, plain[name]) for name, weight in found.items())


def test_a_config_of_autogptq_alone(llama: PreTrainedModel, tmp_path: Path) -> None:
    grids = random_grids(llama, 32, symmetric=True)
    write_packed(tmp_path / "src", llama, grids, gptq_tensors, GPTQ)
    config = json.loads((tmp_path / "src" / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "src" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="is in full precision; quantize it"):
        convert(tmp_path / "src", tmp_path / "dst")
    (tmp_path / "src" / "quantize_config.json").write_text(
        json.dumps({"bits": 4, "group_size": 32, "sym": True})
    )
    assert convert(tmp_path / "src", tmp_path / "dst")["imported_from"] == "gptq (v1)"


def test_an_interrupted_run_is_resumed(
    llama: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grids = random_grids(llama, 32, symmetric=True, act_order=True)
    write_packed(tmp_path / "src", llama, grids, gptq_tensors, {**GPTQ, "desc_act": True})
    convert(tmp_path / "src", tmp_path / "whole")
    realise, done = PackedSource.realise, []

    def dying(self: PackedSource, unit: Any) -> Any:
        if len(done) == 7:
            raise KeyboardInterrupt
        done.append(unit)
        return realise(self, unit)

    with monkeypatch.context() as patch:
        patch.setattr(PackedSource, "realise", dying)
        with pytest.raises(KeyboardInterrupt):
            convert(tmp_path / "src", tmp_path / "dst")
    assert not (tmp_path / "dst").exists()
    with pytest.raises(CheckpointError, match="cannot resume"):
        import_checkpoint(
            tmp_path / "src", tmp_path / "dst", tensor_parallel=True, resume=True, progress=False
        )
    import_checkpoint(tmp_path / "src", tmp_path / "dst", resume=True, progress=False)
    files = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "dst").iterdir())
    for name in files:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "dst" / name).read_bytes()


def test_command(llama: PreTrainedModel, tmp_path: Path) -> None:
    grids = random_grids(llama, 32, symmetric=True, act_order=True)
    write_packed(tmp_path / "src", llama, grids, gptq_tensors, {**GPTQ, "desc_act": True})
    result = CliRunner().invoke(app, ["import", str(tmp_path / "src"), str(tmp_path / "dst")])
    assert result.exit_code == 0, result.output
    assert "14 int4 weights" in result.stdout
    assert "o_proj" in result.stderr and "--tensor-parallel" in result.stderr
    result = CliRunner().invoke(app, ["import", str(tmp_path / "dst"), str(tmp_path / "again")])
    assert result.exit_code == 1
    assert "is a hadacore checkpoint already" in result.stderr
    result = CliRunner().invoke(app, ["import", str(tmp_path / "src"), str(tmp_path / "dst")])
    assert result.exit_code == 1 and "exists already" in result.stderr
