"""Runs the kernel that sorts slots under Triton's interpreter; test_w4a16_experts.py starts it.

The interpreter is chosen when triton is imported, so it must not share a process with tests that compile.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import random

import torch

from hf_hadacore.kernels import w4a16_routing

CASES = 40


def sorted_by_torch(index: torch.Tensor, experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The slots by expert, and how many each expert has; expert E stands for those that are not there."""
    there = (index >= 0) & (index < experts)
    known = torch.where(there, index, experts)
    return torch.sort(known, stable=True).indices, torch.bincount(known, minlength=experts + 1)


def check(draw: random.Random) -> None:
    experts, block_m = draw.choice([1, 2, 7, 24]), draw.choice([16, 32, 64, 128])
    slots_per_row = draw.choice([1, 2, 8])
    slots = slots_per_row * draw.choice([1, 3, 17, 64, 130])
    index = torch.randint(-1, experts + 1, (slots,), dtype=draw.choice([torch.int32, torch.int64]))
    routing = draw.choice(["random", "one expert", "two experts", "none"])
    if routing == "one expert":
        index[:] = draw.randrange(experts)
    elif routing == "two experts":
        index[:] = torch.where(torch.rand(slots) < 0.9, 0, experts - 1)
    elif routing == "none":
        index[:] = draw.choice([-1, experts])
    found = w4a16_routing.sort_slots(index, experts, slots_per_row, block_m, pdl=False)
    order, counts = sorted_by_torch(index, experts)
    assert torch.equal(found.slots, order.int()) and torch.equal(found.rows, (order // slots_per_row).int())
    # Blocks that have slots: all slots of each expert, in order, in pieces of at most BM, none but the last
    # one of an expert smaller.
    blocks = [block for block in found.blocks.tolist() if block[1] < block[2]]
    first, expected = 0, []
    for expert, count in enumerate(counts.tolist()):
        for piece in range(0, count, block_m):
            expected.append([expert, first + piece, first + min(piece + block_m, count)])
        first += count
    assert blocks == expected, (blocks, expected)
    assert ((found.blocks[:, 0] >= 0) & (found.blocks[:, 0] <= experts)).all()
    assert ((found.blocks[:, 1] >= 0) & (found.blocks[:, 1] <= found.blocks[:, 2])).all()


if __name__ == "__main__":
    torch.manual_seed(0)
    # Fills new tensors, so that what the kernel leaves out is seen.
    torch.use_deterministic_algorithms(True)
    draw = random.Random(0)
    # Several turns of both loops, with few slots.
    w4a16_routing._BLOCK = 256
    for _ in range(CASES):
        check(draw)
    print(f"sorted {CASES} cases")
