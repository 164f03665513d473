"""The Triton kernel of 8-bit attention without a GPU: interpreted, compiled, and when it is called."""

import re
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from attention_cases import E4M3, make_problem
from interpreted import run_interpreted
from offline import compile_for, resources

from hf_hadacore.kernels import attention_triton
from hf_hadacore.kernels.attention_schedules import Schedule, choose, combined_at_a_time
from hf_hadacore.kernels.attention_triton import fits
from hf_hadacore.kernels.launcher import power_of_2

BF16, FP32, INT32 = torch.bfloat16, torch.float32, torch.int32
PROCESSORS = {90: 132, 89: 128}


@pytest.mark.parametrize(("group", "cases"), [("shapes", 34), ("options", 64), ("bounds", 19)])
def test_interpreted(group, cases):
    assert f"interpreted {cases} cases" in run_interpreted("interpret_attention.py", group)


class Variant:
    """Sizes and options that make a kernel of its own."""

    def __init__(self, tokens: int, heads: int = 32, d: int = 128, dtype: torch.dtype = E4M3, **options: Any):
        self.tokens, self.heads, self.d, self.dtype, self.options = tokens, heads, d, dtype, options

    def schedule(self, capability: int) -> Schedule:
        sizes = (1, self.heads, 8, self.tokens, 16384, self.d)
        return choose(*sizes, PROCESSORS[capability], divmod(capability, 10))

    def arguments(self, capability: int) -> dict[str, Any]:
        schedule = self.schedule(capability)
        is_split = schedule.splits > 1
        has_all = bool(self.options.get("all"))
        bounds = INT32 if is_split or has_all else None
        pack = self.heads // 8 if self.tokens < 128 else 1
        d_block = power_of_2(self.d)
        combined = (1, 1)
        if is_split:
            combined = combined_at_a_time(schedule, min(schedule.rows, pack * self.tokens), d_block)
        return dict(
            p_q=self.dtype,
            p_k=self.dtype,
            p_v=E4M3,
            p_q_scale=FP32,
            p_k_scale=FP32,
            p_v_scale=FP32,
            p_start=bounds,
            p_end=bounds,
            p_position=bounds,
            p_sinks=FP32 if has_all else None,
            p_offset=FP32 if has_all else None,
            p_out=BF16,
            p_partials=FP32 if is_split else BF16,
            p_arrived=INT32 if is_split else BF16,
            length="i32",
            queries="i32",
            window="i32",
            rows_kept="i32",
            scale="fp32",
            offset_scale="fp32",
            cap="fp32",
            HEADS=self.heads,
            GROUP=self.heads // 8,
            PACK=pack,
            D=self.d,
            D_BLOCK=d_block,
            SCALED=1 if is_split else 128,
            CAUSAL=True,
            WINDOW=has_all,
            SOFTCAP=has_all,
            ROWS=schedule.rows,
            BLOCK=schedule.block,
            SPLITS=schedule.splits,
            COMBINED_ROWS=combined[0],
            CHUNK=combined[1],
            SWAP=schedule.is_swapped,
            PDL=capability >= 90,
        )


VARIANTS = {
    "decode": Variant(1),
    "decode int8": Variant(1, dtype=torch.int8),
    "decode 16 tokens": Variant(16, heads=16, d=80),
    "decode 8 tokens of 8 heads": Variant(8, heads=64, all=True),
    "decode large": Variant(4, d=256),
    "prefill": Variant(4096),
    "prefill int8, all": Variant(4096, d=64, dtype=torch.int8, all=True),
    "prefill large": Variant(4096, d=192),
}


