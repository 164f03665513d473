"""The kernels of GPTQ's columns without a GPU: interpreted, and compiled for GPUs that are not here."""

from pathlib import Path

import pytest
import torch
from gptq_cases import exact_chunk
from interpreted import run_interpreted

from hf_hadacore.solvers.columns import descend_columns, round_columns


def test_interpreted():
    pytest.importorskip("triton")
    assert "interpreted gptq_columns" in run_interpreted("interpret_gptq_columns.py")


@pytest.mark.parametrize("chunk", [32, 64, 128])
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", ["round", "descend"])
def test_compiled(name: str, capability: int, chunk: int, tmp_path: Path):
    """Divisions are exact, products are not fused with sums, and the chunk stays in registers."""
    pytest.importorskip("triton")
    from offline import compile_for, resources

    from hf_hadacore.kernels import gptq_columns

    kernel = {"round": gptq_columns._round_kernel, "descend": gptq_columns._descend_kernel}[name]
    types = {"p_group": torch.int64, "rows": "i32", "columns": "i32"}
    constants = {"CHUNK": chunk, "ROWS": gptq_columns._ROWS}
    arguments = {one: (types | constants).get(one, torch.float32) for one in kernel.arg_names}
    options = dict(num_warps=gptq_columns._WARPS, enable_fp_fusion=False)
    asm = compile_for(capability, kernel, arguments, **options)
    assert asm["ptx"].count("div.rn.f32") == {"round": 1, "descend": 2}[name]
    assert "div.full" not in asm["ptx"] and "fma" not in asm["ptx"]
    assert "mul.rn.f32" in asm["ptx"] and "cp.async" in asm["ptx"]
    needed = resources(asm["cubin"], tmp_path)
    assert needed.stack == 0
    # 65536 of a processor are enough for a program.
    assert needed.registers * 32 * gptq_columns._WARPS <= 65536


def test_a_chunk_rounded_by_hand():
    """Two columns: a tie goes to the even number, and what it leaves moves the next one."""
    current, target = torch.tensor([[2.5, -9.0], [0.25, 4.0]]), torch.tensor([[2.0, -9.0], [0.25, 4.0]])
    factor = torch.tensor([[1.0, 2.0], [0.0, 1.0]])
    scale, zero = torch.tensor([[1.0, 0.5], [0.5, 2.0]]), torch.tensor([[8.0, 8.0], [0.0, 0.0]])
    c, difference = torch.empty(2, 2), torch.empty(2, 2)
    round_columns(current, target, factor, scale, zero, torch.tensor([0, 1]), c, difference)
    assert c.tolist() == [[2, -8], [0, 0]]
    assert difference.tolist() == [[0, -5], [0.25, 4]]


def test_a_sweep_leaves_the_gradient_of_its_integers():
    chunk = exact_chunk(24, 9, 1, symmetric=False)
    hessian = chunk.matrix + chunk.matrix.triu(1).T
    hessian.diagonal().fill_(4)
    scale, zero = chunk.scale[0], chunk.zero[0]
    c, gradient = chunk.c.clone(), hessian @ (chunk.target - chunk.c * scale)
    descend_columns(gradient, hessian, scale, zero, c)
    assert torch.equal(gradient, hessian @ (chunk.target - c * scale))
    assert not torch.equal(c, chunk.c)
    assert ((c >= -zero) & (c <= 15 - zero)).all()
