"""int4 models divided among processes by transformers' tensor parallelism: same logits, texts and files."""

import collections
from pathlib import Path
from typing import Any

import graph_recorder
import pytest
import torch
from graph_recorder import CountedCaptures
from permuted_models import quantize_permuted
from rank_processes import run_every_rank
from safetensors.torch import load_file
from tiny_models import token_ids
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, PreTrainedModel, Qwen3Config
from transformers.distributed import DistributedConfig

from hf_hadacore import HadaCoreConfig, HadaCoreHfQuantizer, HadaCoreLinear
from hf_hadacore.decoding.generation import DecodeGraphs, enable_cuda_graphs
from hf_hadacore.errors import ConfigError, ShardingError, UnsupportedError
from hf_hadacore.layer_plan import plan_layers
from hf_hadacore.offline.checkpoint import quantize_checkpoint
from hf_hadacore.parallel.tensor_parallel import complete_plan
from hf_hadacore.quantizer import swap_modules

# Sums of fp32 products in another order: of what each rank has, then of the ranks.
TOLERANCE = 1e-5
_SIZES = dict(
    vocab_size=96,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=8,
    head_dim=32,
    max_position_embeddings=64,
    pad_token_id=0,
)
CONFIGS = {
    "llama": lambda: LlamaConfig(**_SIZES, attention_bias=True, mlp_bias=True),
    "mixtral": lambda: MixtralConfig(**_SIZES, num_local_experts=4),
    "qwen3": lambda: Qwen3Config(**_SIZES),
}
TIED = LlamaConfig(**_SIZES, tie_word_embeddings=True)


def random_model(config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1 if parameter.ndim == 1 else 0, 0.1)
    model.generation_config.eos_token_id = None
    return model


def load(path: Path, ranks: int = 1, **options: Any) -> PreTrainedModel:
    if ranks > 1:
        options["distributed_config"] = DistributedConfig(tp_size=ranks)
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **options)


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(token_ids()).logits


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


