"""from_pretrained, save_pretrained, reload, dequantize: what transformers' own tests check of a quantizer."""

import copy
import hashlib
import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import MOE, TINY_CONFIGS, make_model, token_ids
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from hf_hadacore import HadaCoreConfig, HadaCoreLinear, int4
from hf_hadacore.errors import CheckpointError, ConfigError, QuantizationError
from hf_hadacore.modules.experts import HadaCoreExperts
from hf_hadacore.quantizer import HadaCoreHfQuantizer

pytestmark = pytest.mark.transformers_versions

RECIPES = {
    "default": HadaCoreConfig(),
    "symmetric": HadaCoreConfig(group_size=32, symmetric=True),
    "rows": HadaCoreConfig(group_size=-1),
    "head": HadaCoreConfig(group_size=64, quantize_lm_head=True),
}


def load(path: Path, config: HadaCoreConfig | None = None, **kwargs):
    # An explicit quantization_config=None would make transformers forget the checkpoint's own.
    if config is not None:
        kwargs["quantization_config"] = config
    return AutoModelForCausalLM.from_pretrained(path, **kwargs)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(token_ids().to(model.device)).logits.float()


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.detach() - expected.detach()).norm() / expected.detach().norm())


def hashes(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def stored_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


@pytest.fixture
def saved(tmp_path):
    """A function that saves a tiny full-precision model and returns its folder."""

    def save(name: str) -> Path:
        make_model(name).save_pretrained(tmp_path / name)
        return tmp_path / name

    return save


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_quantize_save_reload_resave(saved, tmp_path, name, recipe):
    model = load(saved(name), RECIPES[recipe])
    expected = logits(model)
    model.save_pretrained(tmp_path / "int4", max_shard_size="30KB")
    assert len(list((tmp_path / "int4").glob("*.safetensors"))) > 1

    reloaded = load(tmp_path / "int4")
    assert torch.equal(logits(reloaded), expected)
    assert reloaded.config.quantization_config.to_dict() == RECIPES[recipe].to_dict()
    reloaded.save_pretrained(tmp_path / "again", max_shard_size="30KB")
    assert hashes(tmp_path / "again") == hashes(tmp_path / "int4")


@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_modules_are_converted_and_close_to_the_original(saved, name):
    original = make_model(name)
    model = load(saved(name), HadaCoreConfig(group_size=32))
    linears = {n for n, m in original.named_modules() if type(m) is nn.Linear} - {"lm_head"}
    assert {n for n, m in model.named_modules() if isinstance(m, HadaCoreLinear)} == linears
    assert sum(isinstance(m, HadaCoreExperts) for m in model.modules()) == (2 if name in MOE else 0)
    for linear in linears:
        got = model.get_submodule(linear).int4_weight().dequantize(torch.float32)
        expected = original.get_submodule(linear).weight.float()
        # Uniform noise of one 15-level step would be below 0.12 for these Gaussian weights.
        assert 0 < relative_error(got, expected) < 0.12
    assert relative_error(logits(model), logits(original)) < 0.5


@pytest.mark.parametrize("name", MOE)
def test_experts_compute_what_the_dequantized_experts_do(saved, name):
    model = load(saved(name), HadaCoreConfig(group_size=32), dtype=torch.float32)
    expected = logits(model)
    assert relative_error(logits(model.dequantize()), expected) < 1e-5


def test_experts_skip_sentinels_and_empty_batches(saved):
    experts = load(saved("mixtral"), HadaCoreConfig(), dtype=torch.float32).model.layers[0].mlp.experts
    x = torch.randn(3, 64)
    index = torch.tensor([[0, 4], [1, 2], [7, 3]])
    weights = torch.rand(3, 2)
    real = weights * (index < 4)
    expected = experts(x, index.clamp(max=3), real)
    assert relative_error(experts(x, index, weights), expected) < 1e-6
    assert experts(x[:0], index[:0], weights[:0]).shape == (0, 64)


def test_checkpoint_holds_the_format(saved, tmp_path):
    load(saved("gpt-oss"), HadaCoreConfig(group_size=32)).save_pretrained(tmp_path / "int4")
    tensors = stored_tensors(tmp_path / "int4")
    q_proj = "model.layers.0.self_attn.q_proj"
    assert tensors[f"{q_proj}.weight"].dtype == torch.int32
    assert tensors[f"{q_proj}.weight"].shape == (64, 64 // 8)
    assert tensors[f"{q_proj}.weight_scale"].shape == (64, 2)
    assert tensors[f"{q_proj}.weight_scale"].dtype == torch.bfloat16
    assert tensors[f"{q_proj}.weight_zero"].dtype == torch.uint8
    experts = "model.layers.0.mlp.experts"
    # gpt-oss keeps its experts input-major; stored int4 is output-major.
    assert tensors[f"{experts}.gate_up_proj"].shape == (4, 208, 64 // 8)
    assert tensors[f"{experts}.gate_up_proj_scale"].shape == (4, 208, 2)
    assert tensors[f"{experts}.down_proj"].shape == (4, 64, 104 // 8)
    assert tensors[f"{experts}.down_proj_zero"].shape == (4, 64, 4)
    assert tensors[f"{experts}.gate_up_proj_bias"].shape == (4, 208)


def test_symmetric_checkpoint_has_no_zeros(saved, tmp_path):
    load(saved("mixtral"), HadaCoreConfig(symmetric=True)).save_pretrained(tmp_path / "int4")
    assert not any(name.endswith("_zero") for name in stored_tensors(tmp_path / "int4"))


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt-oss"])
def test_dequantize_gives_the_stored_weights_in_the_original_classes(saved, tmp_path, name):
    source = saved(name)
    load(source, HadaCoreConfig(group_size=32)).save_pretrained(tmp_path / "int4")
    model = load(tmp_path / "int4")
    expected = {
        n: m.int4_weight().dequantize() for n, m in model.named_modules() if isinstance(m, HadaCoreLinear)
    }
    by_method = model.dequantize()
    by_option = load(tmp_path / "int4", HadaCoreConfig(dequantize=True))
    for plain in (by_method, by_option):
        assert not getattr(plain, "is_quantized", False)
        assert not hasattr(plain.config, "quantization_config")
        assert {type(m) for m in plain.modules()} == {type(m) for m in make_model(name).modules()}
        for linear, weight in expected.items():
            assert torch.equal(plain.get_submodule(linear).weight, weight)
    assert torch.equal(logits(by_method), logits(by_option))
    by_method.save_pretrained(tmp_path / "plain")
    assert stored_tensors(tmp_path / "plain").keys() == stored_tensors(source).keys()
    assert torch.equal(logits(load(tmp_path / "plain")), logits(by_method))


def test_dequantize_option_needs_a_quantized_checkpoint(llama_dir):
    with pytest.raises(ConfigError, match="dequantize=True needs a quantized checkpoint"):
        load(llama_dir, HadaCoreConfig(dequantize=True))


def test_lm_head_of_a_tied_model_is_untied(saved, tmp_path):
    source = saved("llama-tied")
    model = load(source, HadaCoreConfig(quantize_lm_head=True))
    assert isinstance(model.lm_head, HadaCoreLinear)
    assert torch.equal(model.model.embed_tokens.weight, make_model("llama-tied").model.embed_tokens.weight)
    model.save_pretrained(tmp_path / "int4")
    assert AutoConfig.from_pretrained(tmp_path / "int4").tie_word_embeddings is False
    assert isinstance(load(tmp_path / "int4").lm_head, HadaCoreLinear)
    assert not isinstance(load(source, HadaCoreConfig()).lm_head, HadaCoreLinear)


def test_only_adapters_and_full_precision_parameters_may_need_gradients(saved, tmp_path):
    model = load(saved("mixtral"), HadaCoreConfig())
    model.save_pretrained(tmp_path / "int4")
    for loaded in (model, load(tmp_path / "int4")):
        for name, parameter in loaded.named_parameters():
            if name.endswith(("_scale", "_zero")) or parameter.dtype == torch.int32:
                assert not parameter.requires_grad, name


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_dtypes(llama_dir, tmp_path, dtype):
    model = load(llama_dir, HadaCoreConfig(), dtype=dtype)
    assert model.model.layers[0].mlp.up_proj.weight_scale.dtype == dtype
    assert model(token_ids()).logits.dtype == dtype
    model.save_pretrained(tmp_path / "int4")
    assert torch.equal(logits(load(tmp_path / "int4")), logits(model))
    as_bf16 = load(tmp_path / "int4", dtype=torch.bfloat16)
    assert as_bf16.dtype == torch.bfloat16
    assert relative_error(logits(as_bf16), logits(model)) < 0.05


def test_float64_is_refused(llama_dir):
    with pytest.raises(ConfigError, match="float16, bfloat16 or float32"):
        load(llama_dir, HadaCoreConfig(), dtype=torch.float64)


def test_base_model_of_a_quantized_checkpoint(saved, tmp_path):
    config = HadaCoreConfig(modules_to_not_convert=["model.layers.1"])
    model = load(saved("llama"), config)
    model.save_pretrained(tmp_path / "int4")
    base = AutoModel.from_pretrained(tmp_path / "int4")
    with torch.no_grad():
        expected = model.model(token_ids()).last_hidden_state
        assert torch.equal(base(token_ids()).last_hidden_state, expected)


def test_generate_with_all_cache_kinds(saved):
    model = load(saved("llama"), HadaCoreConfig())
    greedy = model.generate(token_ids(), max_new_tokens=5, do_sample=False)
    assert greedy.shape == (2, 14)
    static = model.generate(
        token_ids(), max_new_tokens=5, do_sample=False, cache_implementation="static", disable_compile=True
    )
    assert torch.equal(static, greedy)
    assert model.generate(token_ids(), max_new_tokens=3, num_beams=2).shape == (2, 12)


def test_torch_compile(saved):
    model = load(saved("llama"), HadaCoreConfig())
    expected = logits(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert relative_error(compiled(token_ids()).logits.float(), expected) < 0.01


def test_deepcopy_and_state_dict_round_trip(saved):
    model = load(saved("llama"), HadaCoreConfig())
    expected = logits(model)
    assert torch.equal(logits(copy.deepcopy(model)), expected)
    layer = model.model.layers[0].mlp.up_proj
    assert torch.equal(pickle.loads(pickle.dumps(layer)).weight, layer.weight)
    other = load(saved("llama"), HadaCoreConfig())
    for module in other.modules():
        if isinstance(module, HadaCoreLinear):
            module.weight_scale.data.zero_()
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), expected)


def test_memory_estimates_are_exact(saved, tmp_path):
    quantizers = []
    original = HadaCoreHfQuantizer._process_model_before_weight_loading

    def spy(self, model, **kwargs):
        original(self, model, **kwargs)
        tied = model.all_tied_weights_keys
        sizes = {
            n: int(p.numel() * self.param_element_size(model, n, p))
            for n, p in model.named_parameters()
            if n not in tied
        }
        quantizers.append(sizes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HadaCoreHfQuantizer, "_process_model_before_weight_loading", spy)
        on_the_fly = load(saved("mixtral"), HadaCoreConfig())
        on_the_fly.save_pretrained(tmp_path / "int4")
        prequantized = load(tmp_path / "int4")
        plain = load(tmp_path / "int4", HadaCoreConfig(dequantize=True))
    for model, sizes in zip((on_the_fly, prequantized), quantizers, strict=False):
        assert sizes == {n: p.numel() * p.element_size() for n, p in model.named_parameters()}
    dequantized = sum(p.numel() * p.element_size() for p in plain.parameters())
    scales_and_zeros = sum(s for n, s in quantizers[2].items() if n.endswith(("_scale", "_zero")))
    assert sum(quantizers[2].values()) - scales_and_zeros == dequantized


def test_what_stays_is_said_once(saved, caplog):
    import transformers

    transformers.logging.enable_propagation()
    try:
        load(saved("mixtral"), HadaCoreConfig(group_size=64))
    finally:
        transformers.logging.disable_propagation()
    messages = [r.getMessage() for r in caplog.records if "become int4" in r.getMessage()]
    assert len(messages) == 1
    assert "lm_head.weight" in messages[0] and "%" in messages[0]


def test_nothing_to_quantize_is_an_error(llama_dir):
    with pytest.raises(ConfigError, match="nothing in LlamaForCausalLM can be quantized"):
        load(llama_dir, HadaCoreConfig(modules_to_not_convert=["model"]))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_damaged_source_weights_are_named(llama_dir, value):
    file = llama_dir / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(QuantizationError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        load(llama_dir, HadaCoreConfig())


def mutate(folder: Path, change) -> None:
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(UP), rf"{UP}: expected int32 .* found no such tensor"),
        (lambda t: t.pop(f"{UP}_scale"), rf"{UP}_scale: expected"),
        (lambda t: t.update({UP: t[UP].long()}), rf"{UP}: expected int32 .* found int64"),
        (
            lambda t: t.update({UP: t[UP][:-1].clone()}),
            rf"{UP}: expected int32 \[104, 8\], found int32 \[103, 8\]",
        ),
        (lambda t: t.update({f"{UP}_zero": t[f"{UP}_zero"].float()}), rf"{UP}_zero: expected uint8"),
        (lambda t: t[f"{UP}_scale"].view(-1)[0:1].fill_(float("nan")), rf"{UP}_scale holds NaN"),
        (lambda t: t[f"{UP}_scale"].view(-1)[0:1].fill_(float("inf")), rf"{UP}_scale holds NaN or inf"),
    ],
)
def test_mutated_checkpoints_name_the_tensor(llama_dir, tmp_path, change, message):
    load(llama_dir, HadaCoreConfig(group_size=32)).save_pretrained(tmp_path / "int4")
    mutate(tmp_path / "int4", change)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path / "int4")