@pytest.mark.parametrize("capability", PROCESSORS)
@pytest.mark.parametrize("name", VARIANTS)
def test_compiles_without_spills_and_waits(tmp_path, name, capability):
    variant = VARIANTS[name]
    schedule = variant.schedule(capability)
    has_pdl = capability >= 90
    asm = compile_for(
        capability,
        attention_triton._attention_kernel,
        variant.arguments(capability),
        num_warps=schedule.num_warps,
        num_stages=schedule.num_stages,
        **attention_triton._OPTIONS[has_pdl],
    )
    ptx = asm["ptx"]
    assert resources(asm["cubin"], tmp_path).stack == 0
    # Both products are of 8-bit operands.
    product = r"wgmma\.mma_async" if has_pdl else r"mma\.sync"
    operands = set(re.findall(rf"{product}\.\S*k\d+\S*?\.([a-z]\w+)\.\1", ptx))
    assert operands == ({"s8", "e4m3"} if variant.dtype == torch.int8 else {"e4m3"})
    first = re.search(product, ptx)
    assert first is not None
    # The next blocks are on their way during a product, 16 bytes a request.
    loop = ptx[first.start() :]
    assert re.search(r"cp\.async\.cg\S* \[.*\], 0x10", loop) and "cp.async.wait_group" in ptx
    assert ("atom.global.gpu.acq_rel" in ptx) == (schedule.splits > 1)
    if has_pdl:
        launch, wait = (ptx.index(f"griddepcontrol.{name}") for name in ("launch_dependents", "wait"))
        before = ptx[:wait]
        assert launch < wait
        assert ("prefetch.global.L2" in before) == (schedule.splits > 1)
        # Hints of the bounds aside, which L1 must not keep.
        assert re.search(r"st\.global|cp\.async|atom|ld\.global(?!\.cg)", before) is None
    else:
        assert "griddepcontrol" not in ptx and "prefetch" not in ptx


def test_weights_stay_in_registers():
    # On Hopper the first operand of the second product: nothing is exchanged for it between threads.
    variant = VARIANTS["prefill"]
    arguments = variant.arguments(90)
    options = attention_triton._OPTIONS[True] | dict(num_warps=8, num_stages=3)
    ptx = compile_for(90, attention_triton._attention_kernel, arguments, **options)["ptx"]
    products = [line for line in ptx.splitlines() if "wgmma.mma_async" in line]
    # "{accumulators}, {operand}, descriptor" instead of two descriptors.
    of_registers = [line for line in products if line.count("{") - line.startswith("{") >= 2]
    assert len(of_registers) == len(products) // 2
    # Eight for maxima and sums of two rows that four threads have, one for the number of the warp.
    assert ptx.count("shfl.sync") < 16


def test_schedules_fill_the_gpu():
    hopper = (132, (9, 0))
    # A program has 256 keys at least, and there are at most two for each processor.
    assert choose(1, 32, 8, 1, 4096, 128, *hopper) == Schedule(16, 128, 4, 3, 16, True)
    assert choose(1, 32, 8, 1, 65536, 128, *hopper).splits == 32
    assert choose(8, 32, 8, 1, 65536, 128, *hopper).splits == 4
    assert choose(64, 32, 8, 1, 65536, 128, *hopper).splits == 1
    assert choose(1, 32, 8, 1, 1, 128, *hopper).splits == 1
    # Speculative decoding: the more rows, the more there is to combine.
    several = choose(1, 32, 8, 16, 16384, 128, *hopper)
    assert several.rows == 64 and not several.is_swapped and 4 <= several.splits < 32
    # Prefill does not split keys unless there are few tiles.
    assert choose(1, 32, 8, 16384, 16384, 128, *hopper) == Schedule(128, 128, 8, 3, 1, False)
    assert choose(1, 8, 8, 128, 65536, 128, *hopper).splits > 8
    # Three pairs of blocks of 128 keys are too large for Ada's shared memory.
    assert choose(1, 32, 8, 4096, 4096, 128, 128, (8, 9)) == Schedule(128, 64, 8, 2, 1, False)
    assert choose(1, 32, 8, 4096, 4096, 128, 188, (12, 0)).block == 64


def test_what_fits(monkeypatch):
    def call(capability: tuple[int, int], d: int = 64, tokens: int = 3) -> bool:
        monkeypatch.setattr(attention_triton, "capability", lambda index: capability)
        problem = make_problem(2, 4, 2, tokens, 30, d)
        return fits(*(x.to("meta") for x in problem.tensors[:3]), **problem.options)

    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    assert all(call((9, 0), d) for d in attention_triton.HEAD_DIMS)
    assert call((8, 9)) and call((12, 0))
    assert not call((8, 0))
    assert not call((9, 0), d=72)
    assert not call((9, 0), tokens=0)
