"""Problems for GPTQ: weights and Hessians, and chunks of columns whose arithmetic is exact."""

from typing import NamedTuple

import torch

from hf_hadacore.solvers.act_order import falling_diagonal

ORDERS = ["natural", "static", "permuted"]
# Of all numbers in a chunk that is exact: sums and products stay below 2^24 of them, so fp32 rounds none.
STEP = 1 / 16


def weights(n: int, k: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return (torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * 0.02).to(dtype)


def correlated(k: int, rows: int | None = None, seed: int = 0) -> torch.Tensor:
    """fp32 ``[K, K]``: E[x x^T] of channels that hang together and differ in size."""
    generator = torch.Generator().manual_seed(seed)
    rows = 4 * k if rows is None else rows
    sources = torch.randn(rows, max(1, k // 4), generator=generator)
    x = sources @ torch.randn(max(1, k // 4), k, generator=generator) / k**0.5
    x += 0.3 * torch.randn(rows, k, generator=generator)
    x *= torch.rand(k, generator=generator).mul(2).exp()
    return x.T @ x / rows


def options_of(kind: str, hessian: torch.Tensor) -> dict:
    order = None if kind == "natural" else falling_diagonal(hessian)
    return dict(order=order, static_groups=kind == "static")


class Chunk(NamedTuple):
    """Operands of `solvers.columns`, whose results on them depend on no order of roundings.

    Attributes:
        values, target: fp32 ``[C, N]``; values is what is rounded, or the gradient.
        matrix: fp32 ``[C, C]``, part of a larger one: the factor, or the Hessian.
        scale, zero: fp32 ``[G, N]``.
        group: int64 ``[C]``.
        c: fp32 ``[C, N]``, integers on the grids.
    """

    values: torch.Tensor
    target: torch.Tensor
    matrix: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    group: torch.Tensor
    c: torch.Tensor


def exact_chunk(columns: int, rows: int, groups: int, symmetric: bool, seed: int = 0) -> Chunk:
    """A chunk with ties, outliers, a channel of zeros that moves no other, and rows of zeros with scale 1."""
    generator = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high + 1, shape, generator=generator).float()

    scale = integers(1, 16, groups, rows) * STEP
    if symmetric:
        zero = torch.full_like(scale, 8)
        scale *= integers(0, 1, groups, rows) * 2 - 1
    else:
        zero = integers(0, 15, groups, rows)
    group = torch.randint(groups, (columns,), generator=generator)
    target = integers(-100, 100, columns, rows) * STEP
    target[columns // 2] *= 100
    values = target + integers(-20, 20, columns, rows) * STEP
    is_zero = torch.arange(rows) % 5 == 3
    target[:, is_zero] = values[:, is_zero] = 0
    scale[:, is_zero] = 1
    # A sparse matrix of small integers: what a clamped column is off by must not grow on its way.
    larger = integers(-1, 1, columns + 3, columns + 5) * (integers(0, 19, columns + 3, columns + 5) == 0)
    matrix = larger[1:-2, 2:-3]
    matrix.copy_(matrix.triu(1) + torch.eye(columns))
    dead = columns // 3
    matrix[dead], matrix[:, dead] = 0, 0
    matrix[dead, dead] = 1
    target[dead] = values[dead] = 0
    c = integers(0, 15, columns, rows) - zero[group]
    return Chunk(values, target, matrix, scale, zero, group, c)