def test_truncated_checkpoint_names_the_file(llama_dir, tmp_path):
    load(llama_dir, HadaCoreConfig()).save_pretrained(tmp_path / "int4")
    file = tmp_path / "int4" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: truncated"):
        load(tmp_path / "int4")


@pytest.mark.parametrize("what", ["source", "int4"])
def test_missing_shards_and_indexes_that_contradict_them(llama_dir, tmp_path, what):
    config = HadaCoreConfig(group_size=32)
    model = load(llama_dir, config) if what == "int4" else AutoModelForCausalLM.from_pretrained(llama_dir)
    folder = tmp_path / what
    model.save_pretrained(folder, max_shard_size="20KB")
    options = [config] if what == "source" else []
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    shard = content["weight_map"][UP]
    absent = {**content["weight_map"], "model.layers.9.mlp.up_proj.weight": shard}
    index.write_text(json.dumps({**content, "weight_map": absent}))
    with pytest.raises(CheckpointError, match=r"index\.json: names tensor 'model\.layers\.9"):
        load(folder, *options)
    index.write_text(json.dumps(content))
    (folder / shard).unlink()
    with pytest.raises(CheckpointError, match=shard):
        load(folder, *options)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("symmetric", True, "weight_zero: expected no zeros in a symmetric weight"),
        ("group_size", "128", "group_size must be an integer"),
        ("bitz", 4, "did you mean 'bits'"),
        ("format_version", 7, "format_version 7 is newer"),
        ("attention", "fp9", "attention must be one of"),
    ],
)
def test_hostile_saved_configs(llama_dir, tmp_path, field, value, message):
    load(llama_dir, HadaCoreConfig()).save_pretrained(tmp_path / "int4")
    config = AutoConfig.from_pretrained(tmp_path / "int4")
    config.quantization_config = {**HadaCoreConfig().to_dict(), field: value}
    config.save_pretrained(tmp_path / "int4")
    with pytest.raises((ConfigError, CheckpointError, NotImplementedError), match=message):
        load(tmp_path / "int4")


def test_from_linear():
    torch.manual_seed(0)
    linear = nn.Linear(72, 20).to(torch.bfloat16)
    layer = HadaCoreLinear.from_linear(linear, HadaCoreConfig(group_size=32))
    assert isinstance(layer, nn.Linear)
    assert (layer.weight.shape, layer.weight_scale.shape) == ((20, 9), (20, 3))
    x = torch.randn(5, 72, dtype=torch.bfloat16)
    weight = int4.dequantize(
        layer.weight, layer.weight_scale, layer.weight_zero, group_size=32, dtype=torch.float64
    )
    expected = x.double() @ weight.T + linear.bias.double()
    assert relative_error(layer(x).double(), expected) < 0.01
    assert "int4 asymmetric, group_size=32" in repr(layer)


def test_saved_file_is_plain_safetensors(llama_dir, tmp_path):
    load(llama_dir, HadaCoreConfig()).save_pretrained(tmp_path / "int4")
    with safe_open(tmp_path / "int4" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert {p.suffix for p in (tmp_path / "int4").iterdir()} == {".json", ".safetensors"}
