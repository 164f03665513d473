"""The kernel of the one-shot all-reduce: every rank reads what every rank wrote, and adds it up itself.

Each program moves one block of 2 KiB: it copies the rank's values into memory that the others can read, tells
all ranks so, waits until they all have told the same, and adds up the block of each. A program only waits for
the program of the same number on each other rank, so nothing depends on how many run at a time.

One wait is enough because there are two slots, used in turn. A rank that writes a slot again has seen every
rank's flag of the call between, and no rank sets that flag before its program of the call before has ended.
Which slot is next is counted in memory, block by block, so that replays of a CUDA graph take turns as well.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .launcher import run

BLOCK_BYTES = 2048
SLOTS = 2


class Mailbox(NamedTuple):
    """Memory of the ranks that all of them can read, as one of them sees it.

    Attributes:
        memory: this rank's slots and flags; the others write to it for as long as they run.
        addresses: int64 ``[2, world]``, where each rank's slots and flags are. Slots hold `SLOTS` times
            `slot_bytes`; flags are int32 ``[blocks, world]``, zero at first: the calls that a rank has
            written a block for.
        calls: int32 ``[blocks]``, zero at first: this rank's own count.
        rank, world: of this process; world is a power of two.
        slot_bytes: the largest message, a multiple of `BLOCK_BYTES`.
    """

    memory: torch.Tensor
    addresses: torch.Tensor
    calls: torch.Tensor
    rank: int
    world: int
    slot_bytes: int


@triton.jit
def one_shot_kernel(
    x_ptr,
    out_ptr,
    addresses_ptr,
    calls_ptr,
    numel,
    RANK: tl.constexpr,
    WORLD: tl.constexpr,
    BLOCK: tl.constexpr,
    SLOT: tl.constexpr,
):
    block = tl.program_id(0)
    i = block * BLOCK + tl.arange(0, BLOCK)
    mask = i < numel
    x = tl.load(x_ptr + i, mask=mask)
    call = tl.load(calls_ptr + block) + 1
    slot = (call & 1) * SLOT
    slots = ()
    for rank in tl.static_range(WORLD):
        start = tl.multiple_of(tl.load(addresses_ptr + rank).to(x_ptr.dtype), 16)
        slots += (start + slot,)  # type: ignore[assignment]  # a tuple that grows while it is compiled
    tl.store(slots[RANK] + i, x, mask=mask)

    ranks = tl.arange(0, WORLD)
    flags = tl.load(addresses_ptr + WORLD + ranks).to(calls_ptr.dtype)
    # All of the program's stores come before its flags.
    tl.debug_barrier()
    tl.atomic_xchg(flags + block * WORLD + RANK, call, sem="release", scope="sys")
    own_flags = tl.load(addresses_ptr + WORLD + RANK).to(calls_ptr.dtype) + block * WORLD + ranks
    # Another rank may be a call ahead; the difference is right when the count overflows, too.
    while tl.min(tl.atomic_add(own_flags, 0, sem="acquire", scope="sys") - call, axis=0) < 0:
        pass
    tl.debug_barrier()

    # In the order of the ranks, so that all of them get the same bits.
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for rank in tl.static_range(WORLD):
        total += tl.load(slots[rank] + i, mask=mask, other=0).to(tl.float32)
    tl.store(out_ptr + i, total.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(calls_ptr + block, call)


def launch(x: torch.Tensor, out: torch.Tensor, mailbox: Mailbox) -> None:
    """The sum over ranks, which all have to launch it for messages of the same size in the same order.

    Args:
        x: fp16, bf16 or fp32, contiguous, not empty, of at most `mailbox.slot_bytes`.
        out: like x; every element is written.
        mailbox: of this rank; used by one stream at a time.
    """
    block = BLOCK_BYTES // x.element_size()
    run(
        one_shot_kernel,
        (x, out, mailbox.addresses, mailbox.calls),
        (x.numel(),),
        (mailbox.rank, mailbox.world, block, mailbox.slot_bytes // x.element_size()),
        (-(-x.numel() // block), 1, 1),
        num_warps=4,
    )
