"""HadaCoreConfig: every option validated, nothing ignored."""

import json

import pytest

from hf_hadacore import HadaCoreConfig
from hf_hadacore.config import FORMAT_VERSION
from hf_hadacore.errors import ConfigError, HadaCoreError

VALID = [
    {},
    {"group_size": -1, "symmetric": True},
    {"group_size": 32, "modules_to_not_convert": ["model.layers.0"], "add_default_skips": False},
    {"overrides": {r"layers\.(0|1)\..*proj": {"group_size": 64, "symmetric": True}, "up": {"skip": True}}},
    {"quantize_lm_head": True, "dequantize": True},
    {"cuda_graphs": False},
    {"attention": "int8-fp8"},
    {"method": "gptq", "act_order": False},
    {"method": "gptq", "act_order": "static"},
    {"method": "gptq", "act_order": "permuted", "input_permutations": [r"[qkv]_proj$"]},
]


@pytest.mark.parametrize("options", VALID)
def test_round_trip(options):
    config = HadaCoreConfig(**options)
    through_json = HadaCoreConfig.from_dict(json.loads(json.dumps(config.to_dict(), sort_keys=True)))
    assert through_json.to_dict() == config.to_dict()
    for name, value in options.items():
        assert getattr(through_json, name) == value


def test_saved_form_spells_every_value_out():
    assert HadaCoreConfig().to_dict() == {
        "quant_method": "hadacore",
        "format_version": 1,
        "bits": 4,
        "group_size": 128,
        "symmetric": False,
        "method": "rtn",
        "act_order": False,
        "attention": None,
        "modules_to_not_convert": [],
        "add_default_skips": True,
        "overrides": {},
        "quantize_lm_head": False,
        "dequantize": False,
        "cuda_graphs": True,
        "input_permutations": [],
        "stream_rotation": None,
        "key_means": {},
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groupsize": 64}, "did you mean 'group_size'"),
        ({"zzz": 1}, "valid options: bits, group_size"),
        ({"bits": 8}, "bits must be 4, got 8"),
        ({"bits": "4"}, "bits must be an integer, got '4'"),
        ({"bits": True}, "bits must be an integer"),
        ({"group_size": 48}, r"group_size must be one of \(-1, 32, 64, 128\), got 48"),
        ({"group_size": 10**40}, "group_size must be one of"),
        ({"group_size": 128.0}, "group_size must be an integer, got 128.0"),
        ({"group_size": None}, "group_size must be an integer"),
        ({"symmetric": 1}, "symmetric must be True or False, got 1"),
        ({"cuda_graphs": "on"}, "cuda_graphs must be True or False, got 'on'"),
        ({"symmetric": "false"}, "symmetric must be True or False"),
        ({"method": "awq"}, r"method must be one of \('rtn', 'gptq'\)"),
        ({"method": ["rtn"]}, "method must be one of"),
        ({"method": "gptq", "act_order": "dynamic"}, "act_order must be one of .*'static', 'permuted'"),
        ({"method": "gptq", "act_order": 1}, "act_order must be one of"),
        ({"act_order": True}, "act_order='static' needs method=\"gptq\", which quantizes offline"),
        ({"input_permutations": "q_proj"}, "input_permutations must be a list"),
        ({"input_permutations": ["(a+)+b"]}, "input_permutations: .* exponential time"),
        ({"attention": "fp4"}, "attention must be one of"),
        ({"modules_to_not_convert": "lm_head"}, "modules_to_not_convert must be a list"),
        ({"modules_to_not_convert": [1]}, "modules_to_not_convert must be a list"),
        ({"modules_to_not_convert": ["layer["]}, "modules_to_not_convert: 'layer\\[' is not a valid regex"),
        ({"overrides": [("a", {})]}, "overrides must be a dict"),
        ({"overrides": {"a": 3}}, r"overrides\['a'\] must be a dict"),
        ({"overrides": {"a": {"groupsize": 3}}}, r"overrides\['a'\].*did you mean 'group_size'"),
        ({"overrides": {"a": {"group_size": 3}}}, r"overrides\['a'\]: group_size must be one of"),
        ({"overrides": {"a": {"skip": "yes"}}}, r"overrides\['a'\]: skip must be True or False"),
        ({"overrides": {"(": {}}}, "not a valid regex"),
        ({"overrides": {"a" * 1000: {}}}, "1 to 256 characters"),
        ({"overrides": {"": {}}}, "1 to 256 characters"),
        ({"overrides": {"(a+)+b": {}}}, "exponential time"),
        ({"overrides": {"((a|b*)c?)*": {}}}, "exponential time"),
        ({"format_version": FORMAT_VERSION + 1}, f"format_version {FORMAT_VERSION + 1} is newer"),
        ({"format_version": 0}, "format_version must be 1"),
        ({"format_version": "1"}, "format_version must be an integer"),
        ({"quant_method": "gptq"}, "quant_method must be 'hadacore'"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ConfigError, match=message) as caught:
        HadaCoreConfig(**options)
    assert isinstance(caught.value, HadaCoreError | ValueError)


def test_act_order_true_is_what_measures_better():
    assert HadaCoreConfig(method="gptq", act_order=True).act_order == "static"


def test_overrides_merge_whatever_their_order():
    first = HadaCoreConfig(overrides={"up": {"group_size": 32}, r"layers\.0": {"symmetric": True}})
    second = HadaCoreConfig(overrides=dict(reversed(first.overrides.items())))
    for name in ("layers.0.up", "layers.1.up", "layers.0.down", "layers.1.down"):
        assert first.layer_spec(name) == second.layer_spec(name)
    assert first.layer_spec("layers.0.up") == (32, True, False)
    assert first.layer_spec("layers.1.up") == (32, False, False)
    assert first.layer_spec("layers.1.down") == (128, False, False)


def test_input_permutations_are_searched_as_overrides_are():
    config = HadaCoreConfig(method="gptq", input_permutations=["[qk]_proj$"])
    assert config.layer_spec("layers.0.self_attn.q_proj").input_perm
    assert not config.layer_spec("layers.0.self_attn.v_proj").input_perm


def test_overrides_that_disagree_are_an_error():
    config = HadaCoreConfig(overrides={"up": {"group_size": 32}, r"layers\.0": {"group_size": 64}})
    with pytest.raises(ConfigError, match=r"disagree about group_size of layers\.0\.up"):
        config.layer_spec("layers.0.up")
