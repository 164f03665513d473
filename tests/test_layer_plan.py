"""What is quantized, and that nothing is skipped without a word."""

import pytest
from tiny_models import MOE, TINY_CONFIGS, make_model
from torch import nn
from transformers import AutoModelForSequenceClassification

from hf_hadacore import HadaCoreConfig
from hf_hadacore.errors import ConfigError
from hf_hadacore.layer_plan import plan_layers

pytestmark = pytest.mark.transformers_versions


@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_every_parameter_is_accounted_for(name):
    model = make_model(name)
    plan = plan_layers(model, HadaCoreConfig())
    quantized = {f"{n}.weight" for n in plan.linears}
    quantized |= {f"{n}.{p}" for n in plan.experts for p in ("gate_up_proj", "down_proj")}
    assert quantized | plan.kept.keys() == plan.sizes.keys()
    assert not quantized & plan.kept.keys()
    linears = {n for n, m in model.named_modules() if type(m) is nn.Linear}
    assert plan.linears.keys() == linears - {"lm_head"}
    assert len(plan.experts) == (2 if name in MOE else 0)
    share = sum(plan.sizes[n] for n in quantized) / sum(p.numel() for p in model.parameters())
    assert plan.quantized_share == pytest.approx(share)


def test_description_lists_what_stays_with_its_share():
    text = plan_layers(make_model("mixtral"), HadaCoreConfig()).describe()
    assert "8 linear layers and 2 fused experts modules become int4" in text
    for kept in ("lm_head.weight", "model.embed_tokens.weight", "router", "norms"):
        assert kept in text


def test_user_skips_add_to_the_defaults():
    model = make_model("llama")
    plan = plan_layers(model, HadaCoreConfig(modules_to_not_convert=["model.layers.1", "up_proj"]))
    assert "lm_head" not in plan.linears
    assert not any(n.startswith("model.layers.1.") or n.endswith("up_proj") for n in plan.linears)
    assert "model.layers.0.mlp.down_proj" in plan.linears


def test_user_skips_replace_the_defaults_when_told_to():
    config = HadaCoreConfig(modules_to_not_convert=["up_proj"], add_default_skips=False)
    plan = plan_layers(make_model("llama"), config)
    assert "lm_head" in plan.linears
    assert "model.layers.0.mlp.up_proj" not in plan.linears


def test_overrides():
    config = HadaCoreConfig(
        modules_to_not_convert=["model.layers.1"],
        overrides={
            r"\.0\.mlp\.": {"group_size": 32, "symmetric": True},
            r"0\.self_attn\.v_proj": {"skip": True},
            r"1\.mlp\.down_proj": {"skip": False},
            "lm_head": {"skip": False, "group_size": 64},
        },
    )
    plan = plan_layers(make_model("llama"), config)
    assert plan.linears["model.layers.0.mlp.up_proj"] == (32, True, False)
    assert plan.linears["model.layers.0.self_attn.q_proj"] == (128, False, False)
    assert plan.kept["model.layers.0.self_attn.v_proj.weight"] == "skipped by an override"
    assert "model.layers.1.mlp.down_proj" in plan.linears
    assert "model.layers.1.mlp.up_proj" not in plan.linears
    assert plan.linears["lm_head"] == (64, False, False)


def test_an_override_that_matches_nothing_is_an_error():
    with pytest.raises(ConfigError, match=r"overrides\['layer0'\] matches no module"):
        plan_layers(make_model("llama"), HadaCoreConfig(overrides={"layer0": {"skip": True}}))


def test_lm_head():
    assert "lm_head" in plan_layers(make_model("llama"), HadaCoreConfig(quantize_lm_head=True)).linears
    tied = plan_layers(make_model("llama-tied"), HadaCoreConfig(quantize_lm_head=True))
    assert tied.tied_head == "lm_head"
    assert "lm_head" not in tied.linears
    with pytest.raises(ConfigError, match="quantize_lm_head=True contradicts"):
        plan_layers(
            make_model("llama"), HadaCoreConfig(quantize_lm_head=True, modules_to_not_convert=["lm_head"])
        )


def test_names_are_those_of_the_whole_model_when_only_its_base_is_planned():
    config = HadaCoreConfig(
        modules_to_not_convert=["model.layers.1"], overrides={r"^model\.layers\.0\.mlp": {"group_size": 32}}
    )
    plan = plan_layers(make_model("llama").model, config)
    assert plan.linears["layers.0.mlp.up_proj"].group_size == 32
    assert "layers.1.mlp.up_proj" not in plan.linears


def test_the_head_of_a_classifier_stays():
    model = AutoModelForSequenceClassification.from_config(make_model("llama").config)
    plan = plan_layers(model, HadaCoreConfig())
    assert plan.kept["score.weight"] == "output head"


def test_unsupported_layers_stay_with_the_reason():
    class Subclass(nn.Linear):
        pass

    model = make_model("llama")
    mlp = model.model.layers[0].mlp
    mlp.up_proj = Subclass(64, 104)
    mlp.down_proj = nn.Linear(100, 64)
    model.model.layers[1].mlp.experts = nn.Identity()
    model.model.layers[1].mlp.gate = nn.Linear(64, 4)
    kept = plan_layers(model, HadaCoreConfig()).kept
    assert "subclass of nn.Linear" in kept["model.layers.0.mlp.up_proj.weight"]
    assert kept["model.layers.0.mlp.down_proj.weight"] == "100 inputs, not a multiple of 8"
    assert kept["model.layers.1.mlp.gate.weight"] == "router"
