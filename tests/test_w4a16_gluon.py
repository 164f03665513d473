"""The Hopper kernels without a GPU: compiled for sm_90 and looked at."""

import re

import pytest
import torch

pytest.importorskip("triton.experimental.gluon")
from offline import compile_for, resources
from triton.experimental.gluon import language as gl

from hf_hadacore.kernels import w4a16_routing
from hf_hadacore.kernels import w4a16_schedules as schedules
from hf_hadacore.kernels.w4a16_prefill import prefill_kernel
from hf_hadacore.kernels.w4a16_skinny import experts_kernel, skinny_kernel
from hf_hadacore.kernels.w4a16_wide import TWO_PROGRAMS, wide_kernel

HOPPER = 90


def weights(dtype: torch.dtype, symmetric: bool) -> dict:
    return dict(p_tiles=torch.int32, p_scale=dtype, p_zero=None if symmetric else torch.uint8)


def results(dtype: torch.dtype, bias: bool) -> dict:
    return dict(p_bias=dtype if bias else None, p_out=dtype, p_partials=torch.float32, p_arrived=torch.int32)


def compile_skinny(dtype, symmetric, **constants):
    arguments = dict(p_x=dtype, **weights(dtype, symmetric), **results(dtype, symmetric))
    sizes = dict(M="i32", N="i32:16", k_tiles="i32", s_xm="i32:16", s_group="i32:16")
    return compile_for(HOPPER, skinny_kernel, arguments | sizes | constants, num_warps=8)


def compile_experts(dtype, symmetric, **constants):
    arguments = dict(
        p_x=dtype, **weights(dtype, symmetric), p_expert=torch.int64, **results(dtype, symmetric)
    )
    sizes = dict(slots="i32", experts="i32", slots_per_row="i32", N="i32:16", k_tiles="i32", s_xm="i32:16")
    return compile_for(
        HOPPER, experts_kernel, arguments | sizes | {"s_expert": "i32:16"} | constants, num_warps=8
    )


