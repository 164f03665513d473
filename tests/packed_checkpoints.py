"""Checkpoints as GPTQ, AWQ and compressed-tensors write them, made of random integers, and what they mean.

Written from the formats' definitions, a nibble at a time, so that the conversion under test shares nothing
with them.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from checkpoint_cases import change_config
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
# What `config.json` says of them.
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


class Grid(NamedTuple):
    """A random weight: integers ``[N, K]``, zeros and scales ``[N, G]``, group of each input ``[K]``."""

    q: torch.Tensor
    zero: torch.Tensor
    scale: torch.Tensor
    group_of: torch.Tensor

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """``[N, K]``; by default in the scales' dtype, in which the product is rounded once."""
        centred = self.q - self.zero[:, self.group_of]
        scale = self.scale[:, self.group_of].to(dtype or self.scale.dtype)
        return centred.to(scale.dtype) * scale


def random_grid(
    rows: int,
    columns: int,
    group_size: int,
    *,
    symmetric: bool,
    act_order: torch.Tensor | None = None,
    lowest_zero: int = 0,
    dtype: torch.dtype = torch.float16,
) -> Grid:
    size = columns if group_size == -1 else group_size
    groups = -(-columns // size)
    group_of = torch.arange(columns) // size
    if act_order is not None:
        group_of = torch.empty_like(group_of).index_copy_(0, act_order, group_of)
    zero = torch.full((rows, groups), 8) if symmetric else torch.randint(lowest_zero, 16, (rows, groups))
    scale = (torch.rand(rows, groups) * 0.02 + 0.001).to(dtype)
    return Grid(torch.randint(0, 16, (rows, columns)), zero, scale, group_of)


def pack_words(values: torch.Tensor, dim: int, order: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """Eight neighbours along dim a word: the one at ``order[i]`` takes bits 4 i to 4 i + 3."""
    values = values.to(torch.int64).movedim(dim, -1)
    if values.shape[-1] % 8:
        values = nn.functional.pad(values, (0, -values.shape[-1] % 8))
    eights = values.unflatten(-1, (-1, 8))
    words = sum(eights[..., place] << (4 * bit) for bit, place in enumerate(order))
    return words.to(torch.int32).movedim(-1, dim).contiguous()


def gptq_tensors(grid: Grid, *, version: int = 1, g_idx: bool = True) -> dict[str, torch.Tensor]:
    zeros = (grid.zero.T - (1 if version == 1 else 0)) % 16
    tensors = {
        "qweight": pack_words(grid.q.T, 0),
        "qzeros": pack_words(zeros, 1),
        "scales": grid.scale.T.contiguous(),
    }
    return {**tensors, "g_idx": grid.group_of.to(torch.int32)} if g_idx else tensors


def awq_tensors(grid: Grid) -> dict[str, torch.Tensor]:
    return {
        "qweight": pack_words(grid.q.T, 1, AWQ_ORDER),
        "qzeros": pack_words(grid.zero.T, 1, AWQ_ORDER),
        "scales": grid.scale.T.contiguous(),
    }


def compressed_tensors(grid: Grid, *, symmetric: bool, g_idx: bool = False) -> dict[str, torch.Tensor]:
    tensors = {
        "weight_packed": pack_words(grid.q, 1),
        "weight_scale": grid.scale.clone(),
        "weight_shape": torch.tensor(grid.q.shape),
    }
    if not symmetric:
        tensors["weight_zero_point"] = pack_words(grid.zero, 0)
    return {**tensors, "weight_g_idx": grid.group_of.to(torch.int32)} if g_idx else tensors


def write_packed(
    folder: Path,
    model: PreTrainedModel,
    grids: dict[str, Grid],
    tensors_of: Callable[[Grid], dict[str, torch.Tensor]],
    recipe: dict[str, Any],
) -> dict[str, torch.Tensor]:
    """Save a model, then replace the weights that have a grid (named as on disk) by packed tensors.

    Returns:
        The full-precision tensors that the checkpoint stands for.
    """
    model.save_pretrained(folder)
    plain = load_file(folder / "model.safetensors")
    stored = dict(plain)
    for layer, grid in grids.items():
        assert stored.pop(f"{layer}.weight").shape == grid.q.shape
        plain[f"{layer}.weight"] = grid.dequantize()
        stored.update({f"{layer}.{suffix}": tensor for suffix, tensor in tensors_of(grid).items()})
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    change_config(folder, quantization_config=recipe)
    return plain


def random_grids(folder_model: PreTrainedModel, group_size: int, **options: Any) -> dict[str, Grid]:
    """A grid for every linear layer but the head; `act_order` gives inputs of a size one order."""
    act_order = options.pop("act_order", False)
    grids = {}
    for name, module in folder_model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            rows, columns = module.weight.shape
            # Layers with the same input have the same Hessian, and so the same order.
            seed = sum(
                map(ord, name.replace("k_proj", "q_proj").replace("v_proj", "q_proj").replace("up", "gate"))
            )
            order = (
                torch.randperm(columns, generator=torch.Generator().manual_seed(seed)) if act_order else None
            )
            grids[name] = random_grid(rows, columns, group_size, act_order=order, **options)
    return grids
