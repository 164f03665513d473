"""The tile order, the op that reads it (its reference: CI has no GPU), its schedules, layers that use it."""

import copy
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_helpers import exact_product, in_floors, random_weight
from torch import nn
from torch.library import opcheck

from hf_hadacore import HadaCoreConfig, HadaCoreLinear, int4
from hf_hadacore.errors import ConfigError, FormatError
from hf_hadacore.kernels import w4a16_schedules as schedules
from hf_hadacore.kernels import w4a16_tiles
from hf_hadacore.kernels.w4a16_tiled import prefers_tiles, w4a16_tiled
from hf_hadacore.kernels.w4a16_tiles import from_tiles, to_tiles
from hf_hadacore.modules import tile_order
from hf_hadacore.modules.linear_group import forward_together


def tiled_weight(n: int, k: int, group_size: int, symmetric: bool, dtype: torch.dtype):
    """A random weight, and its tensors as the tiled op takes them."""
    weight = random_weight(n, k, group_size, symmetric, dtype)
    columns = [None if t is None else t.t().contiguous().t() for t in weight[1:3]]
    return weight, (to_tiles(weight.packed), *columns)


@given(st.integers(1, 3), st.integers(1, 3), st.sampled_from([(), (2,)]), st.integers(0, 2**31))
@settings(deadline=None, max_examples=25)
def test_tiles_are_a_permutation_that_is_inverted(row_tiles, k_tiles, lead, seed):
    generator = torch.Generator().manual_seed(seed)
    shape = (*lead, 64 * row_tiles, 16 * k_tiles)
    packed = torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, generator=generator)
    tiles = to_tiles(packed)
    assert tiles.shape == packed.shape and tiles.is_contiguous()
    assert torch.equal(from_tiles(tiles), packed)
    counts = [torch.bincount(int4.unpack(t).flatten().int(), minlength=16) for t in (packed, tiles)]
    assert torch.equal(*counts)


def test_each_nibble_is_where_the_kernels_look_for_it():
    q = torch.randint(0, 16, (128, 256), dtype=torch.uint8)
    words = to_tiles(int4.pack(q)).view(2, 2, 64, 16)  # [row tile, k tile, row, word]
    for n, k in torch.stack((torch.randint(128, (200,)), torch.randint(256, (200,))), dim=1).tolist():
        j, s, e, t, p = k % 128 // 32, k // 16 % 2, k // 8 % 2, k // 2 % 4, k % 2
        word = words[n // 64, k // 128, n % 64, 4 * t + j].item()
        assert word >> 4 * (4 * p + 2 * s + e) & 15 == q[n, k]


def test_tiles_are_made_a_block_of_rows_at_a_time(monkeypatch):
    packed = torch.randint(-(2**31), 2**31, (256, 32), dtype=torch.int32)
    expected = to_tiles(packed)
    monkeypatch.setattr(w4a16_tiles, "_BLOCK_NIBBLES", 1)
    assert torch.equal(to_tiles(packed), expected)
    assert torch.equal(from_tiles(expected), packed)


@pytest.mark.parametrize("group_size", int4.GROUP_SIZES)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_op_against_float64(group_size, symmetric, dtype):
    weight, tensors = tiled_weight(128, 256, group_size, symmetric, dtype)
    bias, perm = torch.randn(128).to(dtype), torch.randperm(256).int()
    x = torch.randn(2, 3, 512).to(dtype)[..., ::2]
    y = w4a16_tiled(x, *tensors, perm, bias, group_size=group_size)
    assert y.shape == (2, 3, 128) and y.dtype == dtype
    assert in_floors(y, exact_product(x, weight, perm, bias)) <= 1.1
    assert w4a16_tiled(x[:0], *tensors, group_size=group_size).shape == (0, 3, 128)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad):
    for group_size, symmetric in ((64, False), (-1, True)):
        _, tensors = tiled_weight(64, 128, group_size, symmetric, torch.float32)
        x = torch.randn(2, 3, 128, requires_grad=requires_grad)
        bias = torch.randn(64, requires_grad=requires_grad)
        perm = torch.randperm(128).int()
        opcheck(torch.ops.hf_hadacore.w4a16_tiled.default, (x, *tensors, perm, bias, group_size))


