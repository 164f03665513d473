"""The kernel of rotate_quantize without a GPU: interpreted for its results, compiled for what it becomes."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from offline import compile_for, resources

from hf_hadacore.kernels import rotate_quantize_triton

TESTS = Path(__file__).parent
E4M3, E5M2, INT8 = "*fp8e4nv:16", "*fp8e5:16", "*i8:16"


def test_interpreted():
    paths = [TESTS, TESTS.parent, TESTS.parent / "scripts", os.environ.get("PYTHONPATH", "")]
    run = subprocess.run(
        [sys.executable, str(TESTS / "interpret_rotate_quantize.py")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert "interpreted rotate_quantize" in run.stdout


def compile_kernel(
    capability: int,
    values: str | None,
    dtype: torch.dtype = torch.bfloat16,
    d: int = 128,
    group: int = 1,
    rotate: bool = True,
    transpose: bool = False,
    rope: str = "",
    has_offset: bool = False,
    has_sign: bool = False,
) -> dict[str, Any]:
    schedule = rotate_quantize_triton.choose(d, dtype, rotate=rotate, has_rope=bool(rope))
    has_pdl = capability >= 90
    arguments = dict(
        p_x=dtype,
        p_cos=dtype if rope else None,
        p_sin=dtype if rope else None,
        p_offset=torch.float32 if has_offset else None,
        p_sign="*i8:16" if has_sign else None,
        p_matrix=(torch.bfloat16 if dtype == torch.float32 else dtype) if rotate else None,
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
        ONE_HALF=rope == "half",
        SPLIT=dtype == torch.float32,
        STAGES=schedule.stages,
        PDL=has_pdl,
    )
    kernel = rotate_quantize_triton._rotate_quantize_kernel
    options = rotate_quantize_triton._OPTIONS[has_pdl] | {"maxnreg": schedule.registers}
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
    dict(values=E4M3, dtype=torch.float32),
]


@pytest.mark.parametrize("variant", HOPPER, ids=str)
def test_on_hopper(tmp_path, variant):
    asm = compile_kernel(90, **variant)
    ptx = asm["ptx"]
    assert resources(asm["cubin"], tmp_path).stack == 0, "registers are spilled"
    # 16 bytes a thread from memory and, but for short rows, to it.
    assert "cp.async.cg.shared.global" in ptx or re.search(r"ld\.global[\w.:]*\.v4\.b32", ptx)
    if variant["values"] is not None:
        assert re.search(r"st\.global[\w.:]*\.v4\.b32", ptx) or variant.get("d") in (96, 192)
    if variant.get("rotate", True):
        assert "wgmma.mma_async" in ptx
    if variant["values"] in (E4M3, E5M2):
        assert "cvt.rn.satfinite.e" in ptx
    # bf16 RoPE takes two elements an instruction.
    assert ("fma.rn.bf16x2" in ptx) == ("rope" in variant)
    # What the kernel before writes is read when it has ended.
    accesses = [ptx.find(name) for name in ("ld.global", "st.global", "cp.async.c", "atom.global")]
    assert all(position == -1 or ptx.index("griddepcontrol.wait") < position for position in accesses)


@pytest.mark.parametrize("capability, values", [(89, E4M3), (89, INT8), (80, INT8), (100, E4M3)])
def test_on_others(capability, values):
    for variant in (dict(), dict(d=80, group=64), dict(rope="half"), dict(rotate=False, transpose=True)):
        ptx = compile_kernel(capability, values, **variant)["ptx"]
        assert re.search(r"st\.global[\w.:]*\.v[24]\.b32", ptx)
        assert "griddepcontrol" not in ptx or capability >= 90
