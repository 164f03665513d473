"""Quantizing with calibration, layer by layer, is what the solver does by hand on a model in memory."""

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_cases import rewrite, stored
from other_models import OTHER_MODELS
from tiny_models import MOE, TINY_CONFIGS, VOCAB_SIZE, make_model
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_hadacore import HadaCoreConfig
from hf_hadacore.errors import CalibrationError, ConfigError, QuantizationError, UnsupportedError
from hf_hadacore.int4 import Int4Weight
from hf_hadacore.offline.calibrated import CalibratedSource
from hf_hadacore.offline.checkpoint import quantize_checkpoint
from hf_hadacore.offline.decoder import Decoder
from hf_hadacore.solvers.act_order import falling_diagonal
from hf_hadacore.solvers.gptq import gptq_quantize
from hf_hadacore.solvers.hessian import Hessian
from hf_hadacore.solvers.rtn import quantize_weight

ACT_ORDERS = [False, "static", "permuted"]


def sample_tokens(samples: int = 24, length: int = 32) -> torch.Tensor:
    return torch.randint(1, VOCAB_SIZE, (samples, length), generator=torch.Generator().manual_seed(7))


def recipe(act_order: bool | str = False, **options: Any) -> HadaCoreConfig:
    return HadaCoreConfig(method="gptq", act_order=act_order, **{"group_size": 32, **options})


def quantize(src: Path, dst: Path, config: HadaCoreConfig | None = None, **options: Any) -> dict[str, Any]:
    options = {"calibration": sample_tokens(), "progress": False, "rotation": "none", **options}
    return quantize_checkpoint(src, dst, config or recipe(), **options)


