"""Layers whose columns are stored in an order of their own: every path reads the input in that order."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import make_model, token_ids
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_hadacore import HadaCoreConfig, HadaCoreLinear
from hf_hadacore.errors import CheckpointError, ConfigError
from hf_hadacore.kernels import w4a16_tiled
from hf_hadacore.modules.linear_group import forward_together, products_of
from hf_hadacore.solvers.rtn import quantize_weight

K, N, GROUP = 256, 128, 64
NAMES = r"self_attn\.[qkv]_proj$"


def permuted_layer(seed: int = 0, dtype: torch.dtype = torch.float32, n: int = N) -> HadaCoreLinear:
    """A layer with integer weights and inputs in an order of their own, so that sums are exact."""
    generator = torch.Generator().manual_seed(seed)
    layer = HadaCoreLinear(K, n, group_size=GROUP, symmetric=False, input_perm=True, dtype=dtype)
    weight = torch.randint(-8, 8, (n, K), generator=generator).to(dtype)
    layer.set_int4(
        quantize_weight(weight, group_size=GROUP, symmetric=False), torch.randperm(K, generator=generator)
    )
    layer.bias = nn.Parameter(torch.randn(n, generator=generator).to(dtype))
    return layer


def natural(layer: HadaCoreLinear) -> torch.Tensor:
    """The weight with its columns in natural order, column by column."""
    stored = layer.int4_weight().dequantize()
    weight = torch.full_like(stored, float("nan"))
    for place, column in enumerate(layer.input_perm.tolist()):
        weight[:, column] = stored[:, place]
    return weight


def test_dequantized_columns_are_in_natural_order():
    layer = permuted_layer()
    assert layer.input_perm.dtype == torch.int32 and not layer.input_perm.requires_grad
    assert torch.equal(layer.dequantize().weight, natural(layer))
    assert "input_perm" in repr(layer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 3, 40])
@torch.no_grad()
def test_forward(dtype, tokens):
    layer = permuted_layer(dtype=dtype)
    # One token in bf16 takes the CPU's decode kernel, 40 do not.
    assert layer._decodes_on_cpu(torch.empty(tokens, K, dtype=dtype)) == (
        dtype == torch.bfloat16 and tokens <= 16
    )
    x = torch.randn(2, tokens, K).to(dtype)[1:]
    expected = x.double() @ natural(layer).double().T + layer.bias.double()
    error = (layer(x).double() - expected).norm() / expected.norm()
    assert error < (4e-3 if dtype == torch.bfloat16 else 1e-6)


def test_gradients_come_back_in_natural_order():
    layer = permuted_layer()
    x = torch.randn(5, K, requires_grad=True)
    g = torch.randn(5, N)
    layer(x).backward(g)
    assert torch.allclose(x.grad, g @ natural(layer), rtol=1e-5, atol=1e-4)


def test_copies_and_state_dicts_keep_it():
    layer, other = permuted_layer(0), permuted_layer(1)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.input_perm, layer.input_perm)
    x = torch.randn(3, K)
    assert torch.equal(other(x), layer(x))


@pytest.fixture
def tiles(monkeypatch):
    """Weights are put in tile order on this CPU, too."""

    def prefers(device, n, k, group_size):
        return w4a16_tiled.is_tileable(n, k)

    monkeypatch.setattr("hf_hadacore.modules.tile_order.prefers_tiles", prefers)


@torch.no_grad()
def test_layers_are_joined_only_if_they_read_alike(tiles):
    first, alike, other, plain = (permuted_layer(seed) for seed in range(4))
    alike.input_perm = nn.Parameter(first.input_perm.clone(), requires_grad=False)
    plain.set_int4(plain.int4_weight())
    x = torch.randn(3, K)
    for layers, are_joined in (
        ((first, alike), True),
        ((first, other), False),
        ((first, plain), False),
        ((plain, first), False),
    ):
        expected = [
            x @ natural(m).T if m.input_perm is not None else x @ m.int4_weight().dequantize().T
            for m in layers
        ]
        outputs = forward_together(layers, x)
        for y, product, layer in zip(outputs, expected, layers, strict=True):
            assert torch.allclose(y, product + layer.bias, rtol=1e-5, atol=1e-3)
        is_joined = outputs[0].untyped_storage().data_ptr() == outputs[1].untyped_storage().data_ptr()
        assert is_joined == are_joined
    # A new order is noticed.
    forward_together((first, alike), x)
    alike.input_perm = nn.Parameter(other.input_perm.clone(), requires_grad=False)
    y = forward_together((first, alike), x)[1]
    assert torch.allclose(y, x @ natural(alike).T + alike.bias, rtol=1e-5, atol=1e-3)


def test_products_compiled_ahead_know_of_it(tiles):
    layers = nn.ModuleList([permuted_layer(0, torch.bfloat16), permuted_layer(1, torch.bfloat16)])
    layers[1].set_int4(layers[1].int4_weight())
    for layer in layers:
        layer._use_tiles()
    assert {product.has_perm for _, product in products_of(layers, [])} == {True, False}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A tiny Llama whose q, k and v have an input_perm."""
    make_model("llama", torch.float32).save_pretrained(tmp_path / "full")
    model = load(tmp_path / "full", HadaCoreConfig(group_size=32))
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    for name, module in model.named_modules():
        if name.endswith(("q_proj", "k_proj", "v_proj")):
            module.set_int4(
                quantize_weight(module.dequantize().weight[:, order], group_size=32, symmetric=False), order
            )
    model.config.quantization_config.input_permutations = [NAMES]
    model.save_pretrained(tmp_path / "int4")
    return tmp_path / "int4"


