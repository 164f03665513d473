"""How much quantization changes what a layer computes on calibration's inputs."""

from collections.abc import Sequence
from typing import NamedTuple

import torch


class OutputError(NamedTuple):
    """Squared outputs of each row of a weight, as means over calibration's tokens.

    Attributes:
        difference: fp64 ``[N]``, |x w - x w'|^2.
        exact: fp64 ``[N]``, |x w|^2.
    """

    difference: torch.Tensor
    exact: torch.Tensor

    def relative(self) -> float:
        """``|x w - x w'|^2 / |x w|^2`` over all rows; 0 where calibration saw only zeros."""
        difference, exact = float(self.difference.sum()), float(self.exact.sum())
        return difference / exact if exact else 0.0

    def split(self, rows: Sequence[int]) -> list["OutputError"]:
        """The errors of weights that were stacked, by their numbers of rows."""
        sizes = list(rows)
        return [
            OutputError(*parts)
            for parts in zip(self.difference.split(sizes), self.exact.split(sizes), strict=True)
        ]


def output_error(weight: torch.Tensor, difference: torch.Tensor, hessian: torch.Tensor) -> OutputError:
    """The error that a difference of weights makes.

    Args:
        weight: fp32 ``[N, K]``.
        difference: fp32 ``[N, K]``, from the quantized one.
        hessian: fp32 ``[K, K]``, E[x x^T].
    """
    return OutputError(_squared_outputs(difference, hessian), _squared_outputs(weight, hessian))


def _squared_outputs(rows: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """fp64 ``[N]``: a H a^T of each row a."""
    return (rows @ hessian).mul_(rows).sum(dim=1, dtype=torch.float64)