class Collectives(TorchDispatchMode):
    """Counts what the processes say to each other."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "c10d" in func.namespace and "wait_tensor" not in func.__name__ and "wrap" not in func.__name__:
            self.counts[func._schema.name.rpartition("::")[2].rstrip("_")] += 1
        return func(*args, **(kwargs or {}))


def collectives_of_layers(model: PreTrainedModel) -> dict[str, int]:
    """What one forward pass of the decoder layers alone says."""
    embeddings = torch.randn(1, 3, 128)
    positions = torch.arange(3)[None]
    rotary = model.model.rotary_emb(embeddings, positions)
    with Collectives() as said, torch.no_grad():
        for layer in model.model.layers:
            layer(embeddings, position_embeddings=rotary, position_ids=positions)
    return dict(said.counts)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    """Models in full precision, quantized, with permuted inputs (baked, or as `input_perm`), and rotated."""
    folder = tmp_path_factory.mktemp("checkpoints")
    paths = {}
    for name in CONFIGS:
        paths[name] = folder / name
        random_model(CONFIGS[name]()).save_pretrained(paths[name])
        paths[f"{name}-int4"] = folder / f"{name}-int4"
        int4 = load(paths[name], quantization_config=HadaCoreConfig(group_size=32))
        int4.save_pretrained(paths[f"{name}-int4"])
    permuted = random_model(CONFIGS["llama"]())
    quantize_permuted(permuted, baked=True)
    int4 = load(paths["llama-int4"])
    stored = []
    for layer, module in permuted.named_modules():
        if isinstance(module, HadaCoreLinear):
            int4.set_submodule(layer, module)
            stored += [layer] if module.input_perm is not None else []
    assert len(stored) == 10
    int4.config.quantization_config.input_permutations = [f"{layer}$" for layer in stored]
    for layer in int4.model.layers:
        layer.self_attn.k_mean = nn.Parameter(key_mean(), requires_grad=False)
    int4.config.quantization_config.key_means = {r"\.self_attn$": list(key_mean().shape)}
    paths["llama-permuted"] = folder / "llama-permuted"
    int4.save_pretrained(paths["llama-permuted"])
    random_model(TIED).save_pretrained(folder / "tied")
    paths["rotated"] = folder / "rotated"
    config = HadaCoreConfig(group_size=32)
    quantize_checkpoint(folder / "tied", paths["rotated"], config, rotation="r1r2", progress=False)
    return paths


def key_mean() -> torch.Tensor:
    """What the permuted checkpoint holds of every layer, ``[Hkv, D]``."""
    return torch.randn(8, 32, generator=torch.Generator().manual_seed(3))


def on_a_rank(paths: dict[str, Path], name: str, ranks: int, out: Path) -> dict[str, Any]:
    """What a rank finds out; in a process of its own."""
    quantized = load(paths[f"{name}-int4"], ranks)
    found: dict[str, Any] = {"int4": logits(quantized), "layers": collectives_of_layers(quantized)}
    quantized.save_pretrained(out / "int4")
    on_the_fly = load(paths[name], ranks, quantization_config=HadaCoreConfig(group_size=32))
    found["on the fly"] = logits(on_the_fly)
    on_the_fly.save_pretrained(out / "on the fly")
    layer = quantized.model.layers[0].self_attn
    found["shapes"] = {n: tuple(p.shape) for n, p in layer.named_parameters()}
    found["text"] = quantized.generate(token_ids(), do_sample=False, max_new_tokens=12)
    if name == "qwen3":
        found["rotated"] = logits(load(paths["rotated"], ranks))
    if name == "llama":
        permuted = load(paths["llama-permuted"], ranks)
        found["permuted"] = logits(permuted)
        permuted.save_pretrained(out / "permuted")
        found |= with_8_bit_attention(paths["llama-permuted"], ranks)
        found["graphs"], found["captures"] = text_from_graphs(quantized)
        with pytest.raises(UnsupportedError, match="divided among ranks cannot be dequantized"):
            quantized.dequantize()
    return found


def with_8_bit_attention(path: Path, ranks: int) -> dict[str, Any]:
    model = load(path, ranks, quantization_config=HadaCoreConfig(attention="int8-fp8"))
    found = {"8-bit": logits(model)}
    output = model.generate(
        token_ids(), do_sample=False, max_new_tokens=12, disable_compile=True, return_dict_in_generate=True
    )
    cache = output.past_key_values
    return {
        **found,
        "8-bit text": output.sequences,
        "cache": (type(cache).__name__, cache.layers[0].keys.shape),
        "constant": cache.layers[0].constant[..., : key_mean().shape[1]],
    }


def text_from_graphs(model: PreTrainedModel) -> tuple[torch.Tensor, tuple[int, int]]:
    """Generated with decode graphs, for which `graph_recorder` stands in."""
    counted = CountedCaptures()
    # A DTensor's embedding writes `x[mask] = 0`, for which CUDA, unlike the CPU, needs nothing from the host.
    graph_recorder._FORBIDDEN = tuple(word for word in graph_recorder._FORBIDDEN if word != "lift_fresh")
    DecodeGraphs.device_types, DecodeGraphs.capture = ("cpu",), counted
    enable_cuda_graphs(model)
    text = model.generate(token_ids(), do_sample=False, max_new_tokens=12)
    return text, (counted.captures, counted.replays)


@pytest.mark.transformers_versions
@pytest.mark.parametrize(
    ("name", "ranks"), [("llama", 2), ("mixtral", 2), ("qwen3", 2), ("llama", 4), ("llama", 8)]
)
def test_ranks_compute_and_save_what_one_process_does(checkpoints, tmp_path, name, ranks):
    whole = load(checkpoints[f"{name}-int4"])
    expected = logits(whole)
    text = whole.generate(token_ids(), do_sample=False, max_new_tokens=12)
    found = run_every_rank(on_a_rank, ranks, checkpoints, name, ranks, tmp_path)
    for rank in found:
        assert distance(rank["int4"], expected) < TOLERANCE
        assert distance(rank["on the fly"], expected) < TOLERANCE
        assert torch.equal(rank["text"], text)
        # One for attention and one for the MLP (or experts) of each layer, and nothing else.
        assert rank["layers"] == {"allreduce": 4}
        # [N, K/8] and [N, K/32]: rows of q, columns of o.
        assert rank["shapes"]["q_proj.weight"] == (256 // ranks, 16)
        assert rank["shapes"]["o_proj.weight"] == (128, 32 // ranks)
        assert rank["shapes"]["o_proj.weight_scale"] == (128, 8 // ranks)
    for folder in ("int4", "on the fly"):
        for file in ("model.safetensors", "config.json"):
            saved, original = tmp_path / folder / file, checkpoints[f"{name}-int4"] / file
            assert saved.read_bytes() == original.read_bytes()
    if name == "qwen3":
        rotated = logits(load(checkpoints["rotated"]))
        assert all(distance(rank["rotated"], rotated) < TOLERANCE for rank in found)
    if name != "llama":
        return
    folders = (tmp_path / "permuted", checkpoints["llama-permuted"])
    saved, original = (load_file(folder / "model.safetensors") for folder in folders)
    assert saved.keys() == original.keys() and all(torch.equal(saved[key], original[key]) for key in saved)
    permuted = logits(load(checkpoints["llama-permuted"]))
    alone = with_8_bit_attention(checkpoints["llama-permuted"], 1)
    for rank, mean in zip(found, key_mean().chunk(ranks), strict=True):
        assert distance(rank["permuted"], permuted) < TOLERANCE
        assert torch.equal(rank["constant"], mean.expand(2, -1, -1))
        # 8-bit rounding makes a step of a difference in the last bit, for a few values.
        assert distance(rank["8-bit"], alone["8-bit"]) < distance(alone["8-bit"], permuted) / 4
        assert torch.equal(rank["8-bit text"], alone["8-bit text"])
        kind, (batch, heads, *_) = rank["cache"]
        assert (kind, batch, heads) == ("HadaCoreCache", 2, 8 // ranks)
        assert torch.equal(rank["graphs"], text)
        # The first of 11 steps is run as it is, the second is captured.
        assert rank["captures"] == (1, 10)


def planned(config: Any, ranks: int, quantization: HadaCoreConfig, on_the_fly: bool = False) -> Any:
    """A model whose plan was completed as `from_pretrained` does it."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.config.distributed_config = DistributedConfig(tp_size=ranks)
    swap_modules(model, plan_layers(model, quantization, strict=False))
    complete_plan(model, on_the_fly=on_the_fly)
    return model


