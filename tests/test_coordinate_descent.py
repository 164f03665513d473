"""Coordinate descent: no sweep raises the error, and where it ends no single change would lower it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_hadacore import int4
from hf_hadacore.solvers.coordinate_descent import descend
from hf_hadacore.solvers.rtn import fit_groups, round_to_grid


class Problem:
    """A rounded weight ``[N, K]`` and a Hessian of dependent channels; all else as `descend` wants it."""

    def __init__(self, n: int, k: int, size: int, symmetric: bool, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(4 * k, k, generator=generator)
        x = x + 2 * x.roll(1, dims=1) + x.roll(7, dims=1)
        self.hessian = x.T @ x / len(x) + 0.01 * torch.eye(k)
        self.size = min(size, k)
        weight = torch.randn(n, k, generator=generator) * 0.02
        scale, zero = fit_groups(
            weight, group_size=self.size, symmetric=symmetric, scale_dtype=torch.bfloat16, search=False
        )
        self.target, self.scale, self.zero = weight.T.contiguous(), scale.T.contiguous(), zero.T.contiguous()
        self.c = round_to_grid(self.target, self.per_column(self.scale), self.per_column(self.zero))

    def per_column(self, per_group: torch.Tensor) -> torch.Tensor:
        return int4.expand_groups(per_group.T, len(self.target), self.size).T

    def descend(self) -> torch.Tensor:
        return descend(
            self.target,
            self.hessian,
            self.c,
            self.scale,
            self.zero,
            size=self.size,
            scale_dtype=torch.bfloat16,
        )

    def errors(self, c: torch.Tensor | None = None) -> torch.Tensor:
        """float64 ``[N]``."""
        values = (self.c if c is None else c).double() * self.per_column(self.scale).double()
        d = self.target.double() - values
        return ((self.hessian.double() @ d) * d).sum(0)


@settings(deadline=None, max_examples=30)
@given(
    n=st.integers(1, 6),
    k=st.sampled_from([8, 40, 72, 136, 200]),
    size=st.sampled_from([32, 64, 128, 1000]),
    symmetric=st.booleans(),
    seed=st.integers(0, 100),
)
def test_no_sweep_raises_a_row_s_error(n: int, k: int, size: int, symmetric: bool, seed: int) -> None:
    problem = Problem(n, k, size, symmetric, seed)
    before = problem.errors()
    for _ in range(2):
        difference = problem.descend()
        after = problem.errors()
        assert (after <= before * (1 + 1e-5)).all()
        before = after
    expected = problem.target - problem.c * problem.per_column(problem.scale)
    torch.testing.assert_close(difference, expected, rtol=0, atol=1e-7)
    zero = problem.per_column(problem.zero)
    assert ((problem.c + zero >= 0) & (problem.c + zero <= int4.MAX_Q)).all()
    assert torch.equal(problem.scale, problem.scale.bfloat16().float())


@pytest.mark.parametrize(("k", "size"), [(72, 32), (136, 136)])
def test_no_single_integer_would_be_better_in_the_end(k: int, size: int) -> None:
    problem = Problem(6, k, size, symmetric=False)
    first = problem.errors()
    for _ in range(50):
        before = problem.c.clone(), problem.scale.clone()
        problem.descend()
    assert torch.equal(problem.c, before[0]) and torch.equal(problem.scale, before[1])
    best = problem.errors()
    assert (best < 0.8 * first).all()
    zero = problem.per_column(problem.zero)
    for j in range(k):
        for step in (-1, 1):
            changed = problem.c.clone()
            changed[j] += step
            is_on_grid = (changed[j] >= -zero[j]) & (changed[j] <= int4.MAX_Q - zero[j])
            assert (problem.errors(changed) >= best * (1 - 1e-5))[is_on_grid].all()


def test_groups_of_zeros_keep_their_scale() -> None:
    problem = Problem(3, 64, 32, symmetric=True)
    problem.target[:32], problem.c[:32] = 0, 0
    problem.hessian[:32, 32:], problem.hessian[32:, :32] = 0, 0
    scale = problem.scale[0].clone()
    problem.descend()
    assert torch.equal(problem.scale[0], scale) and not problem.c[:32].any()
