"""Rotations that are folded into weights."""

import pytest
import torch
from tiny_models import TINY_CONFIGS, make_model, token_ids
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    DeepseekV3Config,
    Gemma3Config,
    GemmaConfig,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
)

from hf_hadacore.errors import ConfigError, UnsupportedError
from hf_hadacore.hadamard_matrices import hadamard_matrix
from hf_hadacore.offline import rotation_search
from hf_hadacore.offline.rotation_search import plan_rotation, rotate_model
from hf_hadacore.offline.weight_rotation import AxisRotation, ParameterChange, WeightRotation

pytestmark = pytest.mark.transformers_versions

_SIZES = dict(
    vocab_size=96,
    hidden_size=48,  # 12 * 4: no power of two
    intermediate_size=104,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=64,
    pad_token_id=0,
)
_CONFIGS = {
    "gemma": lambda: GemmaConfig(**_SIZES),  # gains 1 + w, and no norms behind the blocks
    "phi3": lambda: Phi3Config(**_SIZES),  # q, k and v in one, gate and up in one
    "qwen2": lambda: Qwen2Config(**_SIZES),  # biases of q, k and v
    "llama-biases": lambda: LlamaConfig(**_SIZES, attention_bias=True, mlp_bias=True),
    "granite": lambda: GraniteConfig(
        **_SIZES, embedding_multiplier=6.0, residual_multiplier=0.3, logits_scaling=4.0
    ),
}
ROTATABLE = [*(name for name in TINY_CONFIGS if name != "gemma3"), *_CONFIGS]


