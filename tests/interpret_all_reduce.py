"""Runs the kernel of all_reduce under Triton's interpreter, one process per rank, for test_all_reduce.py.

The ranks' memory is shared by the operating system instead of by NVLink; every process sees it at addresses
of its own. The interpreter's bf16 is wrong without a word, so there is none here.
"""

import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import torch
import torch.multiprocessing as mp

from hf_hadacore.kernels.all_reduce_triton import BLOCK_BYTES, SLOTS, Mailbox, launch

SLOT_BYTES = 4 * BLOCK_BYTES
BLOCKS = SLOT_BYTES // BLOCK_BYTES
# The count of calls overflows while they run.
FIRST = 2**31 - 3
# Sizes that use other numbers of blocks from call to call, and leave the last one partly empty.
SIZES = (1024, 1, 4096, 1025, 2048, 1024, 1024, 3000)


def message(rank: int, call: int, dtype: torch.dtype) -> torch.Tensor:
    size = SIZES[call % len(SIZES)] // (dtype.itemsize // 2)
    return torch.randn(size, generator=torch.Generator().manual_seed(97 * call + rank)).to(dtype)


def run_rank(rank: int, memories: list[torch.Tensor], calls: int) -> None:
    world = len(memories)
    slots = [memory.data_ptr() for memory in memories]
    flags = [address + SLOTS * SLOT_BYTES for address in slots]
    count = torch.full((BLOCKS,), FIRST, dtype=torch.int32)
    mailbox = Mailbox(memories[rank], torch.tensor([slots, flags]), count, rank, world, SLOT_BYTES)
    for call in range(calls):
        dtype = (torch.float16, torch.float32)[call // 3 % 2]
        out = torch.full_like(message(rank, call, dtype), float("nan"))
        launch(message(rank, call, dtype), out, mailbox)
        total = torch.zeros(out.shape)
        for other in range(world):
            total += message(other, call, dtype).float()
        assert torch.equal(out, total.to(dtype)), (rank, call)


if __name__ == "__main__":
    world, calls = map(int, sys.argv[1:])
    memories = []
    for _ in range(world):
        memory = torch.zeros(SLOTS * SLOT_BYTES + 4 * BLOCKS * world, dtype=torch.uint8).share_memory_()
        memory[SLOTS * SLOT_BYTES :].view(torch.int32).fill_(FIRST)
        memories.append(memory)
    mp.spawn(run_rank, (memories, calls), nprocs=world)
    print("interpreted all_reduce")
