"""Decode attention without a GPU: the kernel interpreted and compiled, and when it is called."""

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from interpreted import run_interpreted
from offline import compile_for, resources
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hf_hadacore.attention import decode_attention
from hf_hadacore.attention.decode_attention import decode_attention_forward
from hf_hadacore.kernels import decode_attention_triton
from hf_hadacore.kernels.decode_attention_triton import block_of, choose_splits, fits
from hf_hadacore.kernels.launcher import power_of_2

BF16 = torch.bfloat16


def test_interpreted():
    assert "interpreted 72 cases" in run_interpreted("interpret_decode_attention.py")


def arguments(
    dtype: torch.dtype, group: int, d: int, splits: int, mask: torch.dtype | None, length: Any
) -> dict[str, Any]:
    tile = power_of_2(group) * power_of_2(d)
    return dict(
        p_q=dtype,
        p_keys=dtype,
        p_values=dtype,
        p_mask=mask,
        p_out=dtype,
        p_partials=torch.float32 if splits > 1 else dtype,
        p_arrived=torch.int32 if splits > 1 else dtype,
        length=length,
        s_qb="i32:16",
        s_qh="i32:16",
        s_mb=length,
        scale="fp32",
        KV_HEADS=8,
        GROUP=group,
        D=d,
        SPLITS=splits,
        BLOCK=block_of(d),
        ROWS=16,
        GROUP_BLOCK=power_of_2(group),
        D_BLOCK=power_of_2(d),
        CHUNK=min(power_of_2(splits), max(1, decode_attention_triton._COMBINED // tile)),
    )


VARIANTS = {
    "Llama-3-8B": arguments(BF16, 4, 128, 16, BF16, "i32:16"),
    "one split": arguments(BF16, 4, 128, 1, BF16, "i32:16"),
    "no mask": arguments(BF16, 4, 128, 16, None, "i32:16"),
    "fp16, fp32 mask, odd length": arguments(torch.float16, 7, 64, 32, torch.float32, "i32"),
    "one key": arguments(BF16, 1, 96, 1, BF16, 1),
    "large": arguments(BF16, 16, 256, 16, BF16, "i32:16"),
}


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("variant", VARIANTS)
def test_compiles_without_spills_and_waits(tmp_path, variant, capability):
    has_pdl = capability >= 90
    asm = compile_for(
        capability,
        decode_attention_triton._decode_attention_kernel,
        VARIANTS[variant] | {"PDL": has_pdl},
        num_warps=4,
        **decode_attention_triton._OPTIONS[has_pdl],
    )
    ptx = asm["ptx"]
    assert resources(asm["cubin"], tmp_path).stack == 0
    assert "mma.sync" in ptx
    # The next block is on its way during a product.
    loop = ptx[ptx.index("mma.sync") :]
    assert "cp.async.cg" in loop and "cp.async.wait_group" in ptx
    has_counter = VARIANTS[variant]["SPLITS"] > 1
    assert ("atom.global.gpu.acq_rel" in ptx) == has_counter
    if has_pdl:
        launch, wait = (ptx.index(f"griddepcontrol.{name}") for name in ("launch_dependents", "wait"))
        before = ptx[:wait]
        assert launch < wait
        # A block that the buffer's end cuts off is not asked for.
        assert ("prefetch.global.L2" in before) == (VARIANTS[variant]["length"] != 1)
        # The mask's hint aside, which L1 must not keep.
        assert re.search(r"st\.global|cp\.async|atom|ld\.global(?!\.cg)", before) is None
    else:
        assert "griddepcontrol" not in ptx and "prefetch" not in ptx


def test_splits_fill_the_gpu_with_64_keys_each():
    assert choose_splits(8, 8192, 132) == 16
    assert choose_splits(8, 256, 132) == 4
    assert choose_splits(8, 1, 132) == 1
    assert choose_splits(128, 8192, 132) == 1
    assert choose_splits(1000, 8192, 132) == 1
    assert choose_splits(1, 1 << 20, 132) == 32


def inputs(
    heads: int = 8, d: int = 64, length: int = 24, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    query = torch.randn(3, 1, heads, d).to(dtype).transpose(1, 2)
    keys, values = torch.randn(2, 3, 2, length, d).to(dtype)
    return dict(query=query, keys=keys, values=values, mask=torch.zeros(3, 1, 1, length, dtype=dtype))


def test_what_fits(monkeypatch):
    monkeypatch.setattr(decode_attention_triton, "capability", lambda index: (9, 0))
    good = inputs(dtype=BF16)
    mask = good["mask"]
    assert fits(**good)
    assert fits(**good | {"mask": None})
    assert fits(**good | {"mask": mask[:1].float()})
    assert fits(**good | {"mask": mask[:1].expand(3, -1, -1, -1)})
    assert fits(**inputs(heads=2, d=256, dtype=torch.float16))
    for bad in (
        inputs(),
        inputs(d=72, dtype=BF16),
        inputs(heads=34, dtype=BF16),
        inputs(heads=7, dtype=BF16),
        inputs(length=0, dtype=BF16),
        good | {"query": good["query"].expand(3, 8, 2, 64)},
        good | {"query": good["query"].half()},
        good | {"query": torch.randn(3, 8, 1, 128).to(BF16)[..., ::2]},
        good | {"keys": good["keys"][:, :, :20]},
        good | {"keys": good["keys"].mT.contiguous().mT},
        good | {"values": good["values"].half()},
        good | {"mask": mask == 0},
        good | {"mask": mask[..., :20]},
        good | {"mask": mask.expand(3, 8, 1, 24)},
        good | {"mask": torch.zeros(3, 1, 1, 48, dtype=BF16)[..., ::2]},
    ):
        assert not fits(**bad)
    monkeypatch.setattr(decode_attention_triton, "capability", lambda index: (7, 5))
    assert not fits(**good)


@pytest.mark.parametrize("extra", [None, "dropout", "position_bias", "misfit", "gradients"])
def test_when_the_kernel_is_called(monkeypatch, extra):
    calls = []
    kernel = SimpleNamespace(
        fits=lambda *tensors: extra != "misfit",
        decode_attention=lambda query, *rest: calls.append(rest) or query.transpose(1, 2),
    )
    monkeypatch.setattr(decode_attention, "_kernel", lambda: kernel)
    monkeypatch.setattr(decode_attention, "goes_straight", lambda query: extra != "gradients")
    tensors = inputs()
    module = torch.nn.Module()
    module.num_key_value_groups = 4
    options: dict[str, Any] = {"scaling": 0.3, "position_bias": None}
    if extra == "dropout":
        options["dropout"] = 0.1
    elif extra == "position_bias":
        options["position_bias"] = torch.zeros(3, 8, 1, 24)
    got, weights = decode_attention_forward(module, *tensors.values(), **options)
    assert got.shape == (3, 1, 8, 64) and weights is None
    assert len(calls) == (extra is None)
    if calls:
        _, _, mask, scale = calls[0]
        assert mask is tensors["mask"] and scale == 0.3


@pytest.mark.transformers_versions
@pytest.mark.parametrize("heads", [2, 8])
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("kind", ["boolean", "additive", "none"])
def test_decode_attention_is_sdpa(heads, tokens, kind):
    query = torch.randn(3, heads, tokens, 16)
    key, value = torch.randn(2, 3, 2, 24, 16)
    mask = torch.rand(3, 1, tokens, 24) < 0.7
    mask[..., 5] = True
    masks = {
        "boolean": mask,
        "none": None,
        "additive": torch.zeros(mask.shape).masked_fill(~mask, -torch.inf),
    }
    module = torch.nn.Module()
    module.num_key_value_groups = heads // 2
    expected, _ = sdpa_attention_forward(module, query, key, value, masks[kind], scaling=0.3)
    got, weights = decode_attention_forward(module, query, key, value, masks[kind], scaling=0.3)
    torch.testing.assert_close(got, expected)
    assert weights is None
