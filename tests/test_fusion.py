"""Fused forwards give what the modules' own forwards give, and step aside where they must."""

import copy
import pickle
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import make_model, token_ids
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    DynamicCache,
    Gemma3TextConfig,
    Glm4Config,
    GraniteConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
    StaticCache,
)

from hf_hadacore import HadaCoreConfig, HadaCoreLinear
from hf_hadacore.attention.decode_cache import DecodeCache, decode_layers
from hf_hadacore.fusion import forwards
from hf_hadacore.fusion.forwards import FusedAttention, FusedDecoderLayer, FusedMlp, FusedNorm
from hf_hadacore.fusion.fuse import fuse, unfuse
from hf_hadacore.fusion.swap import is_bare

pytestmark = pytest.mark.transformers_versions

MODELS = ("llama", "qwen3", "gemma3", "mixtral")
_SIZES = dict(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=104,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=0,
)


def with_int4(model: PreTrainedModel) -> PreTrainedModel:
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name.endswith("_proj"):
            model.set_submodule(name, HadaCoreLinear.from_linear(module, HadaCoreConfig(), name=name))
    return model


def from_config(config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.normal_(1, 0.1)
    return with_int4(model)


def int4_model(name: str) -> PreTrainedModel:
    return with_int4(make_model(name))


class OpCounter(TorchDispatchMode):
    """Counts this package's ops."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "hf_hadacore":
            self.counts[func._schema.name.removeprefix("hf_hadacore::")] += 1
        return func(*args, **(kwargs or {}))


def dynamic_cache(model: PreTrainedModel) -> Any:
    return DynamicCache(config=model.config)


def static_cache(model: PreTrainedModel) -> Any:
    return StaticCache(config=model.config, max_cache_len=16)


@torch.no_grad()
def logits_of(model: PreTrainedModel, make_cache: Callable[[PreTrainedModel], Any]) -> torch.Tensor:
    """Of a prompt with padding on the left, and of four tokens fed one by one."""
    ids, mask = token_ids(2, 11), torch.ones(2, 11, dtype=torch.int64)
    mask[0, :3] = 0
    cache = make_cache(model)
    parts = [model(ids[:, :7], attention_mask=mask[:, :7], past_key_values=cache).logits]
    for end in range(8, 12):
        step = model(ids[:, end - 1 : end], attention_mask=mask[:, :end], past_key_values=cache)
        parts.append(step.logits)
    return torch.cat(parts, dim=1)[mask.bool()]


@pytest.mark.parametrize("name", MODELS)
def test_fuses_what_it_knows(name):
    model = int4_model(name)
    moe = name == "mixtral"
    norms = {"llama": 5, "qwen3": 9, "gemma3": 13, "mixtral": 5}[name]
    expected = {"norms": norms, "mlps": 0 if moe else 2, "attentions": 2, "layers": 2}
    names = [type(module).__name__ for module in model.modules()]
    assert fuse(model) == expected
    assert fuse(model) == expected, "a second time changes nothing"
    assert [type(module).__name__ for module in model.modules()] == names


@pytest.mark.parametrize("make_cache", [dynamic_cache, static_cache])
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_unfused_model(name, make_cache):
    model = int4_model(name)
    expected = logits_of(model, make_cache)
    fuse(model)
    with OpCounter() as ops:
        found = logits_of(model, make_cache)
    # On the CPU the ops compute what the modules' own forwards compute, to the bit.
    assert torch.equal(found, expected)
    passes, layers = 5, 2
    assert ops.counts["rope_into_cache" if make_cache is static_cache else "rope"] == passes * layers
    assert ops.counts["gated_activation"] == (0 if name == "mixtral" else passes * layers)
    # The only sum without a norm behind it would be one after the last layer.
    assert ops.counts["add_rms_norm"] == passes * layers * 2
    assert ops.counts["rms_norm"] == passes * (1 + (2 * layers if name == "gemma3" else 0))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", MODELS)
def test_generates_the_same_tokens(name, cache):
    model = int4_model(name)
    ids, mask = token_ids(), torch.ones(2, 9, dtype=torch.int64)
    mask[1, :4] = 0

    def generate() -> torch.Tensor:
        return model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=12,
            do_sample=False,
            cache_implementation=cache,
            disable_compile=True,
            eos_token_id=None,
        )

    expected = generate()
    fuse(model)
    assert torch.equal(generate(), expected)


def test_decode_cache_is_written_by_the_rotation():
    model = int4_model("qwen3")
    ids = token_ids(2, 12)

    @torch.no_grad()
    def logits() -> torch.Tensor:
        cache = DecodeCache(decode_layers(model.config), limit=12, keep=False)
        parts = [model(ids[:, :8], past_key_values=cache).logits]
        cache.start_decoding()
        for end in range(9, 13):
            mask = torch.ones(2, cache.layers[0].size, dtype=torch.int64)
            mask[:, end:] = 0
            parts.append(model(ids[:, end - 1 : end], attention_mask=mask, past_key_values=cache).logits)
            cache.progress.position.add_(1)
        assert [layer.length for layer in cache.layers] == [12, 12]
        return torch.cat(parts, dim=1)

    expected = logits()
    fuse(model)
    with OpCounter() as ops:
        assert torch.equal(logits(), expected)
    assert ops.counts["rope_into_cache"] == 4 * 2 and ops.counts["rope"] == 2


@pytest.mark.parametrize("make_cache", [dynamic_cache, static_cache])
@pytest.mark.parametrize("config", [MistralConfig, Gemma3TextConfig])
def test_sliding_windows(config, make_cache):
    model = from_config(config(**_SIZES, head_dim=16, sliding_window=5))
    expected = logits_of(model, make_cache)
    assert fuse(model)["attentions"] == 2
    assert torch.equal(logits_of(model, make_cache), expected)


@pytest.mark.parametrize(
    "config, expected",
    [
        # Plain, with biases; one layer for gate and up, and q, k and v; another pair of norms.
        (Qwen2Config(**_SIZES), {"norms": 5, "mlps": 2, "attentions": 2, "layers": 2}),
        (Phi3Config(**_SIZES), {"norms": 5, "mlps": 2, "attentions": 0, "layers": 0}),
        # Rotates pairs of neighbours.
        (Glm4Config(**_SIZES, head_dim=16), {"norms": 9, "mlps": 2, "attentions": 0, "layers": 2}),
        # Scales what it adds to the residual.
        (
            GraniteConfig(**_SIZES, residual_multiplier=0.5),
            {"norms": 5, "mlps": 2, "attentions": 2, "layers": 0},
        ),
        # Norms over all heads at once, and behind attention and MLP only.
        (Olmo2Config(**_SIZES), {"norms": 9, "mlps": 2, "attentions": 0, "layers": 0}),
        # LayerNorms, attention beside the MLP, and pairs of neighbours again.
        (CohereConfig(**_SIZES), {"norms": 0, "mlps": 2, "attentions": 0, "layers": 0}),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_other_formulas_keep_their_forward(config, expected):
    model = from_config(config)
    logits = logits_of(model, dynamic_cache)
    assert fuse(model) == expected
    assert torch.equal(logits_of(model, dynamic_cache), logits)


def test_unfuse_restores_everything():
    model = int4_model("llama")
    before = {name: (type(module), set(module.__dict__)) for name, module in model.named_modules()}
    expected = logits_of(model, static_cache)
    fuse(model)
    unfuse(model)
    assert {name: (type(m), set(m.__dict__)) for name, m in model.named_modules()} == before
    assert torch.equal(logits_of(model, static_cache), expected)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_fused_models_of_their_own(clone):
    model = int4_model("llama")
    fuse(model)
    expected = logits_of(model, static_cache)
    twin = clone(model)
    norms = [module for module in model.modules() if isinstance(module, FusedNorm)]
    layers = [module for module in twin.modules() if isinstance(module, FusedDecoderLayer)]
    assert len(layers) == 2 and not any(layer.successor[0] in norms for layer in layers)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(logits_of(twin, static_cache), expected)


def test_saves_as_before(tmp_path):
    model = int4_model("qwen3")
    model.save_pretrained(tmp_path / "plain")
    fuse(model)
    model.save_pretrained(tmp_path / "fused")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "fused" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


def test_gradients_are_those_of_the_unfused_model():
    def gradients(model: PreTrainedModel) -> list[torch.Tensor]:
        ids = token_ids()
        with OpCounter() as ops:
            model(ids, labels=ids).loss.backward()
        assert not ops.counts["rms_norm"] and not ops.counts["rope"]
        return [p.grad for p in model.parameters() if p.grad is not None]

    plain, fused = int4_model("llama"), int4_model("llama")
    fuse(fused)
    expected = gradients(plain)
    assert len(expected) == 7
    assert all(map(torch.equal, gradients(fused), expected))


def test_training_mode_keeps_dropout():
    torch.manual_seed(0)
    model = int4_model("llama")
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    fuse(model)
    model.train()
    with torch.no_grad():
        assert not torch.equal(model(token_ids()).logits, model(token_ids()).logits)


def test_adapters_take_the_place_of_int4_layers():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    models = []
    for is_fused in (False, True):
        model = int4_model("llama")
        if is_fused:
            fuse(model)
        torch.manual_seed(0)
        models.append(peft.get_peft_model(model, config).eval())
    expected, found = (logits_of(model, static_cache) for model in models)
    assert torch.equal(found, expected)
    with OpCounter() as ops:
        logits_of(models[1], static_cache)
        assert not ops.counts["rope_into_cache"] and not ops.counts["gated_activation"]
        assert ops.counts["add_rms_norm"]
        with models[1].disable_adapter():
            assert not torch.equal(logits_of(models[1], static_cache), found)
    merged = models[1].unload()
    assert torch.equal(logits_of(merged, static_cache), logits_of(int4_model("llama"), static_cache))


@pytest.mark.parametrize("is_fused_first", [True, False])
def test_offloaded_by_accelerate(is_fused_first):
    from accelerate import cpu_offload

    model = int4_model("qwen3")
    expected = logits_of(model, static_cache)
    if is_fused_first:
        fuse(model)
    cpu_offload(model, execution_device=torch.device("cpu"))
    if not is_fused_first:
        assert fuse(model)["attentions"] == 2
    assert all(p.is_meta for p in model.model.layers.parameters())
    assert torch.equal(logits_of(model, static_cache), expected)
    unfuse(model)
    assert torch.equal(logits_of(model, static_cache), expected)


@pytest.mark.parametrize("is_fused_first", [True, False])
@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_hooks_that_only_place_inputs_leave_models_fused(name, is_fused_first, monkeypatch):
    """Those of device_map="auto" on several GPUs."""
    from accelerate.hooks import attach_execution_device_hook

    calls: Counter[str] = Counter()

    def counted(part: str) -> None:
        own = getattr(forwards, part)

        def call(*args: Any, **kwargs: Any) -> Any:
            calls[part] += 1
            return own(*args, **kwargs)

        monkeypatch.setattr(forwards, part, call)

    for part in ("rope", "gated_activation", "add_rms_norm", "forward_together"):
        counted(part)
    model = int4_model(name)
    fuse(model)
    expected, alone = logits_of(model, dynamic_cache), dict(calls)
    calls.clear()
    model = int4_model(name)
    if is_fused_first:
        fuse(model)
    attach_execution_device_hook(model, torch.device("cpu"))
    if not is_fused_first:
        fuse(model)
    assert torch.equal(logits_of(model, dynamic_cache), expected)
    assert calls == alone and len(calls) == 4
    calls.clear()
    # As if parts of every module stood elsewhere.
    for module in model.modules():
        if isinstance(module, HadaCoreLinear | FusedNorm):
            module._hf_hook.execution_device = "meta"
            module.forward = module._old_forward
    unfused = logits_of(model, dynamic_cache)
    assert not calls
    unfuse(model)
    assert torch.equal(logits_of(model, dynamic_cache), unfused)


def test_hooks_that_do_more_than_place_inputs_are_seen():
    from accelerate.hooks import AlignDevicesHook, SequentialHook

    here = torch.device("cpu")
    module = nn.Linear(2, 2)
    assert is_bare(module) and is_bare(module, here)
    for hook, does_nothing in [
        (AlignDevicesHook("cpu"), True),
        (AlignDevicesHook("meta"), False),
        (AlignDevicesHook("cpu", offload=True), False),
        (AlignDevicesHook("cpu", io_same_device=True), False),
        (SequentialHook(AlignDevicesHook("cpu")), False),
    ]:
        module._hf_hook = hook
        assert is_bare(module, here) == does_nothing
        assert not is_bare(module)


def test_hooks_that_write_to_the_residual_are_seen():
    model = int4_model("llama")
    steering = torch.randn(64, generator=torch.Generator().manual_seed(3)).bfloat16()

    def steer(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        output.add_(steering)

    plain = logits_of(model, dynamic_cache)
    handle = model.model.layers[0].register_forward_hook(steer)
    expected = logits_of(model, dynamic_cache)
    assert not torch.equal(expected, plain)
    fuse(model)
    assert torch.equal(logits_of(model, dynamic_cache), expected)
    with torch.inference_mode():
        assert torch.equal(logits_of(model, dynamic_cache), expected)
    handle.remove()
    assert torch.equal(logits_of(model, dynamic_cache), plain)


def test_a_norm_put_in_later_is_used():
    model = int4_model("llama")
    fuse(model)
    norm = copy.deepcopy(model.model.norm)
    with torch.no_grad():
        norm.weight.mul_(2)
    expected = logits_of(model, dynamic_cache)
    model.model.norm = norm
    assert torch.equal(logits_of(model, dynamic_cache), 2 * expected)


def test_output_hidden_states_and_attentions():
    model = int4_model("llama")
    model.set_attn_implementation("eager")

    @torch.no_grad()
    def outputs() -> list[torch.Tensor]:
        out = model(token_ids(), output_hidden_states=True, output_attentions=True)
        return [*out.hidden_states, *out.attentions]

    expected = outputs()
    fuse(model)
    found = outputs()
    assert len(found) == 5 and all(map(torch.equal, found, expected))


@pytest.mark.parametrize("name", MODELS)
def test_compiles_in_one_graph(name):
    model = int4_model(name)
    fuse(model)
    ids = token_ids()
    with torch.no_grad():
        expected = model(ids).logits
        cache = static_cache(model)
        model(ids[:, :8], past_key_values=cache)
        step = model(ids[:, 8:], past_key_values=cache, position_ids=torch.tensor([[8]])).logits

        torch.compiler.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(ids).logits, expected, rtol=0.05, atol=0.01)
        cache = static_cache(model)
        model(ids[:, :8], past_key_values=cache)
        found = compiled(ids[:, 8:], past_key_values=cache, position_ids=torch.tensor([[8]])).logits
        torch.testing.assert_close(found, step, rtol=0.05, atol=0.01)


def test_only_int4_layers_are_put_together():
    model = make_model("llama")
    assert fuse(model) == {"norms": 5, "mlps": 0, "attentions": 0, "layers": 2}
    assert not any(isinstance(module, FusedMlp | FusedAttention) for module in model.modules())
