"""Fused mixture-of-experts weights in int4.

transformers keeps all experts of a layer in one module with 3-D Parameters, e.g.
``gate_up_proj [E, 2I, H]`` and ``down_proj [E, H, I]`` (gpt-oss: transposed, with biases).
Here each becomes ``<name>`` int32 ``[E, N, K/8]``, ``<name>_scale`` ``[E, N, ceil(K/g)]`` and
``<name>_zero``, output-major whatever the model's own order. The forward pass calls a linear op once per
expert that was hit; on a Hopper GPU it calls one op for all of them.
"""

from functools import cache
from typing import Any

import torch
from torch import nn

from .. import int4
from ..int4 import Int4Weight
from ..kernels.w4a16 import w4a16_linear
from ..kernels.w4a16_experts import slots_by_expert, w4a16_experts
from ..kernels.w4a16_tiled import w4a16_tiled
from .local_shards import LocalShards
from .tile_order import TileOrdered, may_reorder_weights

_PROJECTIONS = ("gate_up_proj", "up_proj", "down_proj")


def expert_projections(module: nn.Module) -> tuple[str, ...]:
    """The names of a module's fused expert weights; empty if it is not a fused experts module.

    Such a module follows transformers' experts interface (it says whether it is transposed, gated and
    biased) and holds its projections as 3-D Parameters.
    """
    if isinstance(module, HadaCoreExperts):
        return module.projections
    if not all(hasattr(module, name) for name in ("is_transposed", "has_gate", "has_bias", "_apply_gate")):
        return ()
    names = tuple(n for n in _PROJECTIONS if getattr(module._parameters.get(n), "ndim", 0) == 3)
    return names if "down_proj" in names and len(names) == 2 else ()


def projection_shape(module: nn.Module, name: str) -> tuple[int, int, int]:
    """``(E, N, K)`` of one full-precision projection, output-major."""
    experts, rows, columns = module.get_parameter(name).shape
    return (experts, columns, rows) if module.is_transposed else (experts, rows, columns)


