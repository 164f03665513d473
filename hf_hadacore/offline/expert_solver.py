"""Fused experts from full precision to int4, each with the tokens that chose it."""

from typing import Any

import torch
import torch.nn.functional as F

from ..config import LayerSpec
from ..int4 import Int4Weight
from ..modules.experts import expert_projections
from ..parallel.permutation import permute_outputs
from ..solvers.hessian import Hessian
from .calibrated_weight import InputStatistics, SolvedWeight, record_weight, solve_weight
from .column_orders import ColumnOrders
from .layer_record import LayerRecord, mean_record

# A Hessian of fewer tokens says little: experts that few tokens chose are rounded to nearest.
_FEWEST_TOKENS = 128


class ExpertSolver:
    """Quantizes the experts of one module, one after the other.

    Args:
        name: of the module.
        module: fused experts, see `experts.expert_projections`. Their Parameters are replaced by the values
            of the int4 weights.
        spec: group size and symmetry.
        orders: of the columns.
        scale_dtype: of the scales.

    Attributes:
        weights: int4 ``[E, N, K]`` by projection.
        records: of the projections.
    """

    def __init__(
        self, name: str, module: Any, spec: LayerSpec, orders: ColumnOrders, scale_dtype: torch.dtype
    ):
        self._scale_dtype = scale_dtype
        self._name, self._module, self._spec, self._orders = name, module, spec, orders
        self._first, self._second = expert_projections(module)
        self._seen: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.weights: dict[str, Int4Weight] = {}
        self.records: list[LayerRecord] = []

    def see(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, *rest: Any) -> None:
        """Keep a batch of the module's inputs.

        Args:
            hidden_states: ``[T, H]``.
            top_k_index: integer ``[T, k]``, the experts that each token chose.
            rest: what else the module is called with.
        """
        self._seen.append((hidden_states.detach(), top_k_index))

    def solve(self) -> None:
        """Quantize them all.

        Raises:
            QuantizationError: weights or inputs hold NaN or infinite values.
        """
        experts = [self._solve_expert(expert) for expert in range(self._module.num_experts)]
        for projection, parts in zip((self._first, self._second), zip(*experts, strict=True), strict=True):
            self.weights[projection] = _stack([weight for weight, _ in parts])
            self.records.append(mean_record(f"{self._name}.{projection}", [record for _, record in parts]))

    def _solve_expert(self, expert: int) -> tuple[tuple[Int4Weight, LayerRecord], ...]:
        # In this order: the second projection's inputs are made with the int4 first one.
        up, up_record = self._solve_projection(self._first, expert)
        down, down_record = self._solve_projection(self._second, expert)
        group = self._orders.baked(f"{self._name}.{self._second}")
        if group is None or down.columns is None:
            return (up.weight, up_record), (down.weight, down_record)
        order = group.output_order(down.columns, len(self._value(self._first, expert)))
        bias = self._bias(self._first, expert)
        weight, permuted_bias = permute_outputs(up.weight, bias, order)
        if bias is not None and permuted_bias is not None:
            bias.copy_(permuted_bias)
        for projection, permuted in ((self._first, weight), (self._second, down.weight)):
            value = self._value(projection, expert)
            value.copy_(permuted.dequantize(value.dtype))
        return (weight, up_record), (down.weight, down_record)

    def _solve_projection(self, projection: str, expert: int) -> tuple[SolvedWeight, LayerRecord]:
        name = f"{self._name}.{projection}"
        value = self._value(projection, expert)
        inputs = self._inputs(projection, expert)
        solved = solve_weight(
            value,
            inputs,
            self._spec,
            self._orders.order(name),
            scale_dtype=self._scale_dtype,
            fewest_tokens=_FEWEST_TOKENS,
            name=f"{name}[{expert}]",
        )
        record = record_weight(name, value, solved, inputs)
        value.copy_(solved.values(value.dtype))
        return solved, record

    def _inputs(self, projection: str, expert: int) -> InputStatistics:
        value = self._value(projection, expert)
        hessian = Hessian(value.shape[1], value.device, name=f"{self._name}.{projection}[{expert}]")
        for hidden_states, top_k_index in self._seen:
            x = hidden_states[(top_k_index == expert).any(dim=1)]
            if projection == self._second:
                x = F.linear(x, self._value(self._first, expert), self._bias(self._first, expert))
                x = self._activate(x)
            hessian.add(x)
        return InputStatistics(hessian.matrix(), hessian.rows)

    def _activate(self, x: torch.Tensor) -> torch.Tensor:
        return self._module._apply_gate(x) if self._module.has_gate else self._module.act_fn(x)

    def _value(self, projection: str, expert: int) -> torch.Tensor:
        """A view ``[N, K]`` of one expert's weight."""
        value = self._module.get_parameter(projection).data[expert]
        return value.T if self._module.is_transposed else value

    def _bias(self, projection: str, expert: int) -> torch.Tensor | None:
        if not self._module.has_bias:
            return None
        return self._module.get_parameter(f"{projection}_bias").data[expert]


def _stack(weights: list[Int4Weight]) -> Int4Weight:
    """One int4 weight ``[E, N, K]`` of those of all experts."""
    zeros = [weight.zero for weight in weights if weight.zero is not None]
    return Int4Weight(
        torch.stack([weight.packed for weight in weights]),
        torch.stack([weight.scale for weight in weights]),
        torch.stack(zeros) if zeros else None,
        weights[0].group_size,
    )
