"""What is compiled when a model is loaded is what its first calls launch."""

from contextlib import nullcontext

import pytest
import torch
from tiny_models import MOE, TINY_CONFIGS
from transformers import AutoModelForCausalLM, StaticCache

pytest.importorskip("triton")
from hf_hadacore import HadaCoreCache, HadaCoreConfig, HadaCoreLinear
from hf_hadacore.attention import decode_attention
from hf_hadacore.decoding import compile_ahead
from hf_hadacore.fusion.fuse import fuse, joined_layers
from hf_hadacore.kernels import (
    attention,
    attention_triton,
    decode_attention_triton,
    gated_activation,
    gated_activation_triton,
    launcher,
    quantize_step,
    quantize_step_triton,
    rms_norm,
    rms_norm_triton,
    rope,
    rope_triton,
    rotate_quantize,
    w4a16_experts,
    w4a16_launch,
    w4a16_routing,
    w4a16_tiled,
)
from hf_hadacore.kernels.w4a16_tiles import is_tileable
from hf_hadacore.modules import tile_order
from hf_hadacore.modules.experts import HadaCoreExperts

MODULES = (
    attention, attention_triton, compile_ahead, decode_attention, decode_attention_triton, gated_activation,
    gated_activation_triton, launcher, quantize_step, quantize_step_triton, rms_norm, rms_norm_triton, rope,
    rope_triton, rotate_quantize, tile_order, w4a16_experts, w4a16_launch, w4a16_routing, w4a16_tiled,
)  # fmt: skip


def kind(kernel, value, position):
    """What Triton compiles for: types, and of integers whether they are 1 or a multiple of 16."""
    if not isinstance(value, int):
        return type(value).__name__
    name = list(kernel.signature.parameters)[position]
    if name in kernel.do_not_specialize:
        return "integer"
    return "1" if value == 1 else "multiple of 16" if value % 16 == 0 else "integer"


class Launched:
    """The kernels that are launched from now on, none of which runs, as on a GPU that wants tiles.

    Attributes:
        ahead: with meta tensors.
        called: with others.
    """

    def __init__(self, monkeypatch):
        self.ahead, self.called = set(), set()
        stubs = {
            "run": self.run,
            "goes_straight": lambda x: True,
            "on_device": lambda device: nullcontext(),
            "processors_of": lambda index: 132,
            "arrival_counters": lambda device, count=1: torch.zeros(count, dtype=torch.int32, device=device),
            "has_pdl": lambda device: True,
            "prefers_tiles": lambda device, n, k, group_size: is_tileable(n, k),
            "capability": lambda index: (9, 0),
            "_has_kernels": lambda device: True,
            "_knows": lambda x, dtype: True,
            "fits": lambda *tensors, **options: True,
        }
        for module in MODULES:
            for name, stub in stubs.items():
                if hasattr(module, name):
                    monkeypatch.setattr(module, name, stub)

    def run(self, kernel, tensors, sizes, constants, grid, *, num_warps, descriptors=(), **options):
        first = len(descriptors) + len(tensors)
        (is_meta,) = {tensor.is_meta for tensor in tensors if tensor is not None}
        key = (
            kernel.__name__,
            tuple(None if tensor is None else tensor.dtype for tensor in tensors),
            tuple(kind(kernel, size, first + i) for i, size in enumerate(sizes)),
            constants,
            tuple((str(d.layout), tuple(d.block_shape), d.base.dtype) for d in descriptors),
            (num_warps, *options.items()),
        )
        (self.ahead if is_meta else self.called).add(key)
        if kernel is w4a16_routing.sort_kernel and not is_meta:
            # Indices that are used on the way; `launch_tall` sees nothing but their kind.
            for tensor in tensors[1:]:
                if tensor is not None:
                    tensor.zero_()


def int4_model(name, path, dtype=torch.float16):
    config = TINY_CONFIGS[name]()
    config.update(
        dict(
            hidden_size=256, intermediate_size=256, moe_intermediate_size=256, head_dim=64,
            num_attention_heads=4, num_key_value_heads=2,
        )
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, quantization_config=HadaCoreConfig(group_size=128)
    ).eval()
    fuse(model)
    return model


@pytest.mark.parametrize("name", ["llama", "qwen3", *MOE])
def test_what_a_call_launches_is_compiled_ahead(monkeypatch, tmp_path, name):
    model = int4_model(name, tmp_path)
    launched = Launched(monkeypatch)
    for module in model.modules():
        if isinstance(module, HadaCoreLinear | HadaCoreExperts):
            module.prepare()
    compile_ahead.compile_ahead(model, joined_layers(model), (1, 128))
    assert launched.ahead and not launched.called
    cache = StaticCache(model.config, 256)
    with torch.no_grad():
        for tokens in (128, 117):
            model(torch.zeros(1, tokens, dtype=torch.int64), logits_to_keep=1)
        with decode_attention.decode_attention(model.config):
            model(torch.zeros(1, 1, dtype=torch.int64), past_key_values=cache)
    assert not launched.called - launched.ahead
    # A cache of another size splits attention among another number of programs.
    assert {key[0] for key in launched.ahead - launched.called} <= {"_decode_attention_kernel"}
    called = {key[0] for key in launched.called}
    assert {"skinny_kernel", "wide_kernel"} <= called and (name not in MOE or "experts_kernel" in called)


@pytest.mark.parametrize("implementation", ["hadacore", "hadacore-int8-fp8"])
def test_steps_of_8_bit_attention(monkeypatch, tmp_path, implementation):
    # On the CPU rotations of fp16 have the kernel of the interpreter.
    model = int4_model("llama", tmp_path, torch.bfloat16)
    model.set_attn_implementation(implementation)
    cache = HadaCoreCache(model.config)
    with torch.no_grad():
        model(torch.zeros(1, 5, dtype=torch.int64), past_key_values=cache)
        launched = Launched(monkeypatch)
        for module in model.modules():
            if isinstance(module, HadaCoreLinear):
                module.prepare()
        compile_ahead.compile_ahead(model, joined_layers(model), (1,))
        assert launched.ahead and not launched.called
        starts = torch.zeros(1, 1, 1, 1, dtype=torch.int32)
        model(torch.zeros(1, 1, dtype=torch.int64), past_key_values=cache, attention_mask=starts)
    assert not launched.called - launched.ahead
    called = {key[0] for key in launched.called}
    assert {"_quantize_step_kernel", "_attention_kernel"} <= called
    assert {key[0] for key in launched.ahead - launched.called} <= {"_attention_kernel"}
