"""What calibration gathers: streamed sums, factors that multiply back, damping that recovers, act-order."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_hadacore.errors import QuantizationError
from hf_hadacore.solvers.act_order import falling_diagonal
from hf_hadacore.solvers.hessian import Hessian, factorize


def inputs(rows: int, k: int, seed: int = 0) -> torch.Tensor:
    """Correlated activations whose channels differ in size."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(rows, k, generator=generator) @ torch.randn(k, k, generator=generator) / k**0.5
    return mixed * torch.rand(k, generator=generator).mul(3).exp()


def gram(x: torch.Tensor) -> torch.Tensor:
    return x.double().T @ x.double() / len(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_batches_of_any_shape_add_up(dtype: torch.dtype) -> None:
    x = inputs(60, 16).to(dtype)
    hessian = Hessian(16)
    hessian.add(x[:20].view(2, 10, 16))
    hessian.add(x[20])
    hessian.add(x[21:])
    hessian.add(x[:0])
    assert hessian.rows == 60
    torch.testing.assert_close(hessian.matrix().double(), gram(x), rtol=1e-5, atol=1e-5)
    assert hessian.matrix().dtype == torch.float32


def test_no_rows_are_zeros() -> None:
    assert not Hessian(8).matrix().any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_inputs_that_are_not_finite_are_named(bad: float) -> None:
    x = inputs(4, 16)
    x[1, 5] = bad
    hessian = Hessian(16, name="layers.3.mlp.down_proj")
    hessian.add(x)
    with pytest.raises(QuantizationError, match=r"layers\.3\.mlp\.down_proj.*1 of 16.*channel 5"):
        hessian.matrix()


def test_other_channels_are_an_error() -> None:
    with pytest.raises(QuantizationError, match=r"expected 16 channels, found shape \(2, 8\)"):
        Hessian(16).add(torch.ones(2, 8))


@settings(deadline=None, max_examples=30)
@given(
    k=st.integers(1, 40),
    rows=st.integers(0, 60),
    dead=st.integers(0, 8),
    is_ordered=st.booleans(),
    seed=st.integers(0, 100),
)
def test_factors_multiply_back(k: int, rows: int, dead: int, is_ordered: bool, seed: int) -> None:
    """Whatever was seen: few rows, dead channels, nothing at all."""
    x = inputs(rows, k, seed)
    x[:, :dead] = 0
    hessian = Hessian(k)
    hessian.add(x)
    matrix = hessian.matrix()
    order = torch.randperm(k, generator=torch.Generator().manual_seed(seed)) if is_ordered else None
    factors = factorize(matrix, order=order)

    diagonal = matrix.diagonal().double()
    mean = diagonal[diagonal > 0].mean() if diagonal.any() else 1.0
    expected = matrix.double() + torch.diag(torch.where(diagonal > 0, 0, mean) + factors.damping * mean)
    if order is not None:
        expected = expected[order][:, order]
    u = factors.factor.double()
    assert torch.equal(u, u.triu()) and torch.equal(u.diagonal(), torch.ones_like(u.diagonal()))
    product = u * factors.variance.double() @ u.T
    torch.testing.assert_close(product, expected, rtol=1e-4, atol=1e-5 * float(expected.diagonal().max()))


def test_damping_grows_until_the_matrix_is_definite() -> None:
    x = inputs(1, 24)
    regular, singular = gram(inputs(500, 24)).float(), gram(x).float()
    assert factorize(regular, damping=0.0).damping == 0
    assert 0 < factorize(singular, damping=0.0).damping <= 0.01
    # A negative eigenvalue of 0.03 of the mean diagonal: 0.01 is not enough, 0.1 is.
    values = torch.ones(24)
    values[0] = -0.03
    basis = torch.linalg.qr(torch.randn(24, 24, generator=torch.Generator().manual_seed(0))).Q
    assert factorize(basis * values @ basis.T, damping=0.01).damping == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h[:-1], r"\[K, K\], found shape \(7, 8\)"),
        (lambda h: h.fill_(float("nan")), "8 of 8 input channels are NaN"),
        (lambda h: h.index_put_((torch.tensor(2), torch.tensor(3)), torch.tensor(float("inf"))), "channel 2"),
        (lambda h: h.neg_(), "negative diagonal"),
        (lambda h: h.fill_(9).fill_diagonal_(1), "not positive semidefinite"),
    ],
)
def test_what_is_no_hessian_is_named(change, message: str) -> None:
    with pytest.raises(QuantizationError, match=f"layers.0.q_proj: .*{message}"):
        factorize(change(gram(inputs(50, 8)).float()), name="layers.0.q_proj")


@pytest.mark.parametrize("order", [[0, 1, 2], [0, 0, 1, 2], [1, 2, 3, 4]])
def test_an_order_is_a_permutation(order: list[int]) -> None:
    with pytest.raises(QuantizationError, match="no permutation of 4 channels"):
        factorize(torch.eye(4), order=torch.tensor(order))


def test_falling_diagonal() -> None:
    hessian = torch.diag(torch.tensor([1.0, 5, 0, 5, 2, 9]))
    assert falling_diagonal(hessian).tolist() == [5, 1, 3, 4, 0, 2]
    assert falling_diagonal(hessian, within=3).tolist() == [1, 0, 2, 5, 3, 4]
    # Sums of the two blocks: 6, 7, 9.
    assert falling_diagonal(hessian, within=3, repeats=2).tolist() == [2, 1, 0, 5, 4, 3]


def test_blocks_that_do_not_fit_are_an_error() -> None:
    with pytest.raises(QuantizationError, match="12 channels are not blocks of 4, 2 of them together"):
        falling_diagonal(torch.eye(12), within=4, repeats=2)
