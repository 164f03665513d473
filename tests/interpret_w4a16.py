"""Runs the W4A16 kernel under Triton's interpreter; test_w4a16_triton.py starts it in a process of its own.

The interpreter is chosen when triton is imported, so it must not share a process with tests that compile.
Its bf16 products are wrong without a word, so everything here is fp16.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import sys

import torch
from kernel_helpers import exact_product, in_floors, random_weight

from hf_hadacore import int4
from hf_hadacore.kernels.w4a16_triton import Schedule, launch

# (m, n, k, block_m, block_n, split_k): odd sizes, short groups, K below a block, more slices than blocks
SHAPES = [
    (1, 16, 128, 16, 64, 1),
    (3, 70, 72, 16, 64, 1),
    (17, 65, 136, 16, 64, 2),
    (5, 33, 576, 16, 64, 4),
    (2, 7, 8, 16, 64, 16),
    (40, 130, 264, 32, 128, 3),
]


def check(case: int, m: int, n: int, k: int, block_m: int, block_n: int, split_k: int) -> None:
    for group_size in int4.GROUP_SIZES:
        for symmetric in (False, True):
            weight = random_weight(n, k, group_size, symmetric, torch.float16, seed=case)
            wide = torch.randn(2 * m + 1, 2 * k + 3, generator=torch.Generator().manual_seed(case)).half()
            x = wide[1::2, 3::2] if case % 2 else wide[:m, :k].contiguous()
            bias = torch.randn(n).half() if case % 3 else None
            perm = torch.randperm(k).int() if group_size == 32 else None
            x[-1, 0] = 60000.0  # an outlier that fp16 sums could not hold
            results = []
            for _ in range(2):
                out = torch.full((m, n), float("nan"), dtype=torch.float16)
                schedule = Schedule(block_m, block_n, split_k)
                launch(x, *weight[:3], perm, bias, group_size, out, schedule)
                results.append(out)
            assert torch.equal(*results), "two runs differ"
            error = in_floors(results[0], exact_product(x, weight, perm, bias))
            assert error <= 1.1, (m, n, k, group_size, symmetric, split_k, error)


def check_edges() -> None:
    weight = random_weight(16, 64, 32, False, torch.float16)
    empty = torch.empty(0, 16, dtype=torch.float16)
    launch(torch.empty(0, 64).half(), *weight[:3], None, None, 32, empty, Schedule(16, 64, 1))
    for value in (float("nan"), float("inf")):
        x = torch.ones(3, 64).half()
        x[1, 5] = value
        out = torch.zeros(3, 16).half()
        launch(x, *weight[:3], None, None, 32, out, Schedule(16, 64, 2))
        assert out[[0, 2]].isfinite().all(), "a bad row spoiled others"
        assert not out[1].isfinite().all()
    weight.scale.zero_()
    out = torch.full((3, 16), float("nan")).half()
    launch(torch.ones(3, 64).half(), *weight[:3], None, None, 32, out, Schedule(16, 64, 1))
    assert (out == 0).all(), "all-zero groups"


if __name__ == "__main__":
    for case, shape in enumerate(SHAPES):
        check(case, *shape)
    check_edges()
    print(f"interpreted {len(SHAPES)} shapes")
    sys.exit(0)