def test_gradients():
    weight, tensors = tiled_weight(64, 128, 32, False, torch.float32)
    perm = torch.randperm(128).int()
    x = torch.randn(5, 128, requires_grad=True)
    bias = torch.randn(64, requires_grad=True)
    upstream = torch.randn(5, 64)
    w4a16_tiled(x, *tensors, perm, bias, group_size=32).backward(upstream)
    expected = torch.zeros(5, 128, dtype=torch.float64)
    expected[:, perm.long()] = upstream.double() @ weight.dequantize(torch.float64)
    assert torch.allclose(x.grad.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.allclose(bias.grad, upstream.sum(0))


def test_wrong_arguments_are_named():
    _, (tiles, scale, zero) = tiled_weight(64, 256, 128, False, torch.float16)
    x = torch.randn(2, 256).half()
    for arguments, message in (
        ((x, tiles, scale.contiguous(), zero), "scale: expected contiguous columns"),
        ((x, tiles, scale, zero.contiguous()), "zero: expected contiguous columns"),
        ((x[:, :128], tiles, scale, zero), "x: expected"),
        (
            (x[:, :64], tiles[:, :8], scale[:, :1], None),
            "tiles: expected multiples of 64 outputs and 128 inputs",
        ),
    ):
        with pytest.raises(FormatError, match=message):
            w4a16_tiled(*arguments, group_size=128)


@given(
    st.sampled_from([1, 3, 8, 9, 16, 17, 40, 64, 100, 300, 5000]),
    st.integers(1, 300),
    st.integers(1, 300),
    st.sampled_from([8, 66, 132]),
)
@settings(deadline=None, max_examples=300)
def test_every_schedule_can_run(m, row_tiles, k_tiles, processors):
    n, k = 64 * row_tiles, 128 * k_tiles
    fine = schedules.choose(m, n, k, "none", processors, is_plain=False)
    assert isinstance(fine, schedules.SkinnySchedule) == (m <= schedules.MAX_SKINNY_TOKENS)
    for schedule in (fine, schedules.choose(m, n, k, "none", processors), *schedules.candidates(m, n, k)):
        split = -(-k_tiles // schedule.tiles)
        assert 1 <= split <= 64
        assert (split - 1) * schedule.tiles < k_tiles, "a program without work"
        if isinstance(schedule, schedules.SkinnySchedule):
            assert m <= schedule.block_m and 1 <= schedule.stages <= schedule.tiles
            assert schedule.tiles * schedule.block_m * 256 <= 227 * 1024
        else:
            assert m > (8 if schedule.block_m == 16 else schedules.MAX_SKINNY_TOKENS)
            assert m <= schedule.block_m or schedule.block_m > 16
            assert schedule.slots * schedule.block_m * 256 < 227 * 1024


def test_tuning_files(tmp_path, monkeypatch):
    file = tmp_path / "tuned.json"
    tuned = {
        "sm90 4096x4096 1": schedules.SkinnySchedule(8, 64, 8, 4, 4),
        "sm90 4096x4096 64": schedules.WideSchedule(64, 16, 3, 4),
        "sm90 4096x4096 4096": schedules.PrefillSchedule(128, 32, 3),
    }
    schedules.write_table(file, tuned, {"device": "a GPU"})
    assert schedules.read_table(file) == tuned
    monkeypatch.setenv(schedules.TUNING_VARIABLE, str(file))
    schedules._table.cache_clear()
    assert schedules.choose(1, 4096, 4096, "sm90", 132) == tuned["sm90 4096x4096 1"]
    assert schedules.choose(50, 4096, 4096, "sm90", 132) == tuned["sm90 4096x4096 64"]
    monkeypatch.undo()
    schedules._table.cache_clear()


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"schedules": []}',
        '{"schedules": {"sm90 64x128 1": {"WideSchedule": {"block_m": 64, "tiles": 1, "stages": 3}}}}',
        '{"schedules": {"a": {"WideSchedule": {"block_m": 7, "tiles": 1, "stages": 3, "slots": 4}}}}',
        '{"schedules": {"sm90 64x128 1": {"Path": {"block_m": 64}}}}',
    ],
)
def test_broken_tuning_files_are_named(tmp_path, content):
    file = tmp_path / "tuned.json"
    file.write_text(content)
    with pytest.raises(ConfigError, match=r"tuned\.json: is not a file of W4A16 schedules"):
        schedules.read_table(file)


