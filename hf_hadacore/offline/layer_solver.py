"""One decoder layer from full precision to int4, with the inputs that calibration gives it.

True-sequential, as GPTQ's authors call it: linear layers that read the same input are solved together, in the
order in which the forward pass comes to them, and the inputs of each were made with the int4 weights of those
before. Which layers share an input is seen in a forward pass, not guessed from names.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..config import LayerSpec
from ..int4 import Int4Weight
from ..layer_plan import LayerPlan
from ..parallel.permutation import permute_outputs
from ..solvers.hessian import Hessian
from .calibrated_weight import InputStatistics, SolvedWeight, record_weight, solve_weight
from .column_orders import ColumnOrder, ColumnOrders
from .decoder import Activations, Stop, before_forward
from .expert_solver import ExpertSolver
from .layer_record import LayerRecord


class LayerSolver:
    """Quantizes the weights of one decoder layer that a plan names.

    Args:
        name: of the layer.
        layer: with its weights. They are replaced by the values of the int4 weights, so that it computes what
            the quantized layer will.
        activations: its inputs.
        plan: what is quantized and how.
        orders: of the columns.
        scale_dtype: of the scales.

    Attributes:
        tensors: what is stored of the int4 weights, named as in the quantized model.
        records: of the weights.
    """

    def __init__(
        self,
        name: str,
        layer: nn.Module,
        activations: Activations,
        plan: LayerPlan,
        orders: ColumnOrders,
        scale_dtype: torch.dtype,
    ):
        self._layer, self._activations, self._plan, self._orders = layer, activations, plan, orders
        self._scale_dtype = scale_dtype
        self._modules: dict[str, Any] = {
            f"{name}.{part}": module for part, module in layer.named_modules() if part
        }
        self._solved: dict[str, SolvedWeight] = {}
        self.tensors: dict[str, torch.Tensor] = {}
        self.records: list[LayerRecord] = []

    def solve(self) -> None:
        """Quantize them all.

        Raises:
            QuantizationError: weights or calibration inputs hold NaN or infinite values.
        """
        for names in self._input_groups():
            if names[0] in self._plan.experts:
                self._solve_experts(names[0])
            else:
                self._solve_linears(names)
        for name, solved in self._solved.items():
            self._store(f"{name}.weight", solved.weight)
            if name in self._orders.stored:
                natural = torch.arange(solved.weight.in_features)
                columns = natural if solved.columns is None else solved.columns
                self.tensors[f"{name}.input_perm"] = columns.to(torch.int32)

    def _input_groups(self) -> list[list[str]]:
        """Modules by the input that they share, in the order of the first batch's forward pass."""
        planned = [name for name in self._modules if name in self._plan.linears or name in self._plan.experts]
        inputs: list[tuple[torch.Tensor, list[str]]] = []

        def see(name: str, args: tuple[Any, ...]) -> None:
            for x, names in inputs:
                if x is args[0] and not {name, *names} & self._plan.experts.keys():
                    names.append(name)
                    return
            inputs.append((args[0], [name]))

        with before_forward({name: self._modules[name] for name in planned}, see):
            self._activations.run(self._layer, batches=1)
        groups = [list(dict.fromkeys(names)) for _, names in inputs]
        # The first batch may pass modules by, such as experts that are modules of their own.
        seen = {name for names in groups for name in names}
        return groups + [[name] for name in planned if name not in seen]

    def _see_inputs(self, name: str, see: Callable[..., None]) -> None:
        """Call a function with what a module gets for every batch; nothing behind the module is computed."""

        def see_and_stop(_: str, args: tuple[Any, ...]) -> None:
            see(*args)
            raise Stop

        with before_forward({name: self._modules[name]}, see_and_stop):
            self._activations.run(self._layer)

    def _solve_linears(self, names: list[str]) -> None:
        """Quantize linear layers that read the same input."""
        hessian = Hessian(self._modules[names[0]].in_features, self._activations.device, name=names[0])
        self._see_inputs(names[0], hessian.add)
        inputs = InputStatistics(hessian.matrix(), hessian.rows)
        del hessian
        alike: dict[tuple[ColumnOrder, LayerSpec], list[str]] = {}
        for name in names:
            alike.setdefault((self._orders.order(name), self._plan.linears[name]), []).append(name)
        for (order, spec), members in alike.items():
            # Rows do not depend on each other: stacked, all members are one problem.
            values = [self._modules[name].weight.data for name in members]
            stacked = solve_weight(
                torch.cat(values), inputs, spec, order, scale_dtype=self._scale_dtype, name=", ".join(members)
            )
            parts = stacked.split([len(value) for value in values])
            for name, value, solved in zip(members, values, parts, strict=True):
                self.records.append(record_weight(f"{name}.weight", value, solved, inputs))
                self._replace(name, solved)

    def _replace(self, name: str, solved: SolvedWeight) -> None:
        """Let a linear layer compute with its int4 weight."""
        module = self._modules[name]
        group = self._orders.baked(name)
        if group is not None and solved.columns is not None:
            for producer in group.producers:
                rows = len(self._modules[producer].weight)
                self._permute_outputs(producer, group.output_order(solved.columns, rows))
            # From now on the input comes in the order of the columns.
            solved = solved._replace(columns=None)
        module.weight.data = solved.values(module.weight.dtype)
        self._solved[name] = solved

    def _permute_outputs(self, name: str, order: torch.Tensor) -> None:
        module = self._modules[name]
        module.weight.data, bias = permute_outputs(module.weight.data, module.bias, order)
        if bias is not None:
            module.bias.data = bias
        if name in self._solved:
            weight, _ = permute_outputs(self._solved[name].weight, None, order)
            self._solved[name] = self._solved[name]._replace(weight=weight)

    def _solve_experts(self, name: str) -> None:
        solver = ExpertSolver(
            name, self._modules[name], self._plan.experts[name], self._orders, self._scale_dtype
        )
        self._see_inputs(name, solver.see)
        solver.solve()
        self.records += solver.records
        for projection, weight in solver.weights.items():
            self._store(f"{name}.{projection}", weight)

    def _store(self, name: str, weight: Int4Weight) -> None:
        self.tensors |= {name: weight.packed, f"{name}_scale": weight.scale}
        if weight.zero is not None:
            self.tensors[f"{name}_zero"] = weight.zero
