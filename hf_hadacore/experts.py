"""Fused mixture-of-experts weights in int4.

transformers keeps all experts of a layer in one module with 3-D Parameters, e.g.
``gate_up_proj [E, 2I, H]`` and ``down_proj [E, H, I]`` (gpt-oss: transposed, with biases).
Here each becomes ``<name>`` int32 ``[E, N, K/8]``, ``<name>_scale`` ``[E, N, ceil(K/g)]`` and
``<name>_zero``, output-major whatever the model's own order. A grouped kernel is later work; the
forward pass below calls the linear op once per expert that was hit.
"""

from functools import cache
from typing import Any

import torch
from torch import nn

from . import int4
from .int4 import Int4Weight
from .kernels.w4a16 import w4a16_linear

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


class HadaCoreExperts(nn.Module):
    """Mixin for fused experts with int4 projections.

    Made by `swap_experts`, which turns an existing module into a subclass of both this class and its
    own, so that gating function, activation and dimensions stay the model's.

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
        zero = getattr(self, f"{name}_zero")
        return Int4Weight(
            getattr(self, name)[expert],
            getattr(self, f"{name}_scale")[expert],
            None if zero is None else zero[expert],
            self.group_size,
        )

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
        # One slot per (token, choice), summed in a fixed order: no atomics, the same bits every run.
        slots = hidden_states.new_zeros(*top_k_index.shape, hidden_states.shape[-1])
        for expert in torch.unique(top_k_index).tolist():
            if not 0 <= expert < self.num_experts:
                continue
            token, choice = torch.where(top_k_index == expert)
            output = self._expert(expert, hidden_states[token])
            weighted = output * top_k_weights[token, choice, None]
            slots.index_put_((token, choice), weighted.to(slots.dtype))
        return slots.sum(dim=1)

    def _expert(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        up_name = self.projections[0]
        up = self._project(up_name, expert, x)
        hidden = self._apply_gate(up) if self.has_gate else self.act_fn(up)
        output = self._project("down_proj", expert, hidden)
        return self.post_expert_norm(output) if getattr(self, "has_post_expert_norm", False) else output

    def _project(self, name: str, expert: int, x: torch.Tensor) -> torch.Tensor:
        weight = self.int4_weight(name, expert)
        bias = getattr(self, f"{name}_bias")[expert] if self.has_bias else None
        return w4a16_linear(
            x, weight.packed, weight.scale, weight.zero, None, bias, group_size=weight.group_size
        )


@cache
def _int4_class(original: Any) -> type[nn.Module]:
    return type(f"HadaCore{original.__name__}", (HadaCoreExperts, original), {"__module__": __name__})


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
    for name in module.projections:
        weight = module.int4_weight(name).dequantize(dtype)
        if module.is_transposed:
            weight = weight.transpose(-1, -2).contiguous()
        for suffix in ("", "_scale", "_zero"):
            del module._parameters[name + suffix]
        module.register_parameter(name, nn.Parameter(weight, requires_grad=False))
    del module.projections, module.group_size
    module.__class__ = type(module).__mro__[2]
