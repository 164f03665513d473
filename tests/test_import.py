"""`hadacore import`: what other libraries' checkpoints mean, bit for bit, and which of them are refused."""

import json
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
from safetensors.torch import load_file, save_file
from tiny_models import make_model, token_ids
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel
from typer.testing import CliRunner

from hf_hadacore.cli import app
from hf_hadacore.errors import CheckpointError, UnsupportedError
from hf_hadacore.interchange.importing import import_checkpoint
from hf_hadacore.interchange.packed_source import PackedSource

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


def gptqmodel_tensors(grid: Grid) -> dict[str, torch.Tensor]:
    """Version 1 as GPTQModel makes it of version 2: 1 is subtracted from whole words."""
    tensors = gptq_tensors(grid, version=2)
    return {**tensors, "qzeros": tensors["qzeros"] - 0x11111111}


def load(folder: Path, **options: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", **options)


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


def check_logits(folder: Path, plain: dict[str, torch.Tensor], grids: dict[str, Grid]) -> None:
    """The imported model computes what the full-precision model with the source's weights does."""
    imported = load(folder, dtype=torch.float32)
    reference = AutoModelForCausalLM.from_config(imported.config, dtype=torch.float32).eval()
    exact = {f"{layer}.weight": grid.dequantize(torch.float32) for layer, grid in grids.items()}
    reference.load_state_dict({name: tensor.float() for name, tensor in {**plain, **exact}.items()})
    with torch.no_grad():
        expected = reference(token_ids()).logits
        torch.testing.assert_close(imported(token_ids()).logits, expected, rtol=1e-5, atol=1e-6)


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


MIXTRAL_EXPERTS = [f"model.layers.{layer}.block_sparse_moe.experts.{e}" for layer in (0, 1) for e in range(4)]


def mixtral_grids(model: PreTrainedModel, tmp_path: Path, **options: Any) -> dict[str, Grid]:
    """Grids of the attention's layers and of all experts, named as in Mixtral's checkpoints."""
    model.save_pretrained(tmp_path / "names")
    stored = load_file(tmp_path / "names" / "model.safetensors")
    names = [n.removesuffix(".weight") for n in stored if "experts" in n or "self_attn" in n]
    return {name: random_grid(*stored[f"{name}.weight"].shape, 32, **options) for name in names}


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


def test_experts_with_act_order_are_refused(tmp_path: Path) -> None:
    model = make_model("mixtral", torch.float16)
    grids = mixtral_grids(model, tmp_path, symmetric=True)
    name = next(name for name in grids if name.endswith("experts.2.w1"))
    grids[name] = random_grid(*grids[name].q.shape, 32, symmetric=True, act_order=torch.randperm(64))
    write_packed(tmp_path / "src", model, grids, gptq_tensors, {**GPTQ, "desc_act": True})
    with pytest.raises(UnsupportedError, match=rf"{name}: act-order in one of the parts of model"):
        convert(tmp_path / "src", tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


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


# Refusals


REFUSED = {
    "bits": ({**GPTQ, "bits": 8}, "weights of 8 bits are not imported"),
    "group size": ({**GPTQ, "group_size": 16}, "group_size 16 are not imported"),
    "marlin": ({**GPTQ, "checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
    "old marlin": ({**GPTQ, "is_marlin_format": True}, "checkpoint_format 'marlin'"),
    "dynamic": ({**GPTQ, "dynamic": {"+:.*down.*": {"bits": 8}}}, r"dynamic\['\+:"),
    "words": ({**GPTQ, "pack_dtype": "int16"}, "packed in 'int16'"),
    "gemv": ({**AWQ, "version": "gemv"}, "version 'gemv'"),
    "exllama": ({**AWQ, "version": "exllama"}, "version 'exllama'"),
    "awq bits": ({**AWQ, "bits": None}, "weights of None bits"),
    "method": ({"quant_method": "bitsandbytes"}, "quant_method 'bitsandbytes'"),
    "no method": ({"bits": 4}, "quant_method None"),
    "activations": (
        {
            **(c := compressed(32, symmetric=True)),
            "config_groups": {"a": {**c["config_groups"]["group_0"], "input_activations": {"num_bits": 8}}},
        },
        "'a'.* quantizes activations",
    ),
    "float": (compressed(32, symmetric=True, type="float"), "type 'float' is not imported"),
    "8 bits": (compressed(32, symmetric=True, num_bits=8), "weights of 8 bits"),
    "tensor": (compressed(32, symmetric=True, strategy="tensor"), "strategy 'tensor'"),
    "format": ({**compressed(32, symmetric=True), "format": "int-quantized"}, "format 'int-quantized'"),
    "cache": ({**compressed(32, symmetric=True), "kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
    "sparse": ({**compressed(32, symmetric=True), "sparsity_config": {"format": "sparse-24"}}, "sparse-24"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_place_here_is_named(name: str, llama: PreTrainedModel, tmp_path: Path) -> None:
    recipe, says = REFUSED[name]
    write_packed(tmp_path / "src", llama, random_grids(llama, 32, symmetric=True), gptq_tensors, recipe)
    with pytest.raises(UnsupportedError, match=says):
        convert(tmp_path / "src", tmp_path / "dst")
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def test_a_packed_head_that_is_tied_is_refused(tmp_path: Path) -> None:
    model = make_model("llama-tied", torch.float16)
    src = tmp_path / "src"
    write_packed(src, model, random_grids(model, 32, symmetric=True), gptq_tensors, GPTQ)
    stored = load_file(src / "model.safetensors")
    head = gptq_tensors(random_grid(96, 64, 32, symmetric=True))
    stored.update({f"lm_head.{suffix}": tensor for suffix, tensor in head.items()})
    save_file(stored, src / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedError, match="lm_head is packed, but cannot be int4 here: tied"):
        convert(src, tmp_path / "dst")


DOWN = "model.layers.1.mlp.down_proj"


def damage_zeros(stored: dict[str, torch.Tensor]) -> None:
    stored[f"{DOWN}.qzeros"][0, 0] += 1


def damage_groups(stored: dict[str, torch.Tensor]) -> None:
    stored[f"{DOWN}.g_idx"][5] = 3


def damage_scales(stored: dict[str, torch.Tensor]) -> None:
    stored[f"{DOWN}.scales"][1, 2] = float("nan")


def all_ones(stored: dict[str, torch.Tensor]) -> None:
    stored[f"{DOWN}.qzeros"][1, 1] = -1


def lose_scales(stored: dict[str, torch.Tensor]) -> None:
    del stored[f"{DOWN}.scales"]


def shorten(stored: dict[str, torch.Tensor]) -> None:
    stored[f"{DOWN}.qweight"] = stored[f"{DOWN}.qweight"][:, :-1].contiguous()


def change_words(stored: dict[str, torch.Tensor]) -> None:
    stored[f"{DOWN}.qweight"] = stored[f"{DOWN}.qweight"].to(torch.int16)


def lose_layer(stored: dict[str, torch.Tensor]) -> None:
    for suffix in ("qweight", "qzeros", "scales", "g_idx"):
        del stored[f"{DOWN}.{suffix}"]


def add_bias(stored: dict[str, torch.Tensor]) -> None:
    stored[f"{DOWN}.bias"] = torch.ones(64)


def add_layer(stored: dict[str, torch.Tensor]) -> None:
    for suffix in ("qweight", "qzeros", "scales"):
        stored[f"model.layers.1.mlp.extra.{suffix}"] = stored[f"{DOWN}.{suffix}"].clone()


def rename_all(stored: dict[str, torch.Tensor]) -> None:
    for name in [name for name in stored if name.endswith("qweight")]:
        stored[name.replace("qweight", "B")] = stored.pop(name)


DAMAGED = {
    damage_zeros: rf"{DOWN}\.qzeros: expected 8 everywhere, .* symmetric, found 9",
    damage_groups: rf"{DOWN}\.g_idx: expected 32 inputs in each group",
    damage_scales: rf"{DOWN}\.scales holds NaN",
    all_ones: rf"{DOWN}\.qzeros: a zero point of 0 was stored as -1",
    lose_scales: rf"{DOWN}\.scales: expected floating point \[4, 64\], found no such tensor",
    shorten: rf"{DOWN}\.qzeros: expected int32 \[4, 7\], found int32 \[4, 8\]",
    change_words: rf"{DOWN}\.qweight: expected int32 with two dimensions, found torch.int16",
    lose_layer: rf"lacks '{DOWN}\.weight'",
    add_bias: rf"{DOWN}\.bias is not zero, but the model has no bias there",
    add_layer: r"mlp\.extra is packed, but the model has no such layer",
    rename_all: r"says gptq \(v1\), but no tensor is called \*\.qweight",
}


@pytest.mark.parametrize("damage", DAMAGED, ids=lambda damage: damage.__name__)
def test_damage_is_found_before_anything_is_written(
    damage: Callable[[dict[str, torch.Tensor]], None], llama: PreTrainedModel, tmp_path: Path
) -> None:
    write_packed(tmp_path / "src", llama, random_grids(llama, 32, symmetric=True), gptq_tensors, GPTQ)
    stored = load_file(tmp_path / "src" / "model.safetensors")
    damage(stored)
    save_file(stored, tmp_path / "src" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=DAMAGED[damage]):
        convert(tmp_path / "src", tmp_path / "dst")
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def test_biases_of_zeros_that_autogptq_adds_may_go(llama: PreTrainedModel, tmp_path: Path) -> None:
    write_packed(tmp_path / "src", llama, random_grids(llama, 32, symmetric=True), gptq_tensors, GPTQ)
    stored = load_file(tmp_path / "src" / "model.safetensors")
    stored[f"{DOWN}.bias"] = torch.zeros(64)
    save_file(stored, tmp_path / "src" / "model.safetensors", metadata={"format": "pt"})
    assert convert(tmp_path / "src", tmp_path / "dst")["unused_source_tensors"] == [f"{DOWN}.bias"]


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
