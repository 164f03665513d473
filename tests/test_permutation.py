"""Which weights are permuted together, and that a permutation baked into the layers before changes no bit."""

import copy

import pytest
import torch
from permuted_models import quantize_permuted, random_order
from tiny_models import TINY_CONFIGS, token_ids
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitNetConfig,
    Gemma2Config,
    GPTBigCodeConfig,
    Phi3Config,
    PhiConfig,
    Qwen2Config,
    Qwen2MoeConfig,
)

from hf_hadacore import HadaCoreLinear
from hf_hadacore.errors import FormatError
from hf_hadacore.int4 import Int4Weight
from hf_hadacore.kernels.w4a16 import w4a16_linear
from hf_hadacore.modules.experts import HadaCoreExperts, projection_shape, swap_experts
from hf_hadacore.parallel.permutation import PermutationGroup, permute_inputs, permute_outputs
from hf_hadacore.parallel.permutation_search import permutation_groups
from hf_hadacore.solvers.rtn import quantize_weight

_SIZES = dict(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
CONFIGS = {
    **TINY_CONFIGS,
    "bitnet": lambda: BitNetConfig(**_SIZES),
    "gemma2": lambda: Gemma2Config(**_SIZES, head_dim=16),
    "granite-20b": lambda: GPTBigCodeConfig(vocab_size=96, n_embd=64, n_layer=2, n_head=4),
    "phi": lambda: PhiConfig(**_SIZES),
    "phi3": lambda: Phi3Config(**_SIZES),
    "qwen2": lambda: Qwen2Config(**_SIZES),
    "qwen2-moe": lambda: Qwen2MoeConfig(**_SIZES, num_experts=4, moe_intermediate_size=48),
}
QKV = ("q_proj", "k_proj", "v_proj")
Q_K_V, O_PROJ = (QKV, (), None, 1, False), (("o_proj",), ("v_proj",), 16, 2, False)
GATE_UP, DOWN = (
    (("gate_proj", "up_proj"), (), None, 1, False),
    (("down_proj",), ("gate_proj", "up_proj"), None, 1, False),
)
EXPERTS = (("down_proj",), ("gate_up_proj",), None, 1, False)
LLAMA = [Q_K_V, O_PROJ, GATE_UP, DOWN]
EXPECTED = {
    **dict.fromkeys(("llama", "llama-tied", "qwen2", "qwen3", "gemma2", "gemma3"), LLAMA),
    "mixtral": [Q_K_V, O_PROJ, EXPERTS],
    "qwen3-moe": [Q_K_V, O_PROJ, EXPERTS],
    "gpt-oss": [Q_K_V, O_PROJ, (*EXPERTS[:4], True)],
    "qwen2-moe": [Q_K_V, O_PROJ, EXPERTS, GATE_UP, DOWN],
    "phi3": [
        (("qkv_proj",), (), None, 1, False),
        (("o_proj",), ("qkv_proj",), 16, 2, False),
        (("gate_up_proj",), (), None, 1, False),
        EXPERTS,
    ],
    "phi": [
        Q_K_V,
        (("dense",), ("v_proj",), 16, 2, False),
        (("fc1",), (), None, 1, False),
        (("fc2",), ("fc1",), None, 1, False),
    ],
    "granite-20b": [(("c_fc",), (), None, 1, False), (("c_proj",), ("c_fc",), None, 1, False)],
    # The norms before its o_proj and down_proj have a weight for each channel.
    "bitnet": [Q_K_V, GATE_UP],
}


def build(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1 if parameter.ndim == 1 else 0, 0.1)
    return model


def leaf(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name.rpartition(".")[2] for name in names)


@pytest.mark.transformers_versions
@pytest.mark.parametrize("name", EXPECTED)
def test_groups(name):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIGS[name]())
    groups = permutation_groups(model)
    layers = [[g for g in groups if f".{layer}." in g.consumers[0]] for layer in (0, 1)]
    for layer in layers:
        assert sorted(map(str, ((leaf(g[0]), leaf(g[1]), *g[2:]) for g in layer))) == sorted(
            map(str, EXPECTED[name])
        )
    assert sum(map(len, layers)) == len(groups)
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    for group in groups:
        assert {n.rpartition(".")[0] for n in (*group.consumers, *group.producers)} == {
            group.consumers[0].rpartition(".")[0]
        }
        assert all(n in modules or n in parameters for n in (*group.consumers, *group.producers))


def test_an_mlp_that_is_not_what_its_names_say():
    class Shifted(nn.Module):
        def __init__(self, shift: int):
            super().__init__()
            self.gate_proj, self.up_proj = nn.Linear(16, 32), nn.Linear(16, 32)
            self.down_proj = nn.Linear(32, 16)
            self.shift = shift

        def forward(self, x):
            return self.down_proj(self.gate_proj(x).relu() * self.up_proj(x).roll(self.shift, -1))

    assert len(permutation_groups(Shifted(0))) == 2
    assert [g.producers for g in permutation_groups(Shifted(1))] == [()]
    tied = Shifted(0)
    tied.up_proj.weight = tied.gate_proj.weight
    assert len(permutation_groups(nn.ModuleList([tied]))) == 0