class HadaCoreExperts(LocalShards, TileOrdered):
    """Mixin for fused experts with int4 projections.

    Made by `swap_experts`, which turns an existing module into a subclass of both this class and its
    own, so that gating function, activation and dimensions stay the model's. Read the projections through
    `int4_weight`: a GPU's kernels may want them in another order, see `TileOrdered`.

    Attributes:
        projections: the names of the quantized Parameters.
        group_size: g; -1 is one group per row.
    """

    projections: tuple[str, ...]
    group_size: int
    is_transposed: bool
    has_gate: bool
    has_bias: bool
    num_experts: int
    # Typed here because mypy cannot see what the other base class brings.
    act_fn: Any
    post_expert_norm: Any
    _apply_gate: Any

    def int4_weight(self, name: str, expert: int | slice = slice(None)) -> Int4Weight:
        """One projection, of all experts or of one.

        Args:
            name: of the projection.
            expert: its index; default all.
        """
        return self._ordered_weight(name, expert)

    def prepare(self) -> None:
        """Make what the forward pass of this module's device needs, so that the first call is not slower.

        On a Hopper GPU the projections are put in the order of `kernels.w4a16_tiles`, if all of them consist
        of whole tiles. Elsewhere there is nothing to do.
        """
        self._use_tiles()

    def _weight_names(self) -> tuple[str, ...]:
        # Attributes are set before `swap_experts` says which of them are quantized.
        return getattr(self, "projections", ())

    def __reduce__(self) -> tuple[Any, ...]:
        # Its class is made at run time, so a pickle has to name the model's own.
        return _empty_experts, (type(self).__bases__[1],), self.__getstate__()

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """The weighted sum of the chosen experts' outputs, per token.

        Args:
            hidden_states: ``[T, H]``.
            top_k_index: integer ``[T, k]``; ids of ``num_experts`` and above (expert parallelism's
                sentinels) are skipped.
            top_k_weights: ``[T, k]``.

        Returns:
            ``[T, H]`` in the dtype of `hidden_states`.
        """
        if not self._is_tiled and may_reorder_weights():
            self.prepare()
        choices, expert_index = top_k_index.shape[1], top_k_index.reshape(-1)
        # One slot per (token, choice), summed in a fixed order: no atomics, the same bits every run.
        if self._is_tiled and not self._needs_gradient(hidden_states):
            output = self._grouped_outputs(hidden_states, expert_index)
            weighted = output.unflatten(0, top_k_index.shape) * top_k_weights[..., None]
            return weighted.to(hidden_states.dtype).sum(dim=1)
        slots = hidden_states.new_zeros(*top_k_index.shape, hidden_states.shape[-1])
        for expert, chosen in slots_by_expert(expert_index, self.num_experts):
            token, choice = chosen // choices, chosen % choices
            output = self._expert(expert, hidden_states[token])
            weighted = output * top_k_weights[token, choice, None]
            slots.index_put_((token, choice), weighted.to(slots.dtype))
        return slots.sum(dim=1)

    def _needs_gradient(self, x: torch.Tensor) -> bool:
        """Whether something before or in a projection is trained; grouped products have no backward pass."""
        if not torch.is_grad_enabled():
            return False
        return x.requires_grad or any(p is not None and p.requires_grad for p in self._parameters.values())

    def _grouped_outputs(self, hidden_states: torch.Tensor, expert_index: torch.Tensor) -> torch.Tensor:
        """The outputs ``[S, H]`` of the chosen experts; zeros for sentinels."""
        up = self._project_slots(self.projections[0], hidden_states, expert_index)
        output = self._project_slots("down_proj", self._activate(up), expert_index)
        if not self._has_norm:
            return output
        is_real = (expert_index >= 0) & (expert_index < self.num_experts)
        return torch.where(is_real[:, None], self.post_expert_norm(output), 0)

    def _project_slots(self, name: str, x: torch.Tensor, expert_index: torch.Tensor) -> torch.Tensor:
        return w4a16_experts(
            x,
            getattr(self, name),
            getattr(self, f"{name}_scale"),
            getattr(self, f"{name}_zero"),
            getattr(self, f"{name}_bias") if self.has_bias else None,
            expert_index,
            group_size=self.group_size,
        )

    def _expert(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        hidden = self._activate(self._project(self.projections[0], expert, x))
        output = self._project("down_proj", expert, hidden)
        return self.post_expert_norm(output) if self._has_norm else output

    def _activate(self, up: torch.Tensor) -> torch.Tensor:
        return self._apply_gate(up) if self.has_gate else self.act_fn(up)

    @property
    def _has_norm(self) -> bool:
        # Not all versions of transformers that we support set it.
        return getattr(self, "has_post_expert_norm", False)

    def _project(self, name: str, expert: int, x: torch.Tensor) -> torch.Tensor:
        product = w4a16_tiled if self._is_tiled else w4a16_linear
        zero = getattr(self, f"{name}_zero")
        return product(
            x,
            getattr(self, name)[expert],
            getattr(self, f"{name}_scale")[expert],
            None if zero is None else zero[expert],
            None,
            getattr(self, f"{name}_bias")[expert] if self.has_bias else None,
            group_size=self.group_size,
        )


@cache
def _int4_class(original: Any) -> type[nn.Module]:
    return type(f"HadaCore{original.__name__}", (HadaCoreExperts, original), {"__module__": __name__})


def _empty_experts(original: Any) -> nn.Module:
    """What unpickling fills."""
    cls = _int4_class(original)
    return cls.__new__(cls)


def swap_experts(module: nn.Module, *, group_size: int, symmetric: bool, dtype: torch.dtype) -> None:
    """Turn a fused experts module into int4 in place: its projections become empty int4 Parameters.

    Args:
        module: one for which `expert_projections` is not empty.
        group_size: g.
        symmetric: whether z = 8 everywhere.
        dtype: of the scales.
    """
    names = expert_projections(module)
    shapes = {name: projection_shape(module, name) for name in names}
    original: Any = type(module)
    module.__class__ = _int4_class(original)
    module.projections = names  # type: ignore[assignment]
    module.group_size = group_size  # type: ignore[assignment]
    for name, (experts, n, k) in shapes.items():
        device = module.get_parameter(name).device
        groups = (experts, n, int4.num_groups(k, group_size))

        def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device = device) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)

        module.register_parameter(name, empty((experts, n, k // int4.NIBBLES_PER_WORD), torch.int32))
        module.register_parameter(f"{name}_scale", empty(groups, dtype))
        module.register_parameter(f"{name}_zero", None if symmetric else empty(groups, torch.uint8))


def dequantize_experts(module: HadaCoreExperts, dtype: torch.dtype | None = None) -> None:
    """Undo `swap_experts` in place: full-precision Parameters in the model's own order and class.

    Args:
        module: the experts.
        dtype: of the weights; default the dtype of the scales.
    """
    module._restore_order()
    for name in module.projections:
        weight = module.int4_weight(name).dequantize(dtype)
        if module.is_transposed:
            weight = weight.transpose(-1, -2).contiguous()
        for suffix in ("", "_scale", "_zero"):
            del module._parameters[name + suffix]
        module.register_parameter(name, nn.Parameter(weight, requires_grad=False))
    del module.projections, module.group_size
    module.__class__ = type(module).__bases__[1]
