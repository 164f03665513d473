"""Round to nearest: no group's grid is worse than min-max, and nothing depends on the blocking."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_hadacore import int4
from hf_hadacore.errors import QuantizationError
from hf_hadacore.int4 import Int4Weight
from hf_hadacore.solvers import rtn
from hf_hadacore.solvers.rtn import quantization_error, quantize_weight

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def weights(n: int, k: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Heavy-tailed rows with an offset, so that ranges are lopsided."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(n, k, generator=generator) ** 3 * 0.02 + 0.01).to(dtype)


def weighted_errors(
    weight: torch.Tensor, quantized: Int4Weight, importance: torch.Tensor | None = None
) -> torch.Tensor:
    """float64 ``[N, G]``: what the search promises to lower, written out group by group."""
    restored = quantized.dequantize(torch.float64)
    k, size = weight.shape[1], int4.effective_group_size(weight.shape[1], quantized.group_size)
    errors = []
    for start in range(0, k, size):
        w = weight[:, start : start + size].double()
        h = torch.ones(k, dtype=torch.float64) if importance is None else importance.double()
        padded_rms = (w.square().sum(-1, keepdim=True) / size).sqrt()
        emphasis = (w.abs() + padded_rms).square() * h[start : start + size]
        errors.append((emphasis * (restored[:, start : start + size] - w).square()).sum(-1))
    return torch.stack(errors, dim=1)


@settings(deadline=None, max_examples=40)
@given(
    n=st.integers(1, 5),
    k=st.sampled_from([8, 40, 64, 104, 136]),
    group_size=st.sampled_from(int4.GROUP_SIZES),
    symmetric=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
    is_weighted=st.booleans(),
)
def test_no_group_is_worse_than_min_max(n, k, group_size, symmetric, dtype, seed, is_weighted) -> None:
    weight = weights(n, k, dtype, seed)
    importance = torch.rand(k, generator=torch.Generator().manual_seed(seed)) if is_weighted else None
    options = dict(group_size=group_size, symmetric=symmetric, importance=importance)
    searched = weighted_errors(weight, quantize_weight(weight, **options), importance)
    plain = weighted_errors(weight, quantize_weight(weight, search=False, **options), importance)
    assert (searched <= plain * (1 + 1e-5) + 1e-12).all()


@pytest.mark.parametrize("symmetric", [False, True])
def test_search_lowers_the_error(symmetric: bool) -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    options = dict(group_size=128, symmetric=symmetric)
    searched = quantize_weight(weight, **options)
    plain = quantize_weight(weight, search=False, **options)
    assert weighted_errors(weight, searched).sum() < 0.95 * weighted_errors(weight, plain).sum()


def test_what_is_important_is_more_exact() -> None:
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    importance = torch.zeros(64)
    importance[:8] = 1
    plain = quantize_weight(weight, group_size=64, symmetric=False)
    weighted = quantize_weight(weight, group_size=64, symmetric=False, importance=importance)

    def error(quantized: Int4Weight) -> float:
        return float((quantized.dequantize(torch.float32) - weight)[:, :8].norm())

    assert error(weighted) < 0.8 * error(plain)


# Not min-max symmetric: it divides by 7.5, and no such grid ends at -8.
@pytest.mark.parametrize(("search", "symmetric"), [(False, False), (True, False), (True, True)])
def test_points_of_a_grid_are_kept(search: bool, symmetric: bool) -> None:
    q = torch.arange(16).repeat(3, 4)
    scale = torch.full((3, 1), 0.125)
    zero = None if symmetric else torch.full((3, 1), 5, dtype=torch.uint8)
    weight = int4.dequantize(int4.pack(q), scale, zero, group_size=64)
    restored = quantize_weight(weight, group_size=64, symmetric=symmetric, search=search).dequantize()
    torch.testing.assert_close(restored, weight, rtol=1e-6, atol=0)


def test_symmetric_scales_may_be_negative_for_the_longer_tail() -> None:
    weight = torch.linspace(-0.7, 0.8, 32)[None]
    quantized = quantize_weight(weight, group_size=32, symmetric=True)
    assert quantized.scale.item() < 0
    assert quantization_error(weight, quantized) < quantization_error(
        weight, quantize_weight(weight, group_size=32, symmetric=True, search=False)
    )


@pytest.mark.parametrize("symmetric", [False, True])
def test_zeros_and_constants(symmetric: bool) -> None:
    weight = torch.zeros(3, 64)
    weight[1] = 0.75
    weight[2] = -0.75
    quantized = quantize_weight(weight, group_size=32, symmetric=symmetric)
    assert (quantized.scale[0] == 1).all()
    torch.testing.assert_close(quantized.dequantize(), weight, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scales_have_their_dtype_and_integers_fit_the_rounded_scale(dtype: torch.dtype) -> None:
    weight = weights(4, 64)
    quantized = quantize_weight(weight, group_size=32, symmetric=False, scale_dtype=dtype)
    assert quantized.scale.dtype == dtype
    again = int4.quantize(weight, quantized.scale, quantized.zero, group_size=32)
    # Halfway cases aside, no integer can be improved for the scale that is stored.
    assert (quantized.dequantize(torch.float64) - again.dequantize(torch.float64)).abs().max() < 1e-6


def test_scales_that_fp16_cannot_hold_stay_finite() -> None:
    weight = torch.tensor([[6e4, -6e4] * 16, [1e-9, -1e-9] * 16], dtype=torch.float32)
    quantized = quantize_weight(weight, group_size=32, symmetric=False, scale_dtype=torch.float16)
    assert quantized.scale.isfinite().all()
    assert quantized.dequantize(torch.float32).isfinite().all()


def test_blocks_of_rows_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = weights(13, 72)
    whole = quantize_weight(weight, group_size=32, symmetric=False)
    monkeypatch.setattr(rtn, "_BLOCK_ELEMENTS", 5 * 72)
    parts = quantize_weight(weight, group_size=32, symmetric=False)
    assert all(torch.equal(one, other) for one, other in zip(whole[:3], parts[:3], strict=True))


def test_experts_are_quantized_one_by_one() -> None:
    weight = weights(12, 64).view(3, 4, 64)
    together = quantize_weight(weight, group_size=64, symmetric=False)
    assert together.packed.shape == (3, 4, 8)
    for expert in range(3):
        alone = quantize_weight(weight[expert], group_size=64, symmetric=False)
        assert torch.equal(together.packed[expert], alone.packed)


def test_no_rows() -> None:
    quantized = quantize_weight(torch.empty(0, 64), group_size=32, symmetric=False)
    assert quantized.packed.shape == (0, 8)
    assert quantized.scale.shape == (0, 2)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers_are_counted_and_named(value: float) -> None:
    weight = weights(4, 64)
    weight[1, 3] = weight[2, 5] = value
    with pytest.raises(QuantizationError, match=r"layer\.7: 2 weights are NaN or infinite"):
        quantize_weight(weight, group_size=32, symmetric=False, name="layer.7")


def test_rows_that_fill_no_whole_words() -> None:
    with pytest.raises(QuantizationError, match=r"layer\.7: .*multiple of 8.*\(4, 12\)"):
        quantize_weight(torch.zeros(4, 12), group_size=32, symmetric=False, name="layer.7")