@pytest.mark.transformers_versions
def test_values_that_later_layers_read_again_stay_in_order():
    config = TINY_CONFIGS["llama"]()
    config.num_kv_shared_layers = 1
    groups = permutation_groups(AutoModelForCausalLM.from_config(config))
    assert not any(g.head_dim for g in groups)
    assert len(groups) == 6


def test_orders_that_leave_a_head_are_refused():
    group = PermutationGroup(("o_proj",), ("v_proj",), head_dim=4, repeats=2)
    good = torch.tensor([1, 0, 3, 2, 5, 4, 7, 6])
    assert group.output_order(good, 4).tolist() == [1, 0, 3, 2]
    assert group.output_order(good, 20).tolist() == [*range(16), 17, 16, 19, 18]
    for bad in (good.roll(4), torch.tensor([1, 0, 3, 2, 4, 5, 6, 7])):
        with pytest.raises(FormatError, match="o_proj's inputs must stay within heads of 4 channels"):
            group.output_order(bad, 4)


@pytest.mark.transformers_versions
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma3", "phi3", "phi", "granite-20b"])
@torch.no_grad()
def test_baked_orders_change_no_bit(name):
    read, baked = build(name), build(name)
    orders = quantize_permuted(read, baked=False)
    quantize_permuted(baked, baked=True)
    stored = {n for n, m in baked.named_modules() if getattr(m, "input_perm", None) is not None}
    groups = permutation_groups(baked)
    assert stored == {n for group in groups if not group.producers for n in group.consumers}
    ids = token_ids()
    logits = read(ids).logits
    assert torch.equal(baked(ids).logits, logits)

    # Undone, every weight is the one that was quantized, bit for bit.
    for group in groups:
        if not group.producers:
            continue
        order = orders[group.consumers[0]]
        for producer in group.producers:
            permuted, natural = (m.get_submodule(producer) for m in (baked, read))
            back = group.output_order(order, natural.out_features).argsort()
            assert torch.equal(permuted.dequantize().weight[back], natural.dequantize().weight)
            if natural.bias is not None:
                assert torch.equal(permuted.bias[back], natural.bias)
        for consumer in group.consumers:
            permuted, natural = (m.get_submodule(consumer).dequantize().weight for m in (baked, read))
            assert torch.equal(permuted[:, order.argsort()], natural)

    plain = copy.deepcopy(read)
    for n, module in list(plain.named_modules()):
        if isinstance(module, HadaCoreLinear):
            plain.set_submodule(n, module.dequantize())
    assert torch.allclose(plain(ids).logits, logits, atol=1e-4)


@pytest.mark.transformers_versions
@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
@torch.no_grad()
def test_baked_orders_of_experts_change_no_bit(name):
    config = TINY_CONFIGS[name]()
    config.intermediate_size = 96
    torch.manual_seed(0)
    experts = AutoModelForCausalLM.from_config(config, dtype=torch.float32).model.layers[0].mlp.experts
    (group,) = permutation_groups(experts)
    (first,), (down,) = group.producers, group.consumers
    weights = {n: torch.randn(projection_shape(experts, n)) for n in (first, down)}
    order = torch.stack([random_order(group, 96) for _ in range(experts.num_experts)])
    swap_experts(experts, group_size=32, symmetric=False, dtype=torch.float32)
    if experts.has_bias:
        experts.gate_up_proj_bias.normal_()
    set_projection(experts, first, quantize_weight(weights[first], group_size=32, symmetric=False))
    second = quantize_weight(permute_inputs(weights[down], order), group_size=32, symmetric=False)
    set_projection(experts, down, second)
    baked = copy.deepcopy(experts)
    rows = group.output_order(order, weights[first].shape[1])
    permuted, bias = permute_outputs(
        experts.int4_weight(first), experts.gate_up_proj_bias if experts.has_bias else None, rows
    )
    set_projection(baked, first, permuted)
    if bias is not None:
        baked.gate_up_proj_bias = nn.Parameter(bias)

    x = torch.randn(5, 64)
    for expert in range(experts.num_experts):
        h = experts._activate(experts._project(first, expert, x))
        read = w4a16_linear(
            h,
            *experts.int4_weight(down, expert)[:3],
            order[expert].int(),
            experts.down_proj_bias[expert] if experts.has_bias else None,
            group_size=32,
        )
        assert torch.equal(baked._expert(expert, x), read)
    back = permute_inputs(second.dequantize(), order.argsort(-1))
    assert torch.equal(permute_inputs(back, order), second.dequantize())
    assert (back - weights[down]).norm() < 0.12 * weights[down].norm()


def set_projection(experts: HadaCoreExperts, name: str, weight: Int4Weight) -> None:
    for suffix, value in zip(("", "_scale", "_zero"), weight[:3], strict=True):
        setattr(experts, name + suffix, nn.Parameter(value, requires_grad=False))
