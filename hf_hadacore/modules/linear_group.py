"""Layers that read the same input, multiplied in one launch: q/k/v, gate/up."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ..int4 import Int4Weight
from ..kernels.w4a16_launch import Product
from ..kernels.w4a16_tiled import w4a16_tiled
from .linear import HadaCoreLinear
from .tile_order import may_reorder_weights


def forward_together(layers: Sequence[nn.Module], x: torch.Tensor) -> list[torch.Tensor]:
    """The outputs of several layers for the same input, in one launch where that is possible.

    The first call moves the weights of the layers next to each other; the layers keep working alone. Layers
    that read the input in different orders stay apart.

    Args:
        layers: `HadaCoreLinear` or other modules.
        x: ``[..., K]``.

    Returns:
        The outputs ``[..., N]``, one for each layer; views of one tensor where they were made in one launch.
    """
    group = _group_of(layers)
    if group is None:
        return [layer(x) for layer in layers]
    weight = group.weight
    y = w4a16_tiled(
        x,
        weight.packed,
        weight.scale,
        weight.zero,
        group.input_perm,
        group.bias,
        group_size=weight.group_size,
    )
    return list(y.split(group.sizes, dim=-1))


def products_of(
    model: nn.Module, joined: Sequence[Sequence[nn.Module]]
) -> Iterator[tuple[torch.device, Product]]:
    """The products that the model's int4 layers in tile order will compute, with their devices.

    Args:
        model: loaded.
        joined: layers that will be called by `forward_together`; their weights are joined now.
    """
    groups = [group for group in map(_group_of, joined) if group is not None]
    alone = {layer for layer in model.modules() if isinstance(layer, HadaCoreLinear) and layer._is_tiled}
    alone -= {layer for group in groups for layer in group.layers}
    weights = [(group.weight, group.input_perm, group.bias) for group in groups]
    weights += [
        (
            Int4Weight(layer.weight, layer.weight_scale, layer.weight_zero, layer.group_size),
            layer.input_perm,
            layer.bias,
        )
        for layer in alone
    ]
    for weight, input_perm, bias in weights:
        if weight.scale.dtype in (torch.float16, torch.bfloat16):
            yield (
                weight.packed.device,
                Product(
                    weight.packed.shape[0],
                    weight.in_features,
                    weight.group_size,
                    weight.scale.dtype,
                    weight.zero is not None,
                    bias is not None,
                    input_perm is not None,
                ),
            )


class LinearGroup:
    """The concatenated weights of several layers, of which the layers' Parameters are views."""

    def __init__(self, layers: tuple[HadaCoreLinear, ...]):
        self.layers = layers
        self.sizes = [layer.weight.shape[0] for layer in layers]
        first = layers[0]
        zero = None
        scale = _join_columns([layer.weight_scale for layer in layers])
        if first.weight_zero is not None:
            zero = _join_columns([layer.weight_zero for layer in layers])
        packed = torch.cat([layer.weight.data for layer in layers])
        self.weight = Int4Weight(packed, scale, zero, first.group_size)
        self.input_perm = None if first.input_perm is None else first.input_perm.data
        self.bias = None
        if any(layer.bias is not None for layer in layers):
            zeros = [first.weight_scale.new_zeros(size) for size in self.sizes]
            self.bias = torch.cat(
                [z if layer.bias is None else layer.bias.data for layer, z in zip(layers, zeros, strict=True)]
            )
        for layer, *parts in zip(layers, *(t.split(self.sizes) for t in (packed, scale)), strict=True):
            layer.weight.data, layer.weight_scale.data = parts
            if layer.input_perm is not None and self.input_perm is not None:
                layer.input_perm.data = self.input_perm
        if zero is not None:
            for layer, part in zip(layers, zero.split(self.sizes), strict=True):
                layer._group_values("weight")[1].data = part
        self._places = [layer.weight.data_ptr() for layer in layers]

    def is_intact(self, layers: Sequence[nn.Module]) -> bool:
        """Whether the Parameters of these layers still are the views that this group made of them."""
        return (
            len(layers) == len(self.layers)
            and all(a is b and b._is_tiled for a, b in zip(layers, self.layers, strict=True))
            and [layer.weight.data_ptr() for layer in self.layers] == self._places
        )


def _join_columns(values: list[Any]) -> torch.Tensor:
    """Concatenate ``[N, G]`` tensors along N, with contiguous columns."""
    return torch.cat([value.data.t() for value in values], dim=1).t()


def _read_alike(first: HadaCoreLinear, second: HadaCoreLinear) -> bool:
    """Whether two layers read their input in the same order."""
    if first.input_perm is None or second.input_perm is None:
        return first.input_perm is second.input_perm
    return torch.equal(first.input_perm, second.input_perm)


def _group_of(layers: Sequence[nn.Module]) -> LinearGroup | None:
    """The group of some layers, made if they can have one."""
    first = layers[0]
    if type(first) is not HadaCoreLinear:
        return None
    group = first._group
    if torch.compiler.is_compiling():
        return None
    if group is not None and group.is_intact(layers):
        return group
    if not may_reorder_weights() or not all(type(layer) is HadaCoreLinear for layer in layers):
        return None
    members = tuple(layer for layer in layers if isinstance(layer, HadaCoreLinear))
    for layer in members:
        layer.prepare()
    kinds = {
        (
            layer._is_tiled,
            layer._is_offloaded(),
            layer.in_features,
            layer.group_size,
            layer.weight_zero is None,
            layer.weight.device,
            layer.weight_scale.dtype,
            layer.bias is None or (layer.bias.dtype, layer.bias.requires_grad),
        )
        for layer in members
    }
    if len(kinds) != 1 or not first._is_tiled or first._is_offloaded():
        return None
    if not all(_read_alike(first, layer) for layer in members[1:]):
        return None
    first._group = LinearGroup(members)
    return first._group
