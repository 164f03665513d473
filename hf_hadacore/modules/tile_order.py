"""Modules that keep int4 weights in the order of the Hopper kernels, without anybody seeing it."""

from typing import Any

import torch
from torch import nn

from ..int4 import Int4Weight
from ..kernels.w4a16_tiled import prefers_tiles
from ..kernels.w4a16_tiles import from_tiles, to_tiles


class TileOrdered(nn.Module):
    """Mixin for modules with Parameters ``<name>``, ``<name>_scale`` and ``<name>_zero`` of int4 weights.

    On a GPU whose kernels want another order of the nibbles (`kernels.w4a16_tiles`), the weights are kept in
    that order and the columns of scales and zeros are contiguous. `state_dict`, copies, pickles, moves to
    another device or dtype and replaced Parameters all are in the format of `hf_hadacore.int4`.
    """

    group_size: int
    _is_tiled = False

    def _weight_names(self) -> tuple[str, ...]:
        """The names of the packed weights."""
        raise NotImplementedError

    def _group_values(self, name: str) -> list[nn.Parameter]:
        """The scales and, if there are any, zeros of a weight."""
        values = (self._parameters[f"{name}_scale"], self._parameters[f"{name}_zero"])
        return [value for value in values if value is not None]

    def _ordered_weight(self, name: str, part: int | slice = slice(None)) -> Int4Weight:
        """A weight, or a part of its first dimension, in the format of `hf_hadacore.int4`."""
        packed = self.get_parameter(name)[part]
        scale, *zero = (values[part] for values in self._group_values(name))
        packed = from_tiles(packed) if self._is_tiled else packed
        return Int4Weight(packed, scale, zero[0] if zero else None, self.group_size)

    def _use_tiles(self) -> None:
        """Put the weights in tile order if this GPU's kernels take all of them."""
        if self._is_tiled or self._is_offloaded():
            return
        weights = [getattr(self, name) for name in self._weight_names()]
        for weight in weights:
            n, words = weight.shape[-2:]
            if not prefers_tiles(weight.device, n, words * 8, self.group_size):
                return
        for name, weight in zip(self._weight_names(), weights, strict=True):
            weight.data = to_tiles(weight)
            for values in self._group_values(name):
                values.data = values.mT.contiguous().mT
        self._is_tiled = True

    def _restore_order(self) -> None:
        """Undo what was done to the Parameters."""
        if not self._is_tiled:
            return
        for name in self._weight_names():
            weight = self.get_parameter(name)
            weight.data = from_tiles(weight)
            for values in self._group_values(name):
                values.data = values.contiguous()
        self._is_tiled = False

    def _is_offloaded(self) -> bool:
        """Whether accelerate brings the weights in for each call."""
        return bool(getattr(self.__dict__.get("_hf_hook"), "offload", False))

    def __setattr__(self, name: str, value: object) -> None:
        is_part = name.removesuffix("_scale").removesuffix("_zero") in self._weight_names()
        if is_part or name == "input_perm":
            self._restore_order()
        super().__setattr__(name, value)  # type: ignore[arg-type]  # torch's annotation is too narrow

    def _load_from_state_dict(self, *args, **kwargs):
        self._restore_order()
        return super()._load_from_state_dict(*args, **kwargs)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._is_tiled:
            for name, value in self._ordered_parameters().items():
                destination[prefix + name] = value.detach()

    def _apply(self, fn, recurse=True):
        self._restore_order()
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        state = {**self.__dict__, "_is_tiled": False}
        if self._is_tiled:
            state["_parameters"] = {**self._parameters, **self._ordered_parameters()}
        return state

    def _ordered_parameters(self) -> dict[str, nn.Parameter]:
        """Copies of the Parameters of a tiled module, in the format of `hf_hadacore.int4`."""
        tensors: dict[str, torch.Tensor | None] = {}
        for name in self._weight_names():
            weight = self._ordered_weight(name)
            tensors |= {name: weight.packed, f"{name}_scale": weight.scale, f"{name}_zero": weight.zero}
        return {
            name: nn.Parameter(value.contiguous(), requires_grad=False)
            for name, value in tensors.items()
            if value is not None
        }


def may_reorder_weights() -> bool:
    """Whether Parameters may be reordered now: not while a graph is traced or captured."""
    if torch.compiler.is_compiling():
        return False
    return not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())
