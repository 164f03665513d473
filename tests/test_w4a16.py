"""The op, its reference, its gradients and the CPU paths, against float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_helpers import exact_product, in_floors, is_within_bounds, random_weight
from torch.library import opcheck

from hf_hadacore import HadaCoreConfig, HadaCoreLinear, int4
from hf_hadacore.errors import FormatError
from hf_hadacore.kernels import w4a16_cpu
from hf_hadacore.kernels.w4a16 import w4a16_linear, w4a16_linear_reference

# Floors that each path may reach. fp32 sums of K products cannot stay at fp32's own floor. The bf16 CPU paths
# round what they multiply to bf16 before: the weights when dequantizing, `zero = (8 - z) * scale` when
# decoding, each an error of its own of up to one floor.
MAX_FLOORS = {torch.float16: 1.1, torch.float32: 40.0}
MAX_FLOORS_BF16_CPU = 2.0

DTYPES = st.sampled_from([torch.float16, torch.bfloat16, torch.float32])


@st.composite
def problems(draw):
    n, k = draw(st.integers(1, 70)), 8 * draw(st.integers(1, 40))
    group_size, symmetric = draw(st.sampled_from(int4.GROUP_SIZES)), draw(st.booleans())
    seed = draw(st.integers(0, 2**31))
    weight = random_weight(n, k, group_size, symmetric, draw(DTYPES), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    lead = draw(st.sampled_from([(), (1,), (3,), (2, 5), (33,), (0,), (2, 0, 3)]))
    layout = draw(st.sampled_from(["contiguous", "offset", "strided"]))
    dtype = draw(DTYPES)
    if layout == "contiguous":
        x = torch.randn(*lead, k, generator=generator).to(dtype)
    elif layout == "offset":
        x = torch.randn(*lead, k + 3, generator=generator).to(dtype)[..., 3:]
    else:
        x = torch.randn(*lead, 2 * k, generator=generator).to(dtype)[..., ::2]
    bias = torch.randn(n, generator=generator).to(dtype) if draw(st.booleans()) else None
    perm = torch.randperm(k, generator=generator).int() if draw(st.booleans()) else None
    return x, weight, perm, bias


@given(problems())
@settings(deadline=None, max_examples=150)
def test_reference_rounds_once(problem):
    x, weight, perm, bias = problem
    y = w4a16_linear_reference(x, *weight[:3], perm, bias, weight.group_size)
    assert y.shape == (*x.shape[:-1], weight.packed.shape[0]) and y.dtype == x.dtype
    assert is_within_bounds(y, x, weight, perm, bias, product_roundoff=0)


@given(problems())
@settings(deadline=None, max_examples=150)
def test_op_on_the_cpu(problem):
    x, weight, perm, bias = problem
    y = w4a16_linear(x, *weight[:3], perm, bias, group_size=weight.group_size)
    assert y.shape == (*x.shape[:-1], weight.packed.shape[0]) and y.dtype == x.dtype
    # Products in bf16 round the weights and the bias first, and may round before the bias is added.
    roundoff = 2.0**-7.5 if x.dtype == torch.bfloat16 else 0
    assert is_within_bounds(y, x, weight, perm, bias, roundoff)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_errors_in_floors(dtype):
    weight = random_weight(256, 576, 64, False, dtype)
    x, bias = torch.randn(33, 576).to(dtype), torch.randn(256).to(dtype)
    exact = exact_product(x, weight, None, bias)
    limit = MAX_FLOORS.get(dtype, 1.1)
    assert in_floors(w4a16_linear_reference(x, *weight[:3], None, bias, 64), exact) <= limit
    limit = MAX_FLOORS.get(dtype, MAX_FLOORS_BF16_CPU)
    assert in_floors(w4a16_linear(x, *weight[:3], None, bias, group_size=64), exact) <= limit


@given(problems())
@settings(deadline=None, max_examples=100)
def test_dequantized_rows_are_exact(problem):
    _, weight, _, _ = problem
    for dtype in (torch.float32, torch.bfloat16):
        got = w4a16_cpu._dequantize_rows(*weight[:3], weight.group_size, dtype)
        assert torch.equal(got, weight.dequantize(torch.float32).to(dtype))


@pytest.mark.parametrize("k", [8, 48, 576, 1024, 1096])
@pytest.mark.parametrize("group_size", int4.GROUP_SIZES)
@pytest.mark.parametrize("symmetric", [False, True])
def test_decode_on_the_cpu(k, group_size, symmetric):
    n = 333  # padded to a multiple of 16 inside
    weight = random_weight(n, k, group_size, symmetric, torch.bfloat16)
    packed = w4a16_cpu.pack_for_cpu(weight)
    bias = torch.randn(n).bfloat16()
    for m in (1, 5):
        x = torch.randn(m, k).bfloat16()
        y = w4a16_cpu.w4a16_decode_cpu(x, packed, bias)
        assert y.shape == (m, n) and y.is_contiguous()
        assert in_floors(y, exact_product(x, weight, None, bias)) <= MAX_FLOORS_BF16_CPU


def test_blocks_of_rows_do_not_change_the_result(monkeypatch):
    weight = random_weight(100, 136, 32, False, torch.float32)
    x = torch.randn(3, 136)
    monkeypatch.setattr(w4a16_cpu, "_BLOCK_ELEMENTS", 136 * 7)
    y = w4a16_linear(x, *weight[:3], group_size=32)
    assert y.shape == (3, 100)
    assert in_floors(y, exact_product(x, weight)) <= MAX_FLOORS[torch.float32]


def test_bad_rows_stay_alone():
    weight = random_weight(32, 64, 32, False, torch.bfloat16)
    layer = HadaCoreLinear(64, 32, False, group_size=32, symmetric=False, dtype=torch.bfloat16)
    layer.set_int4(weight)
    for value in (float("nan"), float("inf")):
        x = torch.ones(3, 64).bfloat16()
        x[1, 5] = value
        for y in (layer(x), w4a16_linear(x, *weight[:3], group_size=32)):
            assert y[[0, 2]].isfinite().all()
            assert not y[1].isfinite().all()


def test_all_zero_groups_give_zero():
    layer = HadaCoreLinear.from_linear(torch.nn.Linear(64, 8, bias=False), HadaCoreConfig(group_size=32))
    layer.weight_scale.data[:, 0] = 0
    x = torch.zeros(2, 64)
    x[:, :32] = torch.randn(2, 32)
    assert (layer(x) == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients(dtype):
    weight = random_weight(24, 72, 32, False, dtype)
    perm = torch.randperm(72).int()
    x = torch.randn(2, 5, 72, dtype=dtype, requires_grad=True)
    bias = torch.randn(24, dtype=dtype, requires_grad=True)
    upstream = torch.randn(2, 5, 24, dtype=dtype)
    w4a16_linear(x, *weight[:3], perm, bias, group_size=32).backward(upstream)
    w = weight.dequantize(torch.float64)
    expected = torch.zeros(2, 5, 72, dtype=torch.float64)
    expected[..., perm.long()] = upstream.double() @ w
    limit = MAX_FLOORS.get(dtype, MAX_FLOORS_BF16_CPU)
    assert in_floors(x.grad, expected) <= limit
    assert in_floors(bias.grad, upstream.double().sum((0, 1))) <= limit


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck_linear(requires_grad):
    for group_size, symmetric in ((32, False), (-1, True)):
        weight = random_weight(24, 72, group_size, symmetric, torch.float32)
        x = torch.randn(2, 3, 72, requires_grad=requires_grad)
        bias = torch.randn(24, requires_grad=requires_grad)
        perm = torch.randperm(72).int()
        opcheck(torch.ops.hf_hadacore.w4a16_linear.default, (x, *weight[:3], perm, bias, group_size))


def test_opcheck_decode():
    packed = w4a16_cpu.pack_for_cpu(random_weight(30, 72, 32, False, torch.bfloat16))
    x = torch.randn(2, 3, 72).bfloat16()
    arguments = (x, packed.tiles, packed.scales_zeros, torch.randn(30).bfloat16(), packed.group_size, 30)
    opcheck(torch.ops.hf_hadacore.w4a16_decode_cpu.default, arguments)


def test_layer_takes_each_path(monkeypatch):
    calls = []
    real = w4a16_cpu.w4a16_decode_cpu
    monkeypatch.setattr(
        "hf_hadacore.modules.linear.w4a16_decode_cpu",
        lambda *args: calls.append(args[0].shape) or real(*args),
    )
    layer = HadaCoreLinear.from_linear(torch.nn.Linear(64, 48).bfloat16(), HadaCoreConfig(group_size=32))
    x = torch.randn(w4a16_cpu.MAX_DECODE_TOKENS, 64).bfloat16()
    layer(x)
    assert calls == [x.shape]
    layer(torch.cat((x, x)))
    layer(x.clone().requires_grad_())
    layer(x.float())
    layer(x[:0])
    assert len(calls) == 1


def test_cpu_copy_follows_the_weight():
    config = HadaCoreConfig(group_size=32)
    first = HadaCoreLinear.from_linear(torch.nn.Linear(64, 48).bfloat16(), config)
    second = HadaCoreLinear.from_linear(torch.nn.Linear(64, 48).bfloat16(), config)
    x = torch.randn(2, 64).bfloat16()
    expected = second(x)
    assert not torch.equal(first(x), expected)
    first.load_state_dict(second.state_dict())
    assert torch.equal(first(x), expected)
    first.set_int4(HadaCoreLinear.from_linear(torch.nn.Linear(64, 48).bfloat16(), config).int4_weight())
    assert not torch.equal(first(x), expected)


def test_errors_name_the_tensor():
    weight = random_weight(24, 72, 32, False, torch.float16)
    x = torch.randn(2, 72).half()
    with pytest.raises(FormatError, match=r"x: expected floating point \[\.\.\., 72\], found .* \(2, 64\)"):
        w4a16_linear(x[:, :64], *weight[:3], group_size=32)
    with pytest.raises(FormatError, match="weight_scale: expected"):
        w4a16_linear(x, *weight[:3], group_size=64)
    with pytest.raises(FormatError, match=r"bias: expected shape \(24,\), found \(23,\)"):
        w4a16_linear(x, *weight[:3], None, torch.zeros(23).half(), group_size=32)
    with pytest.raises(FormatError, match="input_perm: expected"):
        w4a16_linear(x, *weight[:3], torch.zeros(72), group_size=32)
    with pytest.raises(FormatError, match="multiple of 8"):
        HadaCoreLinear(12, 8, group_size=32, symmetric=True)
