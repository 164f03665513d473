"""The gather of columns under Triton's interpreter, and compiled for GPUs that are not here."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from offline import compile_for

from hf_hadacore.kernels.gather_columns import _gather_kernel

INTERPRETED = Path(__file__).with_name("interpret_gather_columns.py")


def test_columns_are_gathered():
    result = subprocess.run([sys.executable, INTERPRETED], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "cases passed" in result.stdout


@pytest.mark.parametrize("capability", [80, 90])
def test_it_compiles_for_gpus(capability):
    arguments = dict(p_x=torch.bfloat16, p_order=torch.int32, p_out=torch.bfloat16, s_row="i32")
    constants = dict(K=4104, BLOCK=1024, PDL=capability >= 90)
    ptx = compile_for(capability, _gather_kernel, {**arguments, **constants}, num_warps=4)["ptx"]
    assert ("griddepcontrol" in ptx) == (capability >= 90)
