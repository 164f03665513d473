"""The kernel of rotate_quantize without a GPU: interpreted for its results, compiled for what it becomes."""

import re
from itertools import product
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
import triton
from interpreted import run_interpreted
from offline import compile_for, resources

from hf_hadacore.kernels import rotate_quantize_schedules, rotate_quantize_triton

E4M3, E5M2, INT8 = "*fp8e4nv:16", "*fp8e5:16", "*i8:16"


def test_interpreted():
    assert "interpreted rotate_quantize" in run_interpreted("interpret_rotate_quantize.py")


def compile_kernel(
    capability: int,
    values: str | None,
    dtype: torch.dtype = torch.bfloat16,
    d: int = 128,
    group: int = 1,
    rotate: bool = True,
    transpose: bool = False,
    interleave: bool = False,
    power_of_2: bool = False,
    rope: str = "",
    has_offset: bool = False,
    has_sign: bool = False,
) -> dict[str, Any]:
    schedule = rotate_quantize_schedules.choose(
        d,
        dtype,
        group=group,
        rotate=rotate,
        angles={"": 0, "half": d // 2, "whole": d}[rope],
        has_large_memory=capability in (90, 100),
    )
    has_pdl = capability >= 90
    is_split = dtype == torch.float32 or (dtype == torch.float16 and bool(rope or has_offset))
    arguments = dict(
        p_x=dtype,
        p_cos=dtype if rope else None,
        p_sin=dtype if rope else None,
        p_offset=torch.float32 if has_offset else None,
        p_sign="*i8:16" if has_sign else None,
        p_matrix=(torch.bfloat16 if is_split else dtype) if rotate else None,
        p_maximum=torch.int32 if group == 0 else None,
        p_position=None,
        p_values=values,
        p_scale=torch.float32,
        **dict.fromkeys(("tiles", "tiles_of_program", "tokens", "heads", "token_tiles"), "i32"),
        capacity="i32:16",
        scales="i32",
        **dict.fromkeys(("s_xb", "s_xh", "s_xt", "s_cb", "s_ct", "s_ob"), "i32:16"),
        D=d,
        PADDED=1 << (d // 2 - 1).bit_length(),
        TILE=max(schedule.tile, group),
        HEADS=schedule.heads if rope and not has_offset else 1,
        GROUP=group,
        LARGEST=127.0,
        SMALLEST=1,
        ROTATE=rotate,
        TRANSPOSE=transpose,
        INTERLEAVE=interleave,
        POWER_OF_2=power_of_2,
        ONE_HALF=rope == "half",
        SPLIT=is_split,
        STAGES=schedule.stages,
        PDL=has_pdl,
    )
    kernel = rotate_quantize_triton._rotate_quantize_kernel
    options = rotate_quantize_triton.OPTIONS[has_pdl] | {"maxnreg": schedule.registers}
    return compile_for(capability, kernel, arguments, num_warps=schedule.num_warps, **options)


HOPPER = [
    dict(values=E4M3),
    dict(values=INT8, dtype=torch.float16),
    dict(values=E4M3, group=64),
    dict(values=E5M2, group=128),
    dict(values=None, group=0),
    dict(values=INT8, group=0),
    dict(values=E4M3, d=64),
    dict(values=E4M3, d=256),
    dict(values=INT8, d=96, has_sign=True),
    dict(values=E4M3, d=192),
    dict(values=E4M3, has_offset=True),
    dict(values=E4M3, rope="whole"),
    dict(values=E4M3, rope="half"),
    dict(values=INT8, rope="half", has_offset=True, has_sign=True),
    dict(values=E4M3, rotate=False, transpose=True),
    dict(values=E4M3, rotate=False, transpose=True, interleave=True, power_of_2=True),
    dict(values=E4M3, rotate=False, transpose=True, interleave=True, power_of_2=True, group=128),
    dict(values=E4M3, dtype=torch.float32),
    dict(values=E4M3, rope="half", dtype=torch.float16),
    dict(values=E4M3, rope="whole", d=96, has_offset=True, has_sign=True),
]


@pytest.mark.parametrize("variant", HOPPER, ids=str)
def test_on_hopper(tmp_path, variant):
    asm = compile_kernel(90, **variant)
    ptx = asm["ptx"]
    # Limited to 128 registers, which is what makes RoPE fast, Triton 3.9 leaves a few bytes; 3.6 leaves none.
    is_new = tuple(map(int, triton.__version__.split(".")[:2])) > (3, 6)
    allowed = 16 if variant.get("rope") == "half" and is_new else 0
    assert resources(asm["cubin"], tmp_path).stack <= allowed, "registers are spilled"
    # 16 bytes a thread from memory and, but for short rows, to it.
    assert "cp.async.cg.shared.global" in ptx or re.search(r"ld\.global[\w.:]*\.v4\.b32", ptx)
    if variant["values"] is not None:
        assert re.search(r"st\.global[\w.:]*\.v4\.b32", ptx) or variant.get("d") in (96, 192)
    if variant.get("rotate", True):
        assert "wgmma.mma_async" in ptx
    if variant["values"] in (E4M3, E5M2):
        assert "cvt.rn.satfinite.e" in ptx
    # bf16 RoPE takes two elements an instruction.
    is_bf16 = variant.get("dtype", torch.bfloat16) == torch.bfloat16
    assert ("fma.rn.bf16x2" in ptx) == ("rope" in variant and is_bf16)
    # What the kernel before writes is read when it has ended.
    accesses = [ptx.find(name) for name in ("ld.global", "st.global", "cp.async.c", "atom.global")]
    assert all(position == -1 or ptx.index("griddepcontrol.wait") < position for position in accesses)


@pytest.mark.parametrize("capability, values", [(89, E4M3), (89, INT8), (80, INT8), (100, E4M3)])
def test_on_others(capability, values):
    for variant in (dict(), dict(d=80, group=64), dict(rope="half"), dict(rotate=False, transpose=True)):
        ptx = compile_kernel(capability, values, **variant)["ptx"]
        assert re.search(r"st\.global[\w.:]*\.v[24]\.b32", ptx)
        assert "griddepcontrol" not in ptx or capability >= 90


def test_memory_of_many_stages_is_only_used_where_it_is():
    """99 KB on consumer GPUs: neither several stages nor the limit on registers that goes with them."""
    for d, group, angles in product((64, 128, 192, 256), (0, 1, 64, 128), (0, 1, 2)):
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            sizes = dict(group=group, rotate=True, angles=angles * d // 2)
            schedule = rotate_quantize_schedules.choose(d, dtype, has_large_memory=False, **sizes)
            assert schedule.stages == 1 and schedule.registers is None and schedule.tile >= group


def test_launch_takes_what_is_chosen(monkeypatch):
    launched = {}
    monkeypatch.setattr(rotate_quantize_triton, "run", lambda *_, **options: launched.update(options))
    x, angles = torch.zeros(1, 8, 64, 128, dtype=torch.bfloat16), torch.zeros(1, 64, 64, dtype=torch.bfloat16)
    for cos, registers in ((None, None), (angles, 128)):
        rotate_quantize_triton.launch(
            x,
            torch.zeros(1, 8, 64, 128, dtype=torch.int8),
            torch.zeros(1, 8, 64),
            group=1,
            largest=127.0,
            smallest=1e-30,
            rotate=True,
            transpose=False,
            cos=cos,
            sin=cos,
        )
        # Every option is part of the key under which a compiled kernel is found again.
        assert launched["maxnreg"] == registers and launched["num_warps"] == 4
