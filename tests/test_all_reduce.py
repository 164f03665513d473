"""The all-reduce: the op on the CPU, and its one-shot kernel without GPUs, interpreted and compiled."""

import re

import pytest
import torch
import torch.distributed as dist
from interpreted import run_interpreted
from rank_processes import run_ranks

from hf_hadacore.kernels import all_reduce as module
from hf_hadacore.kernels.all_reduce import MAX_BYTES, all_reduce, prepare


def on_a_rank() -> list[bool]:
    """What is checked on each of two ranks of gloo."""
    rank, checks = dist.get_rank(), []
    checks.append(not prepare())
    x = (torch.arange(6.0).view(2, 3) + rank).bfloat16()
    before = x.clone()
    for given in (x, x.mT):
        y = all_reduce(given)
        expected = torch.arange(6.0).view(2, 3) * 2 + 1
        checks.append(torch.equal(y, (expected if given is x else expected.mT).bfloat16()))
        checks.append(y.is_contiguous() and torch.equal(x, before))
    checks.append(all_reduce(torch.ones(0, 4)).shape == (0, 4))
    alone = [dist.new_group([i]) for i in range(2)][rank]
    checks.append(torch.equal(all_reduce(x, alone), x))
    name = dist.distributed_c10d._get_default_group().group_name
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.hf_hadacore.all_reduce.default, (x, name), test_utils=tests)
    compiled = torch.compile(lambda x: all_reduce(x) * 2, backend="eager", fullgraph=True)
    checks.append(torch.equal(compiled(x), all_reduce(x) * 2))
    return checks


def test_the_sum_over_ranks():
    assert all(run_ranks(on_a_rank, 2))


def test_there_is_no_group():
    with pytest.raises(ValueError, match="process group"):
        all_reduce(torch.ones(3))


def test_interpreted():
    pytest.importorskip("triton")
    assert "interpreted all_reduce" in run_interpreted("interpret_all_reduce.py", "2", "9")


@pytest.mark.parametrize("world", module._WORLDS)
@pytest.mark.parametrize("dtype", module._DTYPES)
def test_compiled(dtype: torch.dtype, world: int):
    """Values move 16 bytes at a time, and flags are set after they were stored and read before they are."""
    pytest.importorskip("triton")
    from offline import compile_for

    from hf_hadacore.kernels.all_reduce_triton import BLOCK_BYTES, one_shot_kernel

    tensors = {"x_ptr": dtype, "out_ptr": dtype, "addresses_ptr": torch.int64, "calls_ptr": torch.int32}
    block, slot = (nbytes // dtype.itemsize for nbytes in (BLOCK_BYTES, MAX_BYTES))
    constants = {"RANK": 1, "WORLD": world, "BLOCK": block, "SLOT": slot}
    stages = compile_for(90, one_shot_kernel, {**tensors, "numel": "i32:16", **constants}, num_warps=4)
    ptx = stages["ptx"]
    order = re.findall(r"(ld\.global\.v4|st\.global\.v4|atom\.global\.sys\.\w+|bar\.sync)", ptx)
    one_of_each = [step for step, previous in zip(order, ["", *order], strict=False) if step != previous]
    assert order.count("ld.global.v4") == 1 + world
    assert order.count("st.global.v4") == 2
    release, acquire = (
        one_of_each.index("atom.global.sys.release"),
        one_of_each.index("atom.global.sys.acquire"),
    )
    assert one_of_each[:release] == ["ld.global.v4", "st.global.v4", "bar.sync"]
    assert one_of_each[acquire:] == ["atom.global.sys.acquire", "bar.sync", "ld.global.v4", "st.global.v4"]
