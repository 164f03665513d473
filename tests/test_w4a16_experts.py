"""The op for the experts that tokens chose (its reference: CI has no GPU), and fused experts that use it."""

import copy
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreted import run_interpreted
from kernel_helpers import exact_product, in_floors, random_weight
from tiny_models import MOE, TINY_CONFIGS, token_ids
from torch import nn
from torch.library import opcheck
from transformers import AutoModelForCausalLM

from hf_hadacore import HadaCoreConfig, int4
from hf_hadacore.errors import FormatError, UnsupportedError
from hf_hadacore.int4 import Int4Weight
from hf_hadacore.kernels import w4a16_schedules as schedules
from hf_hadacore.kernels.w4a16_experts import choose_schedule, w4a16_experts
from hf_hadacore.kernels.w4a16_tiles import is_tileable, to_tiles
from hf_hadacore.modules import tile_order
from hf_hadacore.modules.experts import HadaCoreExperts, dequantize_experts

EXPERTS, OUTPUTS, INPUTS = 4, 128, 256


def tiled_experts(group_size: int = 128, symmetric: bool = False, dtype: torch.dtype = torch.float16):
    """Random weights of each expert, and their tensors as the op takes them."""
    weights = [random_weight(OUTPUTS, INPUTS, group_size, symmetric, dtype, seed) for seed in range(EXPERTS)]
    scale = torch.stack([weight.scale.T.contiguous() for weight in weights]).mT
    zero = None if symmetric else torch.stack([weight.zero.T.contiguous() for weight in weights]).mT
    return weights, (to_tiles(torch.stack([weight.packed for weight in weights])), scale, zero)


def exact_outputs(
    x: torch.Tensor, weights: list[Int4Weight], bias: torch.Tensor | None, index: torch.Tensor
) -> torch.Tensor:
    rows = []
    for slot, expert in enumerate(index.tolist()):
        row = x[slot // (len(index) // len(x))]
        is_there = 0 <= expert < len(weights)
        exact = exact_product(
            row, weights[expert if is_there else 0], None, None if bias is None else bias[expert % len(bias)]
        )
        rows.append(exact if is_there else torch.zeros_like(exact))
    return torch.stack(rows)


@pytest.mark.parametrize("group_size", int4.GROUP_SIZES)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_op_against_float64(group_size, symmetric, dtype):
    weights, tensors = tiled_experts(group_size, symmetric, dtype)
    bias = torch.randn(EXPERTS, OUTPUTS).to(dtype)
    index = torch.tensor([3, 0, 1, 4, -1, 3, 0, 1 << 40, 2, 2])
    for rows in (1, 5, 10):
        x = torch.randn(rows, INPUTS).to(dtype)
        y = w4a16_experts(x, *tensors, bias, index, group_size=group_size)
        assert y.shape == (10, OUTPUTS) and y.dtype == dtype
        assert in_floors(y, exact_outputs(x, weights, bias, index)) <= 1.1
        assert (y[[3, 4, 7]] == 0).all()


def test_no_slots():
    _, tensors = tiled_experts()
    for index in (torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int32)):
        y = w4a16_experts(torch.randn(0, INPUTS).half(), *tensors, None, index, group_size=128)
        assert y.shape == (0, OUTPUTS)


def test_opcheck():
    for group_size, symmetric in ((64, False), (-1, True)):
        _, tensors = tiled_experts(group_size, symmetric, torch.float32)
        index, bias = torch.tensor([0, 3, 2, 4, 0, 0]), torch.randn(EXPERTS, OUTPUTS)
        arguments = (torch.randn(3, INPUTS), *tensors, bias, index, group_size)
        opcheck(torch.ops.hf_hadacore.w4a16_experts.default, arguments)


def test_missing_gradient_is_an_error():
    _, tensors = tiled_experts(64, False, torch.float32)
    x = torch.randn(3, INPUTS, requires_grad=True)
    with pytest.raises(UnsupportedError, match="no gradient"):
        w4a16_experts(x, *tensors, None, torch.tensor([0, 1, 2]), group_size=64).sum().backward()


