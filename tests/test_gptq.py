"""GPTQ against the paper's equations in float64, and what it promises: less output error, exact order."""

from functools import partial

import pytest
import torch
from gptq_cases import ORDERS, correlated, options_of, weights
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_hadacore import int4
from hf_hadacore.errors import QuantizationError
from hf_hadacore.int4 import Int4Weight
from hf_hadacore.solvers.act_order import falling_diagonal
from hf_hadacore.solvers.gptq import gptq_quantize
from hf_hadacore.solvers.hessian import factorize
from hf_hadacore.solvers.rtn import fit_groups, quantize_weight, round_to_grid


def in_natural_order(quantized: Int4Weight, kind: str, hessian: torch.Tensor) -> torch.Tensor:
    """float64 ``[N, K]``, the weight as it multiplies x."""
    values = quantized.dequantize(torch.float64)
    if kind != "permuted":
        return values
    restored = torch.empty_like(values)
    restored[:, falling_diagonal(hessian)] = values
    return restored


def output_error(weight: torch.Tensor, restored: torch.Tensor, hessian: torch.Tensor) -> float:
    h, w = hessian.double(), weight.double()
    d = restored.double() - w
    return float(((d @ h) * d).sum() / ((w @ h) * w).sum())


def papers_gptq(
    weight: torch.Tensor, hessian: torch.Tensor, kind: str, group_size: int, symmetric: bool
) -> torch.Tensor:
    """float64 ``[N, K]``: algorithm 1 of arXiv:2210.17323 without blocks, column by column."""
    k = weight.shape[1]
    size = int4.effective_group_size(k, group_size)
    order = torch.arange(k) if kind == "natural" else falling_diagonal(hessian)
    h = hessian.double()[order][:, order]
    h += 0.01 * h.diagonal().mean() * torch.eye(k, dtype=torch.float64)
    u = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    w = weight.double()[:, order]
    fit = partial(fit_groups, symmetric=symmetric, scale_dtype=weight.dtype, by_magnitude=False)
    cost = u.diagonal().pow(-2)
    natural_cost = torch.empty_like(cost).index_copy_(0, order, cost)
    scale, zero = fit(weight.float(), group_size=group_size, importance=natural_cost.float())
    q = torch.empty_like(w)
    for j in range(k):
        if kind == "static":
            group = int(order[j]) // size
        else:
            group = j // size
            if j % size == 0 and size < k:
                part = slice(j, j + size)
                now = fit(w[:, part].float(), group_size=-1, importance=cost[part].float())
                scale[:, group], zero[:, group] = now[0][:, 0], now[1][:, 0]
        q[:, j] = round_to_grid(w[:, j], scale[:, group], zero[:, group]) * scale[:, group].double()
        error = (w[:, j] - q[:, j]) / u[j, j]
        w[:, j:] -= error[:, None] * u[j, j:]
    restored = torch.empty_like(q)
    restored[:, order] = q
    return restored


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [32, 64, -1])
@pytest.mark.parametrize("kind", ORDERS)
def test_it_is_the_papers_algorithm(kind: str, group_size: int, symmetric: bool) -> None:
    """K = 168: two chunks, short last groups."""
    weight, hessian = weights(48, 168), correlated(168)
    result = gptq_quantize(
        weight, hessian, group_size=group_size, symmetric=symmetric, sweeps=0, **options_of(kind, hessian)
    )
    restored = in_natural_order(result.weight, kind, hessian)
    expected = papers_gptq(weight, hessian, kind, group_size, symmetric)
    # A tie that fp32 decides otherwise changes the rest of its row.
    same_rows = ((restored - expected).abs() < 1e-6).all(dim=1)
    assert same_rows.double().mean() > 0.9
    assert result.error == pytest.approx(output_error(weight, expected, hessian), rel=0.01)


@settings(deadline=None, max_examples=40)
@given(
    n=st.integers(1, 9),
    k=st.sampled_from([8, 40, 64, 136, 200]),
    group_size=st.sampled_from(int4.GROUP_SIZES),
    symmetric=st.booleans(),
    kind=st.sampled_from(ORDERS),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    rows=st.sampled_from([0, 1, 5, 500]),
    dead=st.integers(0, 8),
    seed=st.integers(0, 100),
)
def test_every_hessian_gives_a_valid_weight(
    n, k, group_size, symmetric, kind, dtype, rows, dead, seed
) -> None:
    """One sample, none, dead channels: finite weights of the format, and an error that is the true one."""
    weight = weights(n, k, dtype, seed)
    hessian = correlated(k, rows, seed) if rows else torch.zeros(k, k)
    hessian[:dead] = 0
    hessian[:, :dead] = 0
    result = gptq_quantize(
        weight, hessian, group_size=group_size, symmetric=symmetric, **options_of(kind, hessian)
    )
    int4.check(*result.weight[:3], group_size=group_size)
    assert result.weight.scale.dtype == dtype and (result.weight.zero is None) == symmetric
    restored = in_natural_order(result.weight, kind, hessian)
    assert restored.isfinite().all() and result.damping >= 0.01
    if hessian.any():
        assert result.error == pytest.approx(output_error(weight, restored, hessian), rel=1e-3, abs=1e-6)
    else:
        assert result.error == 0
    # No weight strays: what compensates stays of the size of a group's range.
    assert (restored - weight.double()).abs().max() < 0.1


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [64, -1])
@pytest.mark.parametrize("kind", ORDERS)
def test_outputs_change_less_than_by_rounding(kind: str, group_size: int, symmetric: bool) -> None:
    weight, hessian = weights(32, 256), correlated(256)
    options = dict(group_size=group_size, symmetric=symmetric)
    rounded = quantize_weight(weight, **options, importance=hessian.diagonal())
    result = gptq_quantize(weight, hessian, **options, **options_of(kind, hessian))
    assert result.error < 0.6 * output_error(weight, rounded.dequantize(torch.float64), hessian)