def descriptor(dtype, constants) -> dict:
    element = {torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
    layout = gl.NVMMASharedLayout(64 if constants["GROUPS"] == 4 else 128, 16, 2)
    return {"d_x": f"tensordesc<{element}[{constants['BM']}, 128],{layout!r}>"}


def compile_tall(kernel, dtype, symmetric, is_grouped=False, **constants):
    routing = dict.fromkeys(("p_blocks", "p_slots"), torch.int32 if is_grouped else None)
    arguments = descriptor(dtype, constants) | weights(dtype, symmetric) | routing | results(dtype, symmetric)
    names = ("M", "N", "k_tiles", "n_tiles", "m_tiles", "tiles_per_split", "s_group", "experts")
    sizes = dict.fromkeys(names, "i32") | {"N": "i32:16", "s_group": "i32:16"}
    options = TWO_PROGRAMS if constants.get("HALF") else {}
    return compile_for(HOPPER, kernel, arguments | sizes | constants, num_warps=4, **options)


def check_memory(asm: dict, folder, groups: int, stack: int = 16) -> None:
    """Weights are read 16 bytes a thread, results written once the previous kernel has ended.

    With one group per tile or row (the default recipes) no more than a few registers are spilled. Which ones
    is the assembler's choice and differs between versions of Triton.
    """
    ptx = asm["ptx"]
    assert re.search(r"ld\.global[.\w:]*\.v4\.b32", ptx)
    stores = [found.start() for found in re.finditer(r"\bst\.global|\batom\b|\bred\.", ptx)]
    assert stores and ptx.index("griddepcontrol.wait") < min(stores), "results are written too early"
    assert "griddepcontrol.launch_dependents" in ptx
    assert ".local" not in ptx
    if groups <= 1:
        assert resources(asm["cubin"], folder).stack <= stack


def check_few_tokens(asm: dict, folder, groups: int) -> None:
    check_memory(asm, folder, groups)
    assert "mma.sync.aligned.m16n8k16" in asm["ptx"] and "cp.async.cg.shared.global" in asm["ptx"]
    assert "shfl" not in asm["ptx"], "operands go from thread to thread"
    if groups <= 1:
        # Two programs of 256 threads share a processor's 65536 registers.
        assert resources(asm["cubin"], folder).registers <= 128


# Every group size and dtype, with and without zeros, split or not, once.
VARIANTS = [
    (torch.float16, False, 1, 4),
    (torch.float16, True, 4, 1),
    (torch.bfloat16, False, 2, 1),
    (torch.bfloat16, True, 0, 4),
]


@pytest.mark.parametrize("dtype, symmetric, groups, split", VARIANTS)
def test_few_tokens(tmp_path, dtype, symmetric, groups, split):
    asm = compile_skinny(dtype, symmetric, BM=8, BN=128, TILES=16, SPLIT_K=split, STAGES=3, GROUPS=groups)
    check_few_tokens(asm, tmp_path, groups)


@pytest.mark.parametrize("dtype, symmetric, groups, split", VARIANTS)
def test_experts(tmp_path, dtype, symmetric, groups, split):
    search = 0 if split == 1 else 128
    asm = compile_experts(
        dtype, symmetric, BM=8, BN=128, TILES=16, SPLIT_K=split, STAGES=3, GROUPS=groups, SEARCH=search
    )
    check_few_tokens(asm, tmp_path, groups)
    # Which expert it is gets known only when the kernel that chose it has ended.
    assert asm["ptx"].index("griddepcontrol.wait") < asm["ptx"].index("ld.global")


@pytest.mark.parametrize(
    "variant, block_m, stages, slots",
    [(0, 16, 2, 4), (0, 32, 4, 4), (1, 128, 1, 4), (2, 32, 4, 4), (3, 64, 3, 4), (3, 16, 2, 4)],
)
def test_many_tokens(tmp_path, variant, block_m, stages, slots):
    dtype, symmetric, groups, _ = VARIANTS[variant]
    asm = compile_tall(
        wide_kernel,
        dtype,
        symmetric,
        BM=block_m,
        SPLIT_K=2 if block_m <= 32 else 1,
        STAGES=stages,
        SLOTS=slots,
        GROUPS=groups,
        HALF=block_m == 16,
    )
    # Two programs of 16 tokens share the registers of a processor, which measures faster than none spilled.
    check_memory(asm, tmp_path, groups, stack=48 if block_m == 16 else 16)
    assert f"wgmma.mma_async.sync.aligned.m64n{block_m}k16" in asm["ptx"]
    assert "cp.async.bulk.tensor" in asm["ptx"]


def check_products_go_on(asm: dict) -> None:
    """A product runs while registers are worked on.

    Where the assembler does not trust that, it waits after every instruction.
    """
    assert len(re.findall("HGMMA", asm["sass"])) > len(re.findall(r"WARPGROUP\.DEPBAR", asm["sass"]))


@pytest.mark.parametrize("kind", schedules.GROUPED_TIMES, ids=str)
@pytest.mark.parametrize("symmetric", [False, True])
def test_many_slots_of_experts(tmp_path, kind, symmetric):
    constants = dict(BM=kind.block_m, SPLIT_K=1)
    kernel = prefill_kernel
    if isinstance(kind, schedules.WideSchedule):
        kernel = wide_kernel
        constants |= dict(STAGES=kind.stages, SLOTS=kind.slots, GROUPS=1, HALF=kind.is_half)
    else:
        constants |= dict(SLOTS=kind.slots, GROUPS=1)
    asm = compile_tall(kernel, torch.bfloat16, symmetric, is_grouped=True, **constants)
    # Whole words of scales and zeros take more registers in prefill, and measured faster.
    check_memory(asm, tmp_path, 1, stack=16 if kernel is wide_kernel else 48)
    check_products_go_on(asm)
    # The blocks are known only when the kernel that made them has ended.
    assert asm["ptx"].index("griddepcontrol.wait") < asm["ptx"].index("ld.global")


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("rows", [None, torch.int32])
def test_sorting_slots(tmp_path, index, rows):
    arguments = dict(p_expert=index, p_blocks=torch.int32, p_slots=torch.int32, p_rows=rows)
    sizes = dict(slots="i32", experts="i32", slots_per_row="i32")
    constants = dict(BM=64, BLOCK=w4a16_routing._BLOCK, PDL=True)
    asm = compile_for(
        HOPPER, w4a16_routing.sort_kernel, arguments | sizes | constants, num_warps=w4a16_routing._NUM_WARPS
    )
    assert asm["ptx"].index("griddepcontrol.wait") < asm["ptx"].index("ld.global")
    assert resources(asm["cubin"], tmp_path).stack == 0


@pytest.mark.parametrize("dtype, symmetric, groups, split", VARIANTS)
def test_prefill(tmp_path, dtype, symmetric, groups, split):
    asm = compile_tall(prefill_kernel, dtype, symmetric, BM=128, SPLIT_K=split, SLOTS=4, GROUPS=groups)
    # Words of scales and zeros: see above. With a split, sums of one half wait in local memory while those of
    # the other are exchanged.
    check_memory(asm, tmp_path, groups, stack=48 if split == 1 else 512)
    assert "wgmma.mma_async.sync.aligned.m64n128k16" in asm["ptx"]
    check_products_go_on(asm)
