"""The int4 format: pack, unpack and dequantize are exact and each other's inverse."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_hadacore import int4
from hf_hadacore.errors import FormatError

GROUP_SIZES = st.sampled_from(int4.GROUP_SIZES)


@st.composite
def weights(draw):
    """(q, scale, zero, group size) of a random weight, expert dimension and short group included."""
    lead = draw(st.sampled_from([(), (3,)]))
    n, k = draw(st.integers(0, 5)), 8 * draw(st.integers(1, 40))
    group_size = draw(GROUP_SIZES)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    groups = (*lead, n, int4.num_groups(k, group_size))
    q = torch.randint(0, 16, (*lead, n, k), generator=generator, dtype=torch.uint8)
    dtype = draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32]))
    scale = torch.randn(groups, generator=generator).to(dtype)
    zero = (
        torch.randint(0, 16, groups, generator=generator, dtype=torch.uint8) if draw(st.booleans()) else None
    )
    return q, scale, zero, group_size


def test_words_hold_eight_consecutive_k_lowest_bits_first():
    q = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8, 15, 0, 0, 0, 0, 0, 0, 15]])
    packed = int4.pack(q)
    assert packed.dtype == torch.int32
    assert [word & 0xFFFFFFFF for word in packed[0].tolist()] == [0x87654321, 0xF000000F]


@given(weights())
@settings(deadline=None)
def test_unpack_inverts_pack(weight):
    q, *_ = weight
    packed = int4.pack(q)
    assert packed.shape == (*q.shape[:-1], q.shape[-1] // 8)
    assert torch.equal(int4.unpack(packed), q)
    assert torch.equal(int4.pack(int4.unpack(packed)), packed)


@given(weights())
@settings(deadline=None)
def test_dequantize_is_the_definition(weight):
    q, scale, zero, group_size = weight
    k = q.shape[-1]
    size = k if group_size == -1 else group_size
    group = torch.arange(k) // size
    z = torch.full_like(scale, 8, dtype=torch.float64) if zero is None else zero.double()
    expected = (q.double() - z[..., group]) * scale.double()[..., group]
    got = int4.dequantize(int4.pack(q), scale, zero, group_size=group_size, dtype=torch.float64)
    assert torch.equal(got, expected)
    if scale.dtype != torch.float32:
        fp32 = int4.dequantize(int4.pack(q), scale, zero, group_size=group_size, dtype=torch.float32)
        assert torch.equal(fp32.double(), expected)
    rounded = int4.dequantize(int4.pack(q), scale, zero, group_size=group_size)
    assert rounded.dtype == scale.dtype
    assert torch.equal(rounded, expected.to(scale.dtype))


@given(weights())
@settings(deadline=None)
def test_quantize_inverts_dequantize(weight):
    q, scale, zero, group_size = weight
    scale = scale.abs() + 0.5
    values = int4.dequantize(int4.pack(q), scale, zero, group_size=group_size, dtype=torch.float32)
    again = int4.quantize(values, scale, zero, group_size=group_size)
    assert torch.equal(int4.unpack(again.packed), q)


def test_quantize_saturates():
    weight = torch.tensor([[100.0, -100.0] + [0.0] * 6])
    quantized = int4.quantize(weight, torch.ones(1, 1), None, group_size=-1)
    assert int4.unpack(quantized.packed)[0, :3].tolist() == [15, 0, 8]


def test_non_contiguous_input():
    q = torch.randint(0, 16, (16, 6), dtype=torch.uint8).T
    assert torch.equal(int4.unpack(int4.pack(q)), q)
    packed = int4.pack(torch.randint(0, 16, (4, 64), dtype=torch.uint8))
    assert torch.equal(int4.unpack(packed[:, ::2]), int4.unpack(packed[:, ::2].contiguous()))


def test_dimensions_of_one_element_may_have_any_stride():
    q = torch.randint(0, 16, (64, 1), dtype=torch.uint8).T
    assert torch.equal(int4.unpack(int4.pack(q)), q)
    words = int4.pack(torch.randint(0, 16, (1, 40), dtype=torch.uint8)).T
    assert torch.equal(int4.unpack(words).flatten(), int4.unpack(words.T).flatten())


@pytest.mark.parametrize(
    ("k", "group_size", "groups"), [(576, 128, 5), (576, -1, 1), (64, 128, 1), (128, 128, 1), (136, 32, 5)]
)
def test_num_groups(k, group_size, groups):
    assert int4.num_groups(k, group_size) == groups


def test_errors_name_the_tensor():
    packed = torch.zeros(2, 4, dtype=torch.int32)
    with pytest.raises(FormatError, match="multiple of 8"):
        int4.pack(torch.zeros(2, 12, dtype=torch.uint8))
    with pytest.raises(FormatError, match="integer tensor"):
        int4.pack(torch.zeros(2, 16))
    with pytest.raises(FormatError, match="int32"):
        int4.unpack(packed.to(torch.int64))
    with pytest.raises(FormatError, match=r"weight_scale: expected .* \(2, 1\).*found .* \(2, 3\)"):
        int4.dequantize(packed, torch.ones(2, 3), group_size=32)
    with pytest.raises(FormatError, match="weight_zero: expected uint8"):
        int4.dequantize(packed, torch.ones(2, 1), torch.ones(2, 1), group_size=32)
    with pytest.raises(FormatError, match="group_size"):
        int4.dequantize(packed, torch.ones(2, 1), group_size=0)
