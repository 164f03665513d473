"""The gather of columns under Triton's interpreter, and compiled for GPUs that are not here."""

import pytest
import torch
from interpreted import run_interpreted
from offline import compile_for

from hf_hadacore.kernels.gather_columns import _gather_kernel


def test_columns_are_gathered():
    assert "cases passed" in run_interpreted("interpret_gather_columns.py")


@pytest.mark.parametrize("capability", [80, 90])
def test_it_compiles_for_gpus(capability):
    arguments = dict(p_x=torch.bfloat16, p_order=torch.int32, p_out=torch.bfloat16, s_row="i32")
    constants = dict(K=4104, BLOCK=1024, PDL=capability >= 90)
    ptx = compile_for(capability, _gather_kernel, {**arguments, **constants}, num_warps=4)["ptx"]
    assert ("griddepcontrol" in ptx) == (capability >= 90)