def load(path: Path, config: HadaCoreConfig | None = None) -> PreTrainedModel:
    options = {} if config is None else {"quantization_config": config}
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **options)


@pytest.mark.transformers_versions
def test_save_reload_resave(checkpoint, tmp_path):
    model = load(checkpoint)
    tensors = load_file(checkpoint / "model.safetensors")
    perms = [n for n, m in model.named_modules() if getattr(m, "input_perm", None) is not None]
    assert len(perms) == 6 and all(tensors[f"{n}.input_perm"].dtype == torch.int32 for n in perms)
    with torch.no_grad():
        logits = model(token_ids()).logits
        assert torch.allclose(logits, model.dequantize()(token_ids()).logits, atol=1e-4)
    load(checkpoint).save_pretrained(tmp_path / "again")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / file).read_bytes() == (checkpoint / file).read_bytes()


@pytest.mark.transformers_versions
def test_offloaded(checkpoint, tmp_path):
    device_map = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    device_map |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, device_map=device_map, offload_folder=tmp_path / "offload"
    )
    with torch.no_grad():
        assert torch.equal(model(token_ids()).logits, load(checkpoint)(token_ids()).logits)


PERM = "model.layers.1.self_attn.k_proj.input_perm"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda perm: perm.clone().fill_(3), "found 3 more than once"),
        (lambda perm: torch.where(perm == 5, 64, perm), "found 64"),
        (lambda perm: torch.where(perm == 5, -1, perm), "found -1"),
        (lambda perm: perm[:-1].clone(), r"expected int32 \[64\], found int32 \[63\]"),
        (lambda perm: perm.long(), r"expected int32 \[64\], found int64 \[64\]"),
        (lambda perm: None, r"expected int32 \[64\], found no such tensor"),
    ],
)
def test_damaged_permutations_are_named(checkpoint, change, message):
    tensors = load_file(checkpoint / "model.safetensors")
    changed = change(tensors.pop(PERM))
    if changed is not None:
        tensors[PERM] = changed.to(changed.dtype)
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{PERM}: .*{message}"):
        load(checkpoint)


def test_permutations_that_the_config_does_not_name_are_no_surprise(checkpoint):
    file = checkpoint / "config.json"
    content = json.loads(file.read_text())
    content["quantization_config"]["input_permutations"] = [r"[qv]_proj$"]
    file.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"layers\.0\.self_attn\.k_proj\.input_perm: expected none"):
        load(checkpoint)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "gptq"}, "method='gptq' needs calibration data: quantize offline"),
        ({"input_permutations": ["q_proj"]}, "input_permutations describes a quantized checkpoint"),
    ],
)
def test_options_of_checkpoints_are_refused_on_the_fly(llama_dir, options, message):
    with pytest.raises(ConfigError, match=message):
        load(llama_dir, HadaCoreConfig(**options))


def test_experts_have_none(tmp_path):
    make_model("mixtral").save_pretrained(tmp_path)
    load(tmp_path, HadaCoreConfig(group_size=32)).save_pretrained(tmp_path / "int4")
    file = tmp_path / "int4" / "config.json"
    content = json.loads(file.read_text())
    content["quantization_config"]["input_permutations"] = ["experts"]
    file.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"input_permutations names 'model.layers.0.mlp.experts'"):
        load(tmp_path / "int4")