@pytest.mark.transformers_versions
@pytest.mark.parametrize(
    ("config", "ranks", "options", "message"),
    [
        (
            LlamaConfig(**_SIZES),
            16,
            {},
            r"self_attn: its 8 key/value heads cannot be divided evenly by tp_size=16; .*: 1, 2, 4, 8$",
        ),
        (
            LlamaConfig(**{**_SIZES, "num_key_value_heads": 2}),
            4,
            {},
            r"model\.layers\.0\.self_attn: its 2 key/value heads .* tp_size=4; .*: 1, 2$",
        ),
        (
            LlamaConfig(**_SIZES),
            4,
            {"group_size": 128},
            r"self_attn\.o_proj: tp_size=4 would divide its 256 inputs within a group .*128.*: 1, 2$",
        ),
        (
            LlamaConfig(**{**_SIZES, "intermediate_size": 24 * 8}),
            8,
            {"group_size": 32, "overrides": {"mlp": {"group_size": 64}}},
            r"down_proj: tp_size=8 would divide its 192 inputs .* groups of 64, eight in a word\).*: 1, 3$",
        ),
        (
            LlamaConfig(**{**_SIZES, "intermediate_size": 40}),
            2,
            {"overrides": {"mlp": {"group_size": -1}}},
            r"mlp\.down_proj: tp_size=2 would divide its 40 inputs .* one group, .*: 1, 5$",
        ),
        (
            MixtralConfig(**{**_SIZES, "intermediate_size": 96}, num_local_experts=4),
            2,
            {"group_size": 64},
            r"mlp\.experts\.down_proj: tp_size=2 would divide its 96 inputs .*: 1$",
        ),
        (
            LlamaConfig(**{**_SIZES, "vocab_size": 97}, tie_word_embeddings=False),
            2,
            {"group_size": 32, "quantize_lm_head": True},
            r"lm_head: its 97 outputs cannot be divided evenly by tp_size=2; .*: 1$",
        ),
        (
            LlamaConfig(**_SIZES),
            2,
            {"group_size": 32, "input_permutations": ["o_proj$"]},
            r"self_attn\.o_proj: its inputs are read in an order \(input_perm\) that goes across",
        ),
    ],
)
def test_sizes_that_cut_something_are_named(config, ranks, options, message):
    with pytest.raises(ShardingError, match=message):
        planned(config, ranks, HadaCoreConfig(**options))


@pytest.mark.transformers_versions
def test_one_scale_for_all_inputs_of_a_row():
    quantization = HadaCoreConfig(group_size=-1)
    plan = planned(LlamaConfig(**_SIZES), 2, quantization)._tp_plan
    assert plan["model.layers.*.self_attn.o_proj.weight_scale"] == "replicate"
    assert plan["model.layers.*.mlp.down_proj.weight_zero"] == "replicate"
    assert "model.layers.*.mlp.up_proj.weight_scale" not in plan
    with pytest.raises(ShardingError, match="o_proj: with group_size=-1 all its inputs share a scale"):
        planned(LlamaConfig(**_SIZES), 2, quantization, on_the_fly=True)


@pytest.mark.transformers_versions
def test_expert_parallelism_is_refused():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIGS["mixtral"]())
    given = model.config.distributed_config = DistributedConfig(tp_size=2)
    if hasattr(given, "ep_size"):
        given.ep_size = 2
    else:
        given.enable_expert_parallel = True
    quantizer = HadaCoreHfQuantizer(HadaCoreConfig(group_size=32), pre_quantized=False)
    with pytest.raises(UnsupportedError, match="expert parallelism does not work with int4 experts"):
        quantizer._process_model_before_weight_loading(model)


def refused_on_a_rank(path: Path, full: Path) -> list[str]:
    messages = []
    for ranks, source, options in (
        (2, path, HadaCoreConfig(dequantize=True)),
        (2, full, HadaCoreConfig(group_size=128, overrides={"down_proj": {"group_size": -1}})),
    ):
        with pytest.raises((ConfigError, ShardingError)) as caught:
            load(source, ranks, quantization_config=options)
        messages.append(str(caught.value))
    return messages


@pytest.mark.transformers_versions
def test_loading_refuses_before_it_reads(checkpoints):
    for messages in run_every_rank(refused_on_a_rank, 2, checkpoints["llama-int4"], checkpoints["llama"]):
        assert messages[0] == "dequantize=True cannot be combined with tensor parallelism"
        assert "down_proj: with group_size=-1 all its inputs share a scale" in messages[1]
