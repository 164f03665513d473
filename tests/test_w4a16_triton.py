"""The Triton kernel without a GPU: interpreted for its results, compiled for what it becomes."""

import pytest
import torch

pytest.importorskip("triton")
from interpreted import run_interpreted
from offline import compile_for

from hf_hadacore import int4
from hf_hadacore.kernels import w4a16_triton


def test_interpreted():
    assert "interpreted 6 shapes" in run_interpreted("interpret_w4a16.py")


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_compiles_to_matrix_instructions_without_spills(capability, dtype, symmetric):
    instruction = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}[capability]
    for block_m, block_n, block_k, is_split in ((16, 64, 128, True), (64, 128, 32, False)):
        asm = compile_for(
            capability,
            w4a16_triton._w4a16_kernel,
            dict(
                p_x=dtype,
                p_packed=torch.int32,
                p_scale=dtype,
                p_zero=None if symmetric else torch.uint8,
                p_perm=None,
                p_bias=None if is_split else dtype,
                p_out=torch.float32 if is_split else dtype,
                M="i32",
                N="i32",
                words="i32:16",
                num_n="i32",
                blocks_per_split="i32",
                s_xm="i32:16",
                s_xk=1,
                groups="i32",
                ONE_GROUP=False,
                BM=block_m,
                BN=block_n,
                BK=block_k,
            ),
            num_warps=4,
            num_stages=4,
        )
        assert instruction in asm["ptx"]
        assert ".local" not in asm["ptx"]
        assert "cp.async" in asm["ptx"]


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_reduction_compiles(capability):
    arguments = dict(
        p_partials=torch.float32,
        p_bias=torch.float16,
        p_out=torch.float16,
        size="i32:16",
        N="i32",
        SPLIT_K=4,
        BLOCK=1024,
    )
    asm = compile_for(capability, w4a16_triton._reduce_kernel, arguments, num_warps=4)
    assert "ld.global.v4" in asm["ptx"]


def test_schedule_rule(monkeypatch):
    class Properties:
        multi_processor_count = 132

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    device = torch.device("cuda", 0)
    for m in (1, 16, 17, 64, 65, 4096):
        for n, k in ((64, 64), (4096, 4096), (28672, 8192), (8192, 28672)):
            for group_size in int4.GROUP_SIZES:
                schedule = w4a16_triton.choose_schedule(m, n, k, group_size, device)
                blocks = -(-k // w4a16_triton._GROUP_BLOCKS[group_size])
                assert 1 <= schedule.split_k <= max(1, blocks // 2)
    assert w4a16_triton.choose_schedule(1, 4096, 4096, 128, device).split_k == 4
    assert w4a16_triton.choose_schedule(4096, 4096, 4096, 128, device).split_k == 1
