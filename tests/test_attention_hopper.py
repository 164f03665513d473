"""The Hopper kernel of 8-bit attention without a GPU: compiled for sm_90 and looked at."""

import re

import pytest
import torch

pytest.importorskip("triton.experimental.gluon")
from offline import compile_for, resources
from triton.experimental.gluon import language as gl

from hf_hadacore.kernels.attention_hopper import SLOTS, choose_warpgroups
from hf_hadacore.kernels.attention_prefill import attention_kernel
from hf_hadacore.kernels.attention_softmax import BLOCK_N, ROWS

HOPPER = 90


def descriptor(element: str, height: int, width: int) -> str:
    return f"tensordesc<{element}[{height}, {width}],{gl.NVMMASharedLayout(width, 8, 2)!r}>"


def compile_attention(
    d: int,
    *,
    int8: bool = False,
    causal: bool = True,
    per_token: bool = False,
    softcap: bool = False,
    options: bool = False,
    keys: int = 4096,
    dtype: torch.dtype = torch.bfloat16,
) -> dict:
    element = "i8" if int8 else "fp8e4nv"
    bounds = torch.int32 if options else None
    extras = torch.float32 if options else None
    arguments = dict(
        d_q=descriptor(element, ROWS.value, d),
        d_k=descriptor(element, BLOCK_N.value, d),
        d_v=descriptor("fp8e4nv", d, BLOCK_N.value),
        p_q_scale=torch.float32,
        p_key_scale=torch.float32,
        p_value_scale=torch.float32,
        p_key_start=bounds,
        p_key_end=bounds,
        p_query_start=bounds,
        p_sinks=extras,
        p_offset=extras,
        p_out=dtype,
    )
    sizes = ("tiles", "query_tiles", "queries", "keys", "blocks", "window", "heads", "kv_heads", "sequences")
    arguments |= dict.fromkeys(sizes, "i32") | dict(scale="fp32", softcap="fp32")
    arguments |= dict(
        D=d,
        WARPGROUPS=choose_warpgroups(d, keys, not per_token and not softcap),
        SLOTS=SLOTS[d],
        KIND=(causal, per_token, softcap, int8),
    )
    return compile_for(HOPPER, attention_kernel, arguments, num_warps=4)


@pytest.mark.parametrize(
    ("d", "variant"),
    [
        (128, {}),
        (128, dict(int8=True, causal=False)),
        (128, dict(per_token=True, options=True, dtype=torch.float16)),
        (64, {}),
        (64, dict(keys=16384)),
        (64, dict(softcap=True, options=True)),
        (64, dict(int8=True, per_token=True)),
    ],
)
def test_products_run_on_8_bit_operands_and_nothing_is_shuffled_or_spilled(d, variant, tmp_path):
    asm = compile_attention(d, **variant)
    ptx = asm["ptx"]
    of_logits = r"\.s32\.s8\.s8" if variant.get("int8") else r"\.f32\.e4m3\.e4m3"
    assert re.search(rf"wgmma\.mma_async\.sync\.aligned\.m64n128k32{of_logits}", ptx)
    assert re.search(rf"wgmma\.mma_async\.sync\.aligned\.m64n{d}k32\.f32\.e4m3\.e4m3", ptx)
    # Only maxima and, at the end, the sums of rows go from thread to thread (and a warp learns its
    # number): P does not.
    assert len(re.findall(r"\bshfl\.sync", ptx)) <= 64
    assert "cp.async.bulk.tensor.2d" in ptx
    # A few registers, if any, and not the 64 of a tile.
    assert resources(asm["cubin"], tmp_path).stack <= 64
