"""One weight from full precision to int4, with the Hessian of its input."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..config import LayerSpec
from ..int4 import Int4Weight
from ..solvers.gptq import gptq_quantize
from ..solvers.output_error import OutputError, output_error
from ..solvers.rtn import quantize_weight
from .column_orders import ColumnOrder
from .layer_record import CalibrationRecord, LayerRecord, make_record

DAMPING = 0.01


class InputStatistics(NamedTuple):
    """What calibration knows of a weight's input.

    Attributes:
        hessian: fp32 ``[K, K]``, E[x x^T].
        tokens: that it is the mean of.
    """

    hessian: torch.Tensor
    tokens: int


class SolvedWeight(NamedTuple):
    """An int4 weight and how it came about.

    Attributes:
        weight: its columns in the order `columns`.
        columns: int64 ``[K]``, the natural place of each column; None if that is where it is.
        solver: "gptq" or "rtn".
        damping: the fraction of the Hessian's mean diagonal that "gptq" added; None otherwise.
        output_error: of each row, as they were when the weight was solved.
    """

    weight: Int4Weight
    columns: torch.Tensor | None
    solver: str
    damping: float | None
    output_error: OutputError

    def values(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight ``[N, K]`` in full precision, columns in their natural places."""
        return natural_values(self.weight, self.columns, dtype)

    def split(self, rows: Sequence[int]) -> list["SolvedWeight"]:
        """The weights that were stacked, by their numbers of rows."""
        packed, scale, zero, group_size = self.weight
        sizes = list(rows)
        zeros = [None] * len(sizes) if zero is None else zero.split(sizes)
        errors = self.output_error.split(sizes)
        parts = zip(packed.split(sizes), scale.split(sizes), zeros, errors, strict=True)
        return [
            self._replace(weight=Int4Weight(q, s, z, group_size), output_error=error)
            for q, s, z, error in parts
        ]


def natural_values(weight: Int4Weight, columns: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """An int4 weight in full precision, columns in their natural places.

    Args:
        weight: ``[..., N, K]``.
        columns: integer ``[K]``, the natural place of each; None if that is where they are.
        dtype: of the result.
    """
    values = weight.dequantize(dtype)
    return values if columns is None else torch.empty_like(values).index_copy_(-1, columns.long(), values)


def solve_weight(
    value: torch.Tensor,
    inputs: InputStatistics,
    spec: LayerSpec,
    order: ColumnOrder,
    *,
    scale_dtype: torch.dtype,
    fewest_tokens: int = 1,
    name: str = "weight",
) -> SolvedWeight:
    """Quantize a weight by GPTQ; by rounding to nearest if too few tokens came by.

    Args:
        value: floating point ``[N, K]``.
        inputs: of the weight.
        spec: group size and symmetry.
        order: of the columns.
        scale_dtype: of the scales.
        fewest_tokens: that are enough for GPTQ.
        name: how errors call the weight.

    Raises:
        QuantizationError: weight or Hessian hold NaN or infinite values.
    """
    if inputs.tokens < fewest_tokens:
        importance = inputs.hessian.diagonal() if inputs.tokens else None
        weight = quantize_weight(
            value,
            group_size=spec.group_size,
            symmetric=spec.symmetric,
            scale_dtype=scale_dtype,
            importance=importance,
            name=name,
        )
        exact = value.float()
        difference = weight.dequantize(torch.float32).sub_(exact)
        return SolvedWeight(weight, None, "rtn", None, output_error(exact, difference, inputs.hessian))
    columns = order.of(inputs.hessian)
    result = gptq_quantize(
        value,
        inputs.hessian,
        group_size=spec.group_size,
        symmetric=spec.symmetric,
        scale_dtype=scale_dtype,
        order=columns,
        static_groups=order.by_energy and not order.forms_groups,
        damping=DAMPING,
        name=name,
    )
    stored_order = columns if order.forms_groups else None
    return SolvedWeight(result.weight, stored_order, "gptq", result.damping, result.output_error)


def record_weight(
    name: str, value: torch.Tensor, solved: SolvedWeight, inputs: InputStatistics
) -> LayerRecord:
    """The record of a weight.

    Args:
        name: the Parameter.
        value: floating point ``[N, K]``, before it was quantized.
        solved: what became of it.
        inputs: of the weight.
    """
    if solved.columns is not None:
        value = value[:, solved.columns]
    error = solved.output_error.relative()
    calibration = CalibrationRecord(solved.solver, inputs.tokens, error, solved.damping)
    return make_record(name, value, solved.weight, calibration)
