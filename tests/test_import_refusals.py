"""Packed checkpoints that are not imported: what has no place here, and what is damaged."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from import_cases import convert
from packed_checkpoints import AWQ, GPTQ, compressed, gptq_tensors, random_grid, random_grids, write_packed
from safetensors.torch import load_file, save_file
from tiny_models import make_model
from transformers import PreTrainedModel

from hf_hadacore.errors import CheckpointError, UnsupportedError

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


@pytest.fixture
def llama() -> PreTrainedModel:
    return make_model("llama", torch.float16)


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
