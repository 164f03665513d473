"""Importing packed checkpoints in tests, and looking at what came of it."""

from pathlib import Path
from typing import Any

import torch
from packed_checkpoints import Grid, random_grid
from safetensors.torch import load_file
from tiny_models import token_ids
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_hadacore.interchange.importing import import_checkpoint


def convert(src: Path, dst: Path) -> dict[str, Any]:
    return import_checkpoint(src, dst, progress=False)


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


def check_logits(folder: Path, plain: dict[str, torch.Tensor], grids: dict[str, Grid]) -> None:
    """The imported model computes what the full-precision model with the source's weights does."""
    imported = load(folder, dtype=torch.float32)
    reference = AutoModelForCausalLM.from_config(imported.config, dtype=torch.float32).eval()
    exact = {f"{layer}.weight": grid.dequantize(torch.float32) for layer, grid in grids.items()}
    reference.load_state_dict({name: tensor.float() for name, tensor in {**plain, **exact}.items()})
    with torch.no_grad():
        expected = reference(token_ids()).logits
        torch.testing.assert_close(imported(token_ids()).logits, expected, rtol=1e-5, atol=1e-6)


def mixtral_grids(model: PreTrainedModel, tmp_path: Path, **options: Any) -> dict[str, Grid]:
    """Grids of the attention's layers and of all experts, named as in Mixtral's checkpoints."""
    model.save_pretrained(tmp_path / "names")
    stored = load_file(tmp_path / "names" / "model.safetensors")
    names = [n.removesuffix(".weight") for n in stored if "experts" in n or "self_attn" in n]
    return {name: random_grid(*stored[f"{name}.weight"].shape, 32, **options) for name in names}
