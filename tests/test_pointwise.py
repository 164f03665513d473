"""The pointwise ops on the CPU: what they compute, what they refuse, and that torch can trace them."""

import pytest
import torch
from pointwise_cases import (
    EPS,
    FORMULAS,
    cos_sin,
    exact_activation,
    exact_norm,
    exact_rotation,
    random,
    strided,
)

from hf_hadacore.errors import FormatError
from hf_hadacore.kernels.gated_activation import ACTIVATIONS, gated_activation
from hf_hadacore.kernels.rms_norm import add_rms_norm, rms_norm
from hf_hadacore.kernels.rope import rope, rope_into_cache

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
ops = torch.ops.hf_hadacore


def roundings(y: torch.Tensor, exact: torch.Tensor) -> float:
    """The largest error of an element, in roundings of its own size (2 is one unit in the last place)."""
    step = torch.finfo(y.dtype).eps / 2 * exact.abs() + torch.finfo(y.dtype).smallest_normal
    return float(((y.double() - exact).abs() / step).max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("formula", FORMULAS)
def test_norms_against_float64(formula, dtype):
    weight_offset, round_before_weight = formula
    options = dict(weight_offset=weight_offset, round_before_weight=round_before_weight)
    x, residual = strided((3, 5, 57), dtype), random((3, 5, 57), dtype, seed=1)
    weight = random((57,), dtype, seed=2)
    # In fp32 the rounding of the mean and of its root weigh as much as that of the result.
    bound = 8 if dtype == torch.float32 else 2.1 if round_before_weight else 1.1
    y = rms_norm(x, weight, EPS, **options)
    assert roundings(y, exact_norm(x, weight, weight_offset)) <= bound
    normed, total = add_rms_norm(x, residual, weight, EPS, **options)
    assert torch.equal(total, x + residual)
    assert torch.equal(normed, rms_norm(total, weight, EPS, **options))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_against_float64(activation, dtype):
    gate, up = random((4, 5, 90), dtype).chunk(2, dim=-1)
    y = gated_activation(gate, up, activation)
    exact = exact_activation(gate, up, activation)
    assert y.is_contiguous()
    assert dtype == torch.float32 or roundings(y[gate > 0], exact[gate > 0]) <= 2.1
    # Eager GELU cancels for negative gates.
    torch.testing.assert_close(y.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_norm", [False, True])
def test_rope_against_float64(has_norm, dtype):
    q, k = random((2, 3, 4, 16), dtype), random((2, 3, 2, 16), dtype, seed=1)
    cos, sin = cos_sin(2, 3, 16, dtype)
    weights = (random((16,), dtype, seed=2), random((16,), dtype, seed=3)) if has_norm else (None, None)
    rotated = rope(q, k, cos, sin, *weights, eps=EPS)
    for y, x, weight in zip(rotated, (q, k), weights, strict=True):
        exact = exact_rotation(x, cos, sin, weight).transpose(1, 2)
        assert y.shape == exact.shape
        error = (y.double() - exact).norm() / exact.norm()
        assert error <= 1.5 * torch.finfo(dtype).eps / 2


def test_cache_is_written_at_the_position():
    q, k, v = (random((2, 3, heads, 8), torch.float16, seed=heads) for heads in (4, 2, 3))
    v = v[:, :, :2]
    cos, sin = cos_sin(1, 3, 8, torch.float16)
    keys, values = (torch.full((2, 2, 10, 8), float("nan"), dtype=torch.float16) for _ in range(2))
    position = torch.tensor([4])
    rotated, expected = rope(q, k, cos, sin)
    assert torch.equal(rope_into_cache(q, k, v, cos, sin, keys, values, position), rotated)
    assert position == 4
    assert torch.equal(keys[:, :, 4:7], expected)
    assert torch.equal(values[:, :, 4:7], v.transpose(1, 2))
    for cache in (keys, values):
        assert cache[:, :, :4].isnan().all() and cache[:, :, 7:].isnan().all()


def test_no_tokens():
    x = torch.empty(0, 16)
    assert rms_norm(x, torch.ones(16), EPS).shape == (0, 16)
    assert add_rms_norm(x, x, torch.ones(16), EPS)[1].shape == (0, 16)
    assert gated_activation(x, x).shape == (0, 16)
    q, cos = torch.empty(1, 0, 4, 8), torch.empty(1, 0, 8)
    assert rope(q, q[:, :, :2], cos, cos)[0].shape == (1, 4, 0, 8)
    cache = torch.zeros(1, 2, 5, 8)
    rope_into_cache(q, q[:, :, :2], q[:, :, :2], cos, cos, cache, cache.clone(), torch.tensor(3))
    assert not cache.any()


def test_opcheck():
    for dtype in (torch.float16, torch.float32):
        x, residual, weight = strided((2, 3, 24), dtype), random((2, 3, 24), dtype), random((24,), dtype)
        torch.library.opcheck(ops.rms_norm.default, (x, weight, EPS, 1.0, False))
        torch.library.opcheck(ops.add_rms_norm.default, (x, residual, weight, EPS, 0.0, True))
        torch.library.opcheck(ops.gated_activation.default, (*residual.chunk(2, dim=-1), "silu"))
        q, k, v = (random((2, 3, heads, 8), dtype) for heads in (4, 2, 2))
        cos, sin = cos_sin(2, 3, 8, dtype)
        for weights in ((None, None), (weight[:8], weight[8:16])):
            norm = (*weights, EPS, 0.0, True)
            torch.library.opcheck(ops.rope.default, (q, k, cos, sin, *norm))
            cache = (torch.zeros(2, 2, 9, 8, dtype=dtype), torch.zeros(2, 2, 9, 8, dtype=dtype))
            arguments = (q, k, v, cos, sin, *norm, *cache, torch.tensor(4))
            torch.library.opcheck(ops.rope_into_cache.default, arguments)


def test_refuses_what_does_not_fit():
    x, weight = torch.ones(2, 16), torch.ones(16)
    q, k = torch.ones(1, 2, 4, 8), torch.ones(1, 2, 2, 8)
    cos = torch.ones(1, 2, 8)
    cache, position = torch.zeros(1, 2, 5, 8), torch.tensor(0)

    def write(v=k, keys=cache, values=cache, position=position):
        rope_into_cache(q, k, v, cos, cos, keys, values, position)

    for call, name in [
        (lambda: rms_norm(x, weight[:8], EPS), r"weight.*\(8,\)"),
        (lambda: rms_norm(x, weight.half(), EPS), "weight.*float16"),
        (lambda: add_rms_norm(x, x[:1], weight, EPS), r"residual.*\(1, 16\)"),
        (lambda: gated_activation(x, x.half()), "up.*float16"),
        (lambda: gated_activation(x, x, "relu"), "activation.*relu"),
        (lambda: rope(q, k[:, :1], cos, cos), r"k torch.float32 \(1, 1, 2, 8\)"),
        (lambda: rope(q[..., :7], k[..., :7], cos[..., :7], cos[..., :7]), "even D"),
        (lambda: rope(q, k, cos[..., :4], cos), r"cos torch.float32 \(1, 2, 4\)"),
        (lambda: rope(q, k, cos, cos.half()), "sin torch.float16"),
        (lambda: rope(q, k, cos, cos, weight[:8]), "both or neither"),
        (lambda: rope(q, k, cos, cos, weight[:8], weight), r"k_weight torch.float32 \(16,\)"),
        (lambda: write(v=k[:, :, :1]), r"v torch.float32 \(1, 2, 1, 8\)"),
        (lambda: write(keys=cache[:, :1]), r"keys torch.float32 \(1, 1, 5, 8\)"),
        (lambda: write(values=cache.half()), "values torch.float16"),
        (lambda: write(keys=cache.mT.contiguous().mT), "contiguous keys"),
        (lambda: write(position=position.int()), "position torch.int32"),
    ]:
        with pytest.raises(FormatError, match=name):
            call()
