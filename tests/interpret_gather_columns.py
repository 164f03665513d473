"""Runs the gather of columns under Triton's interpreter; test_gather_columns.py starts it.

The interpreter is chosen when triton is imported, so it must not share a process with tests that compile.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import random

import torch

from hf_hadacore.kernels.gather_columns import gather_columns

CASES = 30


def check(draw: random.Random) -> None:
    k = 8 * draw.choice([1, 5, 128, 129, 300])
    shape = draw.choice([(k,), (1, k), (3, k), (16, k), (17, k), (2, 3, k)])
    dtype = draw.choice([torch.float16, torch.float32])
    wide = torch.randn(*shape[:-1], k + 8).to(dtype)
    layout = draw.choice(["contiguous", "rows", "offset", "columns"])
    x = {
        "contiguous": wide[..., :k].contiguous(),
        "rows": wide[..., :k],
        "offset": wide[..., 3 : k + 3],
        "columns": wide[..., :k].mT.contiguous().mT if wide.dim() > 1 else wide[:k],
    }[layout]
    order = torch.randperm(k).int()
    out = gather_columns(x, order)
    assert out.is_contiguous() and torch.equal(out, x[..., order.long()]), (shape, dtype, layout)


if __name__ == "__main__":
    torch.manual_seed(0)
    # Fills new tensors, so that what the kernel leaves out is seen.
    torch.use_deterministic_algorithms(True)
    draw = random.Random(0)
    for _ in range(CASES):
        check(draw)
    print(f"{CASES} cases passed")