def make(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    if name in TINY_CONFIGS:
        return make_model(name, dtype)
    return from_config(_CONFIGS[name](), dtype)


def from_config(config: object, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(token_ids()).logits


@pytest.mark.parametrize("kind", ["r1", "r2", "r1r2"])
@pytest.mark.parametrize("name", ROTATABLE)
def test_rotated_models_compute_the_same(name: str, kind: str) -> None:
    model = make(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    expected = logits(model)
    rotate_model(model, kind)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    # gpt-oss has a bias for each expert.
    matrices = [key for key in before if before[key].dim() > 1 and not key.endswith("gate_up_proj_bias")]
    layers = [key for key in matrices if ".layers." in key]
    changed = {key for key in layers if not torch.equal(before[key], model.state_dict()[key])}
    if kind == "r2":
        assert len(changed) == 2 * 2  # v_proj and o_proj of two layers
    else:
        assert changed == set(layers)


@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_gains_of_norms_are_folded(name: str) -> None:
    model = rotate_model(make(name), "r1")
    norms = [value for key, value in model.state_dict().items() if "norm" in key]
    assert len(norms) == 5
    assert all((value == (0 if name == "gemma" else 1)).all() for value in norms)


def test_norms_of_heads_stay() -> None:
    model = make("qwen3")
    gains = model.model.layers[0].self_attn.q_norm.weight.clone()
    rotate_model(model, "r1r2")
    assert torch.equal(model.model.layers[0].self_attn.q_norm.weight, gains)


def test_embedding_and_head_are_no_longer_tied(tmp_path: object) -> None:
    model = make("llama-tied")
    expected = logits(model)
    rotate_model(model, "r1")
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_r2_leaves_embedding_and_head_tied() -> None:
    model = rotate_model(make("llama-tied"), "r2")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings


def test_the_rotations_are_the_documented_ones() -> None:
    model = make("llama-biases")
    layer = model.model.layers[0]
    before = {key: value.double() for key, value in model.state_dict().items()}
    rotate_model(model, "r1r2")
    after = model.state_dict()
    # R from the embedding, which is E R.
    r = torch.linalg.lstsq(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"].double())
    r = r.solution
    torch.testing.assert_close((r * 48**0.5).abs(), torch.ones(48, 48, dtype=torch.double), rtol=0, atol=1e-4)
    torch.testing.assert_close(r @ r.T, torch.eye(48, dtype=torch.double), rtol=0, atol=1e-5)
    heads = torch.kron(torch.eye(4), hadamard_matrix(16).float() / 4).double()
    prefix = "model.layers.0."
    gains = before[f"{prefix}input_layernorm.weight"]

    def check(value: torch.Tensor, expected: torch.Tensor) -> None:
        torch.testing.assert_close(value.double(), expected, rtol=0, atol=1e-4)

    attention = f"{prefix}self_attn."
    check(layer.self_attn.q_proj.weight, before[f"{attention}q_proj.weight"] * gains @ r)
    check(layer.self_attn.q_proj.bias, before[f"{attention}q_proj.bias"])
    values = heads[:32, :32]
    check(layer.self_attn.v_proj.weight, values @ before[f"{attention}v_proj.weight"] * gains @ r)
    check(layer.self_attn.v_proj.bias, values @ before[f"{attention}v_proj.bias"])
    check(layer.self_attn.o_proj.weight, r.T @ before[f"{attention}o_proj.weight"] @ heads.T)
    check(layer.self_attn.o_proj.bias, r.T @ before[f"{attention}o_proj.bias"])
    check(layer.mlp.down_proj.weight, r.T @ before[f"{prefix}mlp.down_proj.weight"])
    check(model.lm_head.weight, before["lm_head.weight"] * before["model.norm.weight"] @ r)


@pytest.mark.parametrize("name", ["llama", "gpt-oss"])
def test_values_are_rounded_once(name: str) -> None:
    model = make(name, torch.bfloat16)
    plan = plan_rotation(model, "r1r2")
    parameters = dict(model.named_parameters())
    plan.set_gains(parameters)
    for key, value in parameters.items():
        rotated = plan.rotate(key, value)
        assert rotated.dtype == torch.bfloat16 and rotated.is_contiguous()
        assert torch.equal(rotated, plan.rotate(key, value.float()).bfloat16())


def test_large_tensors_are_rotated_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = WeightRotation("r1", {"w": ParameterChange((AxisRotation(1),))}, {})
    w = torch.randn(50, 64)
    whole = plan.rotate("w", w)
    monkeypatch.setattr("hf_hadacore.offline.weight_rotation._PART_ELEMENTS", 64 * 7)
    torch.testing.assert_close(plan.rotate("w", w), whole)


def test_a_plan_is_made_on_meta_and_leaves_the_generator_alone() -> None:
    with torch.device("meta"):
        on_meta = AutoModelForCausalLM.from_config(TINY_CONFIGS["qwen3-moe"](), dtype=torch.bfloat16)
    state = torch.random.get_rng_state()
    plan = plan_rotation(on_meta, "r1r2")
    assert torch.equal(torch.random.get_rng_state(), state)
    other = plan_rotation(make("qwen3-moe"), "r1r2")
    assert (plan.changes, plan.norms) == (other.changes, other.norms)


def test_norms_behind_the_blocks_allow_r2_only() -> None:
    model = make("gemma3")
    with pytest.raises(UnsupportedError, match=r'post_attention_layernorm.*rotation="r2"'):
        rotate_model(model, "r1r2")
    expected = logits(model)
    rotate_model(model, "r2")
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (lambda: GPT2Config(n_layer=2, n_head=2, n_embd=32, vocab_size=96), "is no RMSNorm.*LayerNorm"),
        (lambda: CohereConfig(**_SIZES), "is no RMSNorm.*CohereLayerNorm"),
        (lambda: LlamaConfig(**{**_SIZES, "hidden_size": 668}), 'size, 668, .*rotation="r2"'),
        (
            lambda: Gemma3Config(
                text_config={**_SIZES, "vocab_size": 300},
                vision_config={"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
            ),
            "only decoders of text",
        ),
    ],
)
def test_what_cannot_be_rotated_is_refused(config: object, reason: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config())
    with pytest.raises(UnsupportedError, match=reason):
        plan_rotation(model, "r1")


def test_heads_without_values_of_their_own_allow_r1_only() -> None:
    sizes = {**_SIZES, "num_key_value_heads": 4, "head_dim": 8}
    ranks = dict(q_lora_rank=24, kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16)
    experts = dict(
        n_routed_experts=4, n_group=2, topk_group=1, num_experts_per_tok=2, first_k_dense_replace=1
    )
    model = from_config(DeepseekV3Config(**sizes, **ranks, **experts, moe_intermediate_size=24))
    with pytest.raises(UnsupportedError, match=r'\(R2\).*rotation="r1"'):
        plan_rotation(model, "r1r2")
    expected = logits(model)
    rotate_model(model, "r1")
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_a_plan_that_changes_logits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    found = rotation_search._head_changes

    def without_readers(tiny: PreTrainedModel) -> dict[str, ParameterChange]:
        return {name: change for name, change in found(tiny).items() if "o_proj" not in name}

    monkeypatch.setattr(rotation_search, "_head_changes", without_readers)
    with pytest.raises(UnsupportedError, match="something else"):
        plan_rotation(make("llama"), "r2")


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match="none, r1, r2, r1r2"):
        plan_rotation(make("llama"), "R3")
