"""Modules that hold their part of divided Parameters as plain tensors."""

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor


class _Layout(NamedTuple):
    """How a Parameter is divided: `DTensor.from_local`'s arguments."""

    device_mesh: DeviceMesh
    placements: tuple[Any, ...]
    shape: torch.Size
    stride: tuple[int, ...]


class LocalShards(nn.Module):
    """Mixin for modules whose kernels want plain tensors, reordered and joined with those of other modules.

    transformers divides Parameters as `DTensor`. `keep_local_shards` puts the local parts in their place; the
    `state_dict` still holds `DTensor`, of which `save_pretrained` makes whole tensors.
    """

    _layouts: dict[str, _Layout] = {}  # noqa: RUF012  # never changed in place
    joins_shards = True

    def keep_local_shards(self, *, joins: bool) -> None:
        """Replace divided Parameters by their local parts.

        Args:
            joins: whether what the module gives for a local input is all that a call of it does, so that its
                product may be computed together with others'.
        """
        divided: dict[str, Any] = {
            name: value
            for name, value in self._parameters.items()
            if isinstance(value, DTensor) and not all(p.is_replicate() for p in value.placements)
        }
        self.joins_shards = joins
        self._layouts = {
            name: _Layout(value.device_mesh, value.placements, value.shape, value.stride())
            for name, value in divided.items()
        }
        for name, value in divided.items():
            local = nn.Parameter(value.detach().to_local(), requires_grad=value.requires_grad)
            setattr(self, name, local)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, layout in self._layouts.items():
            local = destination[prefix + name].detach().contiguous()
            mesh, placements, shape, stride = layout
            destination[prefix + name] = DTensor.from_local(
                local, mesh, placements, run_check=False, shape=shape, stride=stride
            )

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        local = {
            prefix + name: state_dict[prefix + name].to_local()
            for name in self._layouts
            if isinstance(state_dict.get(prefix + name), DTensor)
        }
        super()._load_from_state_dict({**state_dict, **local}, prefix, *args, **kwargs)