def save(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """On the CPU layers run in fp32, so that a model in fp32 computes the same bits."""
    model = make_model(name, dtype)
    model.save_pretrained(folder)
    return model


def int4_weight(tensors: dict[str, torch.Tensor], name: str, group_size: int = 32) -> Int4Weight:
    return Int4Weight(tensors[name], tensors[f"{name}_scale"], tensors.get(f"{name}_zero"), group_size)


@pytest.fixture
def src(tmp_path: Path) -> Path:
    save("llama", tmp_path / "src")
    return tmp_path / "src"


# What layers see


@pytest.mark.transformers_versions
@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_layers_one_at_a_time_compute_what_the_model_does(tmp_path: Path, name: str) -> None:
    model = make_model(name, torch.float32)
    tokens = sample_tokens()
    with torch.no_grad():
        expected = model.get_decoder()(tokens, use_cache=False, output_hidden_states=True).hidden_states
        decoder = Decoder(model)
        activations = decoder.first_inputs(tokens, torch.device("cpu"), torch.float32)
        states = [activations._states[0].clone()]
        for layer_name, layer in decoder.layers.items():
            activations.advance(layer, layer_name)
            states.append(activations._states[0].clone())
    # The last of the model's own is behind the final norm.
    assert len(states) == len(expected) == 3
    for state, hidden in zip(states[:-1], expected[:-1], strict=True):
        assert torch.equal(state, hidden)
    assert torch.equal(model.get_decoder().norm(states[-1]), expected[-1])


@pytest.mark.transformers_versions
@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_hidden_states_from_disk_are_those_of_the_loaded_model(tmp_path: Path, name: str) -> None:
    save(name, tmp_path / "src", torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "src").eval()
    source = CalibratedSource(tmp_path / "src", recipe(), sample_tokens())
    last = source.units[-1]
    source._restore = lambda layer: None
    with torch.no_grad():
        states = source._catch_up(last)._states[0]
        # The layers run in fp32, on what the embedding gives in the model's own dtype.
        decoder = Decoder(model)
        activations = decoder.first_inputs(sample_tokens(), torch.device("cpu"), torch.float32)
        activations.advance(next(iter(decoder.layers.values())).float(), "first")
    assert torch.equal(states, activations._states[0])


def test_samples_in_several_batches(src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantize(src, tmp_path / "one")
    monkeypatch.setattr("hf_hadacore.offline.decoder._BATCH_TOKENS", 5 * 32)
    quantize(src, tmp_path / "several")
    one, several = stored(tmp_path / "one"), stored(tmp_path / "several")
    assert one.keys() == several.keys()
    for name in one:
        if name.endswith(".weight_scale"):
            # Sums in another order; integers may flip where two are equally near.
            assert torch.allclose(one[name], several[name], rtol=0.05, atol=1e-4)


# What is solved


class Captured(Exception):
    pass


def inputs_of(model: PreTrainedModel, module: nn.Module) -> tuple[torch.Tensor, ...]:
    """What a module of a whole model is called with."""
    seen = []

    def see(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        seen.append(args)
        raise Captured

    hook = module.register_forward_pre_hook(see)
    with torch.no_grad(), pytest.raises(Captured):
        model(sample_tokens(), use_cache=False)
    hook.remove()
    return seen[0]


def hessian_of(x: torch.Tensor) -> torch.Tensor:
    hessian = Hessian(x.shape[-1])
    hessian.add(x)
    return hessian.matrix()


PARTS = (
    ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    ["self_attn.o_proj"],
    ["mlp.gate_proj", "mlp.up_proj"],
    ["mlp.down_proj"],
)


@pytest.mark.transformers_versions
@pytest.mark.parametrize("act_order", [False, "static"])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_equals_the_solver_called_by_hand(tmp_path: Path, name: str, act_order: bool | str) -> None:
    model = save(name, tmp_path / "src")
    quantize(tmp_path / "src", tmp_path / "dst", recipe(act_order))
    tensors = stored(tmp_path / "dst")
    for layer, parts in product(("model.layers.0", "model.layers.1"), PARTS):
        modules = [model.get_submodule(f"{layer}.{part}") for part in parts]
        hessian = hessian_of(inputs_of(model, modules[0])[0])
        result = gptq_quantize(
            torch.cat([module.weight.data for module in modules]),
            hessian,
            group_size=32,
            symmetric=False,
            order=falling_diagonal(hessian) if act_order else None,
            static_groups=bool(act_order),
        )
        rows = result.weight.packed.shape[0]
        written = [int4_weight(tensors, f"{layer}.{part}.weight") for part in parts]
        for field in ("packed", "scale", "zero"):
            together = torch.cat([getattr(weight, field) for weight in written])
            assert len(together) == rows
            assert torch.equal(together, getattr(result.weight, field))
        for module, weight in zip(modules, written, strict=True):
            module.weight.data = weight.dequantize()


def first_experts(model: PreTrainedModel, dst: Path) -> tuple[nn.Module, nn.Module]:
    """The first experts in full precision, behind the int4 attention; and in int4."""
    loaded = AutoModelForCausalLM.from_pretrained(dst, device_map="cpu")
    for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
        weight = getattr(loaded.model.layers[0].self_attn, part).int4_weight()
        getattr(model.model.layers[0].self_attn, part).weight.data = weight.dequantize()
    return model.model.layers[0].mlp.experts, loaded.model.layers[0].mlp.experts


@pytest.mark.transformers_versions
@pytest.mark.parametrize("name", MOE)
def test_experts_equal_the_solver_called_by_hand(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_hadacore.offline.expert_solver._FEWEST_TOKENS", 1)
    model = save(name, tmp_path / "src")
    quantize(tmp_path / "src", tmp_path / "dst")
    experts, loaded = first_experts(model, tmp_path / "dst")
    hidden_states, chosen, *_ = inputs_of(model, experts)
    seen = 0
    for expert in range(4):
        x = hidden_states[(chosen == expert).any(dim=1)]
        seen += len(x)
        if not len(x):
            continue  # nobody chose it; see the next test
        for projection in ("gate_up_proj", "down_proj"):
            value = experts.get_parameter(projection).data[expert]
            value = value.T if experts.is_transposed else value
            result = gptq_quantize(value, hessian_of(x), group_size=32, symmetric=False)
            written = loaded.int4_weight(projection)
            assert torch.equal(written.packed[expert], result.weight.packed)
            assert torch.equal(written.scale[expert], result.weight.scale)
            assert torch.equal(written.zero[expert], result.weight.zero)
            bias = experts.get_parameter(f"{projection}_bias").data[expert] if experts.has_bias else None
            x = nn.functional.linear(x, result.weight.dequantize(), bias)
            x = experts._apply_gate(x) if projection == "gate_up_proj" else x
    assert seen == 2 * sample_tokens().numel()


def test_experts_that_few_tokens_chose_are_rounded_to_nearest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_hadacore.offline.expert_solver._FEWEST_TOKENS", 10**6)
    model = save("mixtral", tmp_path / "src")
    report = quantize(tmp_path / "src", tmp_path / "dst")
    name = "model.layers.0.mlp.experts.gate_up_proj"
    record = next(layer for layer in report["layers"] if layer["name"] == name)
    assert (record["solver"], record["experts_without_calibration"]) == ("rtn", [0, 1, 2, 3])
    assert "damping" not in record
    experts, loaded = first_experts(model, tmp_path / "dst")
    written = loaded.int4_weight("gate_up_proj")
    hidden_states, chosen, *_ = inputs_of(model, experts)
    x = hidden_states[(chosen == 2).any(dim=1)]
    nearest = quantize_weight(
        experts.gate_up_proj.data[2],
        group_size=32,
        symmetric=False,
        importance=hessian_of(x).diagonal(),
    )
    assert torch.equal(written.packed[2], nearest.packed)
    assert torch.equal(written.scale[2], nearest.scale)


# What is written


def simulated(monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel) -> PreTrainedModel:
    """The model, which gets every layer's values as the run that follows computes with them."""
    take = CalibratedSource._take_layer

    def taking(self: CalibratedSource, unit: Any) -> dict[str, torch.Tensor]:
        layer = self._plain.get_submodule(unit.name)
        model.get_submodule(unit.name).load_state_dict(layer.state_dict())
        return take(self, unit)

    monkeypatch.setattr(CalibratedSource, "_take_layer", taking)
    return model


@pytest.mark.transformers_versions
@pytest.mark.parametrize("act_order", ACT_ORDERS)
@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_loaded_model_computes_what_was_simulated(
    tmp_path: Path, name: str, act_order: bool | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = save(name, tmp_path / "src")
    simulation = simulated(monkeypatch, make_model(name, torch.float32))
    quantize(tmp_path / "src", tmp_path / "dst", recipe(act_order))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "dst", device_map="cpu")
    tokens = sample_tokens(4)
    with torch.no_grad():
        expected, exact, got = (model(tokens).logits for model in (simulation, original, loaded))
    assert torch.allclose(got, expected, rtol=1e-3, atol=1e-3 * float(expected.std()))
    # A permutation that is not undone somewhere costs about 1.
    assert float((got - exact).norm() / exact.norm()) < 0.25
    has_order = {key for key in stored(tmp_path / "dst") if key.endswith("input_perm")}
    assert bool(has_order) == (act_order == "permuted")
    if act_order == "permuted":
        orders = stored(tmp_path / "dst")
        q, v = (orders[f"model.layers.0.self_attn.{part}.input_perm"] for part in ("q_proj", "v_proj"))
        assert torch.equal(q, v)
        assert not torch.equal(q, q.sort().values)
        assert not any("o_proj" in key or "down_proj" in key for key in has_order)


@pytest.mark.parametrize("name", ["gemma3-vision", "classifier", "deepseek-v3"])
def test_other_architectures(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    model = OTHER_MODELS[name]().float().eval()
    model.save_pretrained(tmp_path / "src")
    report = quantize(tmp_path / "src", tmp_path / "dst", recipe("permuted"))
    loaded = type(model).from_pretrained(tmp_path / "dst", device_map="cpu")
    tokens = sample_tokens(4)
    with torch.no_grad():
        exact, got = model(tokens).logits, loaded(tokens).logits
    assert float((got - exact).norm() / exact.norm()) < 0.25
    solvers = {layer["name"]: layer.get("solver") for layer in report["layers"]}
    assert all((solver == "gptq") != ("vision" in name) for name, solver in solvers.items())


def test_weights_outside_of_decoder_layers_are_rounded_to_nearest(src: Path, tmp_path: Path) -> None:
    report = quantize(src, tmp_path / "dst", recipe(quantize_lm_head=True))
    quantize_checkpoint(
        src, tmp_path / "rtn", HadaCoreConfig(group_size=32, quantize_lm_head=True), progress=False
    )
    assert report["layers"][0]["name"] == "lm_head.weight"
    assert "solver" not in report["layers"][0]
    calibrated, rounded = stored(tmp_path / "dst"), stored(tmp_path / "rtn")
    assert torch.equal(calibrated["lm_head.weight"], rounded["lm_head.weight"])


def test_options_of_layers_hold(src: Path, tmp_path: Path) -> None:
    config = recipe(
        "permuted",
        overrides={"k_proj": {"symmetric": True}, "down_proj": {"skip": True}, r"1.*up": {"group_size": 64}},
    )
    report = quantize(src, tmp_path / "dst", config)
    tensors, original = stored(tmp_path / "dst"), stored(src)
    assert "model.layers.0.self_attn.k_proj.weight_zero" not in tensors
    assert torch.equal(*(t["model.layers.0.mlp.down_proj.weight"] for t in (tensors, original)))
    groups = {layer["name"]: layer["group_size"] for layer in report["layers"]}
    assert groups["model.layers.1.mlp.up_proj.weight"] == 64
    assert groups["model.layers.0.mlp.up_proj.weight"] == 32
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "dst", device_map="cpu")
    model = AutoModelForCausalLM.from_pretrained(src)
    with torch.no_grad():
        exact, got = model(sample_tokens(4)).logits, loaded(sample_tokens(4)).logits
    assert float((got - exact).norm() / exact.norm()) < 0.25


def test_report(src: Path, tmp_path: Path) -> None:
    report = quantize(src, tmp_path / "dst", recipe("static"))
    assert report == json.loads((tmp_path / "dst" / "quantization_report.json").read_text())
    calibration = report["calibration"]
    assert (calibration["samples"], calibration["sequence_length"], calibration["damping"]) == (24, 32, 0.01)
    other = quantize(src, tmp_path / "other", recipe("static"), calibration=sample_tokens(25))["calibration"]
    assert other["sha256_of_tokens"] != calibration["sha256_of_tokens"]
    assert (report["quantization_config"]["method"], report["quantization_config"]["act_order"]) == (
        "gptq",
        "static",
    )
    original, tensors = stored(src), stored(tmp_path / "dst")
    for layer in report["layers"]:
        assert (layer["solver"], layer["tokens"], layer["damping"]) == ("gptq", 24 * 32, 0.01)
        weight, exact = int4_weight(tensors, layer["name"]).dequantize(), original[layer["name"]]
        assert layer["relative_error"] == pytest.approx(
            float((weight - exact).norm() / exact.norm()), rel=1e-3
        )
    # The first layers' inputs are those of the original model.
    model = AutoModelForCausalLM.from_pretrained(src)
    (x,) = inputs_of(model, model.model.layers[0].self_attn.q_proj)
    name = "model.layers.0.self_attn.k_proj.weight"
    exact, got = (x.flatten(0, 1) @ w.T for w in (original[name], int4_weight(tensors, name).dequantize()))
    error = next(layer["output_error"] for layer in report["layers"] if layer["name"] == name)
    assert error == pytest.approx(float(((got - exact).norm() / exact.norm()) ** 2), rel=1e-3)


def test_better_than_rounding_to_nearest(src: Path, tmp_path: Path) -> None:
    quantize(src, tmp_path / "gptq")
    quantize_checkpoint(src, tmp_path / "rtn", HadaCoreConfig(group_size=32), progress=False)
    model = AutoModelForCausalLM.from_pretrained(src)
    errors = {}
    with torch.no_grad():
        exact = model(sample_tokens()).logits
        for name in ("gptq", "rtn"):
            loaded = AutoModelForCausalLM.from_pretrained(tmp_path / name, device_map="cpu")
            errors[name] = float((loaded(sample_tokens()).logits - exact).norm())
    assert errors["gptq"] < 0.9 * errors["rtn"]


# Inputs that are not nice


@pytest.mark.parametrize("act_order", ACT_ORDERS)
def test_dead_channels_and_one_short_sample(src: Path, tmp_path: Path, act_order: bool | str) -> None:
    def kill(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.input_layernorm.weight"][5:9] = 0
        tensors["model.layers.1.mlp.up_proj.weight"][3] = 0

    rewrite(src, kill)
    quantize(src, tmp_path / "dst", recipe(act_order), calibration=sample_tokens(1, 2))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "dst", device_map="cpu")
    assert loaded(sample_tokens()).logits.isfinite().all()


def test_nan_activations_name_the_layer(src: Path, tmp_path: Path) -> None:
    name = "model.layers.1.post_attention_layernorm.weight"
    rewrite(src, lambda tensors: tensors[name].fill_(float("nan")))
    with pytest.raises(QuantizationError, match=r"model\.layers\.1\.mlp\.gate_proj: .*NaN or infinite"):
        quantize(src, tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


def test_overflow_names_the_layer(src: Path, tmp_path: Path) -> None:
    # Nothing but the residual sum overflows: no weight that is quantized sees it in this layer.
    name = "model.layers.0.post_attention_layernorm.weight"
    rewrite(src, lambda tensors: tensors["model.layers.0.mlp.down_proj.weight"].mul_(3e38))
    rewrite(src, lambda tensors: tensors[name].mul_(100))
    with pytest.raises(QuantizationError, match=r"model\.layers\.0"):
        quantize(src, tmp_path / "dst")


def test_nan_weights_name_the_layer(src: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    rewrite(src, lambda tensors: tensors[name].view(-1)[5].fill_(float("nan")))
    with pytest.raises(QuantizationError, match=r"model\.layers\.1\.mlp\.up_proj"):
        quantize(src, tmp_path / "dst")


@pytest.mark.parametrize(
    ("calibration", "says"),
    [
        (torch.zeros(3, 4), r"int64 \[samples, length\], found torch.float32 \[3, 4\]"),
        (torch.zeros(4, dtype=torch.int64), r"found torch.int64 \[4\]"),
        (torch.zeros(0, 4, dtype=torch.int64), r"\[0, 4\]"),
        (torch.full((2, 4), VOCAB_SIZE), "go from 96 to 96, the model knows 0 to 95"),
        (torch.full((2, 4), -1), "from -1"),
        (torch.ones(2, 65, dtype=torch.int64), "65 tokens are longer than the 64 positions"),
    ],
)
def test_tokens_that_do_not_fit(src: Path, tmp_path: Path, calibration: torch.Tensor, says: str) -> None:
    with pytest.raises(CalibrationError, match=says):
        quantize(src, tmp_path / "dst", calibration=calibration)
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def test_method_and_calibration_belong_together(src: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="method='gptq' needs calibration data"):
        quantize(src, tmp_path / "dst", calibration=None)
    with pytest.raises(ConfigError, match="method='rtn' uses no calibration data"):
        quantize(src, tmp_path / "dst", HadaCoreConfig())
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def test_encoder_decoder_is_refused(tmp_path: Path) -> None:
    OTHER_MODELS["t5"]().save_pretrained(tmp_path / "src")
    with pytest.raises(UnsupportedError, match=r"T5.*stack of decoder layers"):
        quantize(tmp_path / "src", tmp_path / "dst")
    assert not (tmp_path / "dst.partial").exists()
