"""Slots sorted by expert and cut into blocks, on the device: what products of many tokens with experts need.

A slot is one choice of an expert by a token, a block up to BM slots of one expert. How many blocks there are
depends on the routing, which the CPU does not know, so there is a place for as many as there can be. With
f(e) slots of experts before e, the blocks of e begin at place f(e) // BM + e. They fit, because
(f + c) // BM + 1 >= f // BM + ceil(c / BM) for its c slots; what is left are blocks without slots.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .launcher import pdl_options, run

_OPTIONS = pdl_options()
# Slots that a program looks at together.
_BLOCK = 4096
_NUM_WARPS = 16


class Routing(NamedTuple):
    """Slots in the order of their experts.

    Attributes:
        blocks: int32 ``[S // BM + E + 1, 3]``: the expert of each block, its first place in `slots` and the
            one after its last. Slots whose expert is not there come last, as those of expert E.
        slots: int32 ``[S]``: the slots, sorted by expert and then by number.
        rows: int32 ``[S]``: the rows of x that these slots are for.
    """

    blocks: torch.Tensor
    slots: torch.Tensor
    rows: torch.Tensor


def sort_slots(
    expert_index: torch.Tensor, experts: int, slots_per_row: int, block_m: int, *, pdl: bool = True
) -> Routing:
    """Sort slots in one launch; nothing waits for the CPU.

    Args:
        expert_index: int32 or int64 ``[S]``, contiguous, S > 0; on a meta device the kernel is only compiled.
        experts: E. Other indices than 0 ... E - 1 are of experts that are not there.
        slots_per_row: so many slots in a row are for the same row of x.
        block_m: BM.
        pdl: whether the device has programmatic dependent launch.
    """
    slots = len(expert_index)

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int32, device=expert_index.device)

    order = empty(slots)
    rows = order if slots_per_row == 1 else empty(slots)
    routing = Routing(empty(slots // block_m + experts + 1, 3), order, rows)
    run(
        sort_kernel,
        (expert_index, routing.blocks, order, None if rows is order else rows),
        (slots, experts, slots_per_row),
        (block_m, _BLOCK, pdl),
        (experts + 1, 1, 1),
        num_warps=_NUM_WARPS,
        **_OPTIONS[pdl],
    )
    return routing


@triton.jit
def _experts_of(p_expert, o_slot, slots, experts):
    """The experts of slots: E for those that are not there, E + 1 where there is no slot."""
    b_expert = tl.load(p_expert + o_slot, mask=o_slot < slots, other=0)
    b_expert = tl.where((b_expert >= 0) & (b_expert < experts), b_expert, experts)
    return tl.where(o_slot < slots, b_expert, experts + 1).to(tl.int32)


@triton.jit(do_not_specialize=["slots", "experts", "slots_per_row"])
def sort_kernel(
    p_expert,
    p_blocks,
    p_slots,
    p_rows,
    slots,
    experts,
    slots_per_row,
    BM: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program e writes the slots and the blocks of expert e; the last one those of experts not there."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    i_expert = tl.program_id(0)
    o = tl.arange(0, BLOCK)
    b_before = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, slots, BLOCK):
        b_before += (_experts_of(p_expert, start + o, slots, experts) < i_expert).to(tl.int32)
    first = tl.sum(b_before)
    end = first
    for start in range(0, slots, BLOCK):
        m = _experts_of(p_expert, start + o, slots, experts) == i_expert
        o_place = end - 1 + tl.cumsum(m.to(tl.int32))
        tl.store(p_slots + o_place, start + o, mask=m)
        if p_rows is not None:
            tl.store(p_rows + o_place, (start + o) // slots_per_row, mask=m)
        end += tl.sum(m.to(tl.int32))

    first_block = first // BM + i_expert
    last_block = end // BM + i_expert
    for i_block in range(first_block, last_block + 1, 32):
        o_block = i_block + tl.arange(0, 32)
        m = o_block <= last_block
        b_first = tl.minimum(first + (o_block - first_block) * BM, end)
        tl.store(p_blocks + 3 * o_block, i_expert, mask=m)
        tl.store(p_blocks + 3 * o_block + 1, b_first, mask=m)
        tl.store(p_blocks + 3 * o_block + 2, tl.minimum(b_first + BM, end), mask=m)