def test_act_order_helps_where_channels_differ() -> None:
    weight, hessian = weights(32, 256), correlated(256)
    errors = {
        kind: gptq_quantize(
            weight, hessian, group_size=-1, symmetric=False, **options_of(kind, hessian)
        ).error
        for kind in ORDERS
    }
    assert errors["static"] == pytest.approx(errors["permuted"], rel=1e-2)
    assert errors["permuted"] < 0.98 * errors["natural"]


@pytest.mark.parametrize("group_size", [32, 128])
def test_permuted_groups_are_those_of_a_permuted_layer(group_size: int) -> None:
    """Quantizing in an order is quantizing the layer whose inputs come in that order, bit for bit."""
    weight, hessian = weights(16, 200), correlated(200)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    options = dict(group_size=group_size, symmetric=False)
    in_order = gptq_quantize(weight, hessian, order=order, **options).weight
    permuted = gptq_quantize(weight[:, order], hessian[order][:, order], **options).weight
    assert all(torch.equal(a, b) for a, b in zip(in_order[:3], permuted[:3], strict=True))


@pytest.mark.parametrize("kind", ORDERS)
def test_independent_channels_are_rounded_to_the_nearest(kind: str) -> None:
    weight = weights(16, 200)
    hessian = torch.diag(torch.rand(200, generator=torch.Generator().manual_seed(0)) + 0.1)
    result = gptq_quantize(
        weight, hessian, group_size=64, symmetric=False, damping=0.0, sweeps=0, **options_of(kind, hessian)
    )
    values = weight[:, falling_diagonal(hessian)] if kind == "permuted" else weight
    nearest = int4.quantize(values, result.weight.scale, result.weight.zero, group_size=64)
    assert torch.equal(result.weight.packed, nearest.packed)


@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize("kind", ORDERS)
def test_sweeps_lower_the_error(kind: str, group_size: int) -> None:
    weight, hessian = weights(32, 200), correlated(200)
    errors = [
        gptq_quantize(
            weight, hessian, group_size=group_size, symmetric=False, sweeps=n, **options_of(kind, hessian)
        ).error
        for n in range(3)
    ]
    assert errors[1] < 0.99 * errors[0] and errors[2] < errors[1]


def test_one_factorization_serves_all_layers_of_an_input() -> None:
    first, second, hessian = weights(16, 136), weights(24, 136, seed=1), correlated(136)
    order = falling_diagonal(hessian)
    options = dict(group_size=64, symmetric=False)
    factors = factorize(hessian, order=order)
    together = gptq_quantize(torch.cat([first, second]), factors, **options).weight.dequantize()
    for part, weight in zip(together.split([16, 24]), (first, second), strict=True):
        alone = gptq_quantize(weight, factors, **options).weight.dequantize()
        assert torch.equal(alone, gptq_quantize(weight, hessian, order=order, **options).weight.dequantize())
        # Products of other shapes sum in another order, which may decide a tie.
        assert (part == alone).all(dim=1).double().mean() > 0.9


def test_it_is_deterministic() -> None:
    weight, hessian = weights(16, 136, torch.bfloat16), correlated(136)
    first, second = (gptq_quantize(weight, hessian, group_size=32, symmetric=False) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.weight[:3], second.weight[:3], strict=True))
    assert first.error == second.error


def test_inputs_are_left_alone() -> None:
    weight, hessian = weights(16, 64), correlated(64)
    before = weight.clone(), hessian.clone()
    gptq_quantize(weight, hessian, group_size=32, symmetric=False, order=falling_diagonal(hessian))
    assert torch.equal(weight, before[0]) and torch.equal(hessian, before[1])


def test_scales_have_the_dtype_asked_for() -> None:
    result = gptq_quantize(
        weights(4, 64), correlated(64), group_size=32, symmetric=True, scale_dtype=torch.float16
    )
    assert result.weight.scale.dtype == torch.float16


def test_a_weight_of_zeros_stays_zero() -> None:
    result = gptq_quantize(torch.zeros(4, 64), correlated(64), group_size=32, symmetric=False)
    assert not result.weight.dequantize().any() and result.error == 0


@pytest.mark.parametrize(
    ("weight", "options", "message"),
    [
        (torch.zeros(4, 12), {}, r"multiple of 8, found shape \(4, 12\)"),
        (torch.zeros(2, 4, 16), {}, r"\[N, K\].*found shape \(2, 4, 16\)"),
        (torch.full((4, 16), float("nan")), {}, "64 weights are NaN"),
        (torch.zeros(4, 24), {}, "24 inputs and a Hessian of 16"),
        (torch.zeros(4, 16), dict(order=torch.zeros(16, dtype=torch.int64)), "no permutation of 16"),
    ],
)
def test_what_does_not_fit_is_named(weight: torch.Tensor, options: dict, message: str) -> None:
    with pytest.raises(QuantizationError, match=f"layers.1.up_proj: .*{message}"):
        gptq_quantize(
            weight, torch.eye(16), group_size=32, symmetric=False, name="layers.1.up_proj", **options
        )


def test_a_factorized_hessian_has_its_order() -> None:
    with pytest.raises(QuantizationError, match="has its order already"):
        gptq_quantize(
            torch.zeros(4, 16),
            factorize(torch.eye(16)),
            group_size=32,
            symmetric=False,
            order=torch.arange(16),
        )