def test_wrong_arguments_are_named():
    _, (tiles, scale, zero) = tiled_experts()
    x, index, bias = torch.randn(2, INPUTS).half(), torch.tensor([0, 1, 2, 3]), torch.zeros(EXPERTS, OUTPUTS)
    for arguments, message in (
        ((x, tiles[0], scale, zero, None, index), "tiles: expected int32"),
        ((x, tiles, scale.contiguous(), zero, None, index), "scale: expected the transpose"),
        ((x, tiles, scale, zero.contiguous(), None, index), "zero: expected the transpose"),
        ((x, tiles, scale, zero, bias[:1], index), "bias: expected contiguous"),
        ((x, tiles, scale, zero, bias, index.float()), "expert_index: expected contiguous int32 or int64"),
        ((x, tiles, scale, zero, bias, index[::2]), "expert_index: expected contiguous int32 or int64"),
        ((x, tiles, scale, zero, bias, index[:3]), "x: expected .* dividing the 3 slots"),
        ((x[:, :128], tiles, scale, zero, bias, index), "x: expected"),
    ):
        with pytest.raises(FormatError, match=message):
            w4a16_experts(*arguments, group_size=128)


@given(
    st.integers(1, 10) | st.integers(1, 100_000),
    st.integers(1, 256),
    st.integers(1, 450),
    st.integers(1, 224),
    st.integers(8, 200),
    st.sampled_from(int4.GROUP_SIZES),
)
@settings(deadline=None, max_examples=300)
def test_every_schedule_can_run(slots, count, row_tiles, k_tiles, processors, group_size):
    schedule = choose_schedule(slots, count, 64 * row_tiles, 128 * k_tiles, processors, group_size)
    split = -(-k_tiles // schedule.tiles)
    assert (split - 1) * schedule.tiles < k_tiles, "a program without work"
    if isinstance(schedule, schedules.SkinnySchedule):
        assert 1 <= schedule.stages <= schedule.tiles
        assert schedule.tiles * schedule.block_m * 256 <= 227 * 1024
        assert slots <= 256 and schedule.block_m == 8
    else:
        assert split == 1 and schedule.slots * schedule.block_m * 256 < 227 * 1024
        assert schedule._replace(tiles=0) in schedules.GROUPED_TIMES


def test_schedules_for_many_slots():
    """From reading weights as fast as they come to as many tokens a program as there are."""
    sizes = [
        choose_schedule(128 * mean, 128, 1536, 2048, 132, 128).block_m for mean in (4, 8, 32, 64, 300, 1000)
    ]
    assert sizes == sorted(sizes) and sizes[0] <= 32 and sizes[-1] == 128
    fine = choose_schedule(512, 128, 1536, 2048, 132, 32)
    assert not (isinstance(fine, schedules.WideSchedule) and fine.is_half)


def test_slots_are_sorted():
    pytest.importorskip("triton")
    assert "sorted 40 cases" in run_interpreted("interpret_w4a16_routing.py")


@pytest.fixture
def model_folder(tmp_path):
    """Saves a model whose experts consist of whole tiles."""

    def save(name: str):
        config = TINY_CONFIGS[name]()
        config.update(dict(hidden_size=128, intermediate_size=128, moe_intermediate_size=128))
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("proj_bias"):
                nn.init.normal_(parameter, 0, 0.02)
        model.save_pretrained(tmp_path / name)
        return tmp_path / name

    return save


@pytest.fixture
def with_tiles(monkeypatch):
    """Experts use tiles on the CPU from now on, where the op runs its reference."""

    def switch():
        monkeypatch.setattr(tile_order, "prefers_tiles", lambda device, n, k, group_size: is_tileable(n, k))

    return switch


def load(folder, **options):
    if options:
        options = dict(quantization_config=HadaCoreConfig(**options))
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(token_ids()).logits


def first_experts(model: nn.Module) -> HadaCoreExperts:
    return next(module for module in model.modules() if isinstance(module, HadaCoreExperts))


def stored(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


@pytest.mark.parametrize("path", ["grouped", "one by one"])
@pytest.mark.parametrize("name", MOE)
def test_tiled_experts_compute_the_same(model_folder, with_tiles, monkeypatch, tmp_path, name, path):
    model = load(model_folder(name), group_size=64)
    assert not first_experts(model)._is_tiled
    expected, before = logits(model), stored(model)
    model.save_pretrained(tmp_path / "int4")
    with_tiles()
    monkeypatch.setattr(HadaCoreExperts, "_needs_gradient", lambda self, x: path != "grouped")
    model = load(tmp_path / "int4")
    assert first_experts(model)._is_tiled
    assert torch.allclose(logits(model), expected, rtol=1e-4, atol=1e-5)
    assert same(stored(model), before)
    model.save_pretrained(tmp_path / "again")
    files = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in ("int4", "again")]
    assert files[0] == files[1]


@pytest.fixture
def tiled(model_folder, with_tiles):
    """Experts of gpt-oss, with biases, an order and a gate of their own; and their state before tiling."""
    module = first_experts(load(model_folder("gpt-oss"), group_size=32)).requires_grad_(False)
    before = stored(module)
    with_tiles()
    module.prepare()
    return module, before


def inputs(tokens: int = 3):
    index = torch.tensor([[0, 3], [2, 1], [3, 2]])[:tokens]
    return torch.randn(tokens, 128), index, torch.rand(tokens, 2)


def test_nobody_sees_the_order(tiled):
    module, before = tiled
    assert module._is_tiled and not torch.equal(module.down_proj, before["down_proj"])
    assert same(stored(module), before)
    assert all(value.is_contiguous() for value in module.state_dict().values())
    for name in ("gate_up_proj", "down_proj"):
        assert torch.equal(module.int4_weight(name).packed, before[name])
        assert torch.equal(module.int4_weight(name, 2).scale, before[f"{name}_scale"][2])
        assert torch.equal(module.int4_weight(name, 2).dequantize(), module.int4_weight(name).dequantize()[2])
    expected = module(*(arguments := inputs()))
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    for other in (copy.deepcopy(module), torch.load(file, weights_only=False)):
        assert type(other) is type(module) and not torch.equal(other.down_proj, module.down_proj)
        assert same(stored(other), before)
        assert torch.equal(other(*arguments), expected) and other._is_tiled
    module.to(torch.float64)
    assert not module._is_tiled and torch.equal(module.down_proj, before["down_proj"])


def test_tiled_experts_are_dequantized(tiled):
    module, _ = tiled
    weight = module.int4_weight("down_proj").dequantize()
    dequantize_experts(module)
    assert torch.equal(module.down_proj, weight.mT) and not isinstance(module, HadaCoreExperts)


def test_loading_into_tiled_experts(tiled):
    module, before = tiled
    other = {name: torch.roll(value, 1, 0) for name, value in before.items()}
    module.load_state_dict(other)
    assert same(stored(module), other)
    module.prepare()
    module.down_proj = nn.Parameter(before["down_proj"], requires_grad=False)
    assert not module._is_tiled
    assert same(stored(module), other | {"down_proj": before["down_proj"]})


def test_experts_that_do_not_fit_stay_as_they_are(model_folder, with_tiles):
    with_tiles()
    config = HadaCoreConfig(group_size=64)
    source = model_folder("mixtral")
    module = first_experts(AutoModelForCausalLM.from_pretrained(source, quantization_config=config))
    module.down_proj = nn.Parameter(module.down_proj[:, :, :8], requires_grad=False)
    module.prepare()
    assert not module._is_tiled


def test_sentinels_and_empty_batches(tiled):
    module, _ = tiled
    x, index, weights = inputs()
    index[0, 1], index[2, 0] = 4, 7
    expected = module(x, index.clamp(max=3), weights * (index < 4))
    assert torch.allclose(module(x, index, weights), expected, atol=1e-6)
    module.has_post_expert_norm, module.post_expert_norm = True, nn.LayerNorm(128)
    nn.init.ones_(module.post_expert_norm.bias)
    assert not torch.allclose(module(x, index, weights), expected, atol=1e-2)
    expected = module(x, index.clamp(max=3), weights * (index < 4))
    assert torch.allclose(module(x, index, weights), expected, atol=1e-6)
    assert module(x[:0], index[:0], weights[:0]).shape == (0, 128)


def test_decoding_does_not_wait_for_the_device(tiled):
    """Whatever depends on values would break the graph: `unique`, `tolist`, masks."""
    module, _ = tiled
    arguments = inputs()
    expected = module(*arguments)
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    assert torch.equal(compiled(*arguments), expected)


def test_adapters_can_be_trained_through_tiled_experts(tiled):
    module, _ = tiled
    x, index, weights = inputs()
    x.requires_grad_()
    module(x, index, weights).square().sum().backward()
    expected = x.grad.clone()
    x.grad = None
    dequantize_experts(module)
    module(x, index, weights).square().sum().backward()
    assert expected.abs().max() > 0 and torch.allclose(x.grad, expected, rtol=1e-4, atol=1e-5)