def test_shipped_schedules_can_be_read():
    schedules.read_table(schedules._TABLE)


def test_tiles_are_for_hopper():
    assert not prefers_tiles(torch.device("cpu"), 128, 128, 128)


@pytest.fixture
def tiled_layers(monkeypatch):
    """Makes layers that use tiles on the CPU, where the op runs its reference."""
    monkeypatch.setattr(
        tile_order, "prefers_tiles", lambda device, *shape: w4a16_tiles.is_tileable(*shape[:2])
    )

    def make(*sizes: int, bias: bool = True, group_size: int = 64, k: int = 256) -> list[HadaCoreLinear]:
        config = HadaCoreConfig(group_size=group_size)
        return [HadaCoreLinear.from_linear(nn.Linear(k, n, bias), config) for n in sizes]

    return make


def stored(layer: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in layer.state_dict().items()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


def test_nobody_sees_the_order_of_a_tiled_layer(tiled_layers):
    (layer,) = tiled_layers(128)
    x, before = torch.randn(3, 256), stored(layer)
    expected = nn.functional.linear(x, layer.int4_weight().dequantize(), layer.bias)
    layer.prepare()
    assert layer._is_tiled and not torch.equal(layer.weight, before["weight"])
    assert torch.allclose(layer(x), expected, atol=1e-5)
    assert same(stored(layer), before)
    assert all(value.is_contiguous() for value in layer.state_dict().values())
    assert torch.equal(layer.int4_weight().packed, before["weight"])
    assert torch.equal(layer.dequantize().weight, layer.int4_weight().dequantize())
    assert same(stored(copy.deepcopy(layer)), before)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    assert same(stored(torch.load(file, weights_only=False)), before)
    layer.to(torch.float64)
    assert not layer._is_tiled and torch.equal(layer.weight, before["weight"])


def test_loading_into_a_tiled_layer(tiled_layers):
    layer, other = tiled_layers(128, 128)
    layer.prepare()
    layer.load_state_dict(other.state_dict())
    assert same(stored(layer), stored(other))
    layer.prepare()
    layer.weight = nn.Parameter(other.weight.data, requires_grad=False)
    assert not layer._is_tiled and torch.equal(layer.int4_weight().packed, other.weight)


@pytest.mark.parametrize("bias", [False, True])
def test_layers_together(tiled_layers, bias):
    layers = tiled_layers(128, 64, 192, bias=bias)
    x, before = torch.randn(2, 3, 256), [stored(layer) for layer in layers]
    expected = [layer(x) for layer in layers]
    outputs = forward_together(layers, x)
    assert [y.shape for y in outputs] == [e.shape for e in expected]
    assert all(torch.allclose(y, e, atol=1e-5) for y, e in zip(outputs, expected, strict=True))
    assert outputs[0].untyped_storage().data_ptr() == outputs[1].untyped_storage().data_ptr()
    assert [same(stored(layer), b) for layer, b in zip(layers, before, strict=True)] == [True] * 3
    assert all(torch.allclose(layer(x), e, atol=1e-5) for layer, e in zip(layers, expected, strict=True))
    # A changed layer is noticed.
    layers[1].set_int4(layers[1].int4_weight()._replace(packed=torch.zeros_like(layers[1].weight)))
    assert not torch.allclose(forward_together(layers, x)[1], expected[1], atol=1e-5)
    assert torch.allclose(forward_together(layers, x)[0], expected[0], atol=1e-5)


def test_layers_that_cannot_go_together(tiled_layers):
    x = torch.randn(3, 256)
    for layers in (
        [*tiled_layers(128), nn.Linear(256, 64)],
        [nn.Linear(256, 64), *tiled_layers(128)],
        [*tiled_layers(128), *tiled_layers(128, group_size=128)],
        tiled_layers(128, 72),
    ):
        outputs = forward_together(layers, x)
        assert all(torch.equal(y, layer(x)) for y, layer in zip(outputs, layers, strict=True))


@pytest.mark.parametrize("k", [28672, 32768, 131072])
def test_tensor_cores_do_not_add_up_too_many_terms(k):
    schedule = schedules.choose(4096, 8192, k, "sm90", 132)
    assert isinstance(schedule, schedules.PrefillSchedule)
    assert schedule.tiles * 128 <= 32768
