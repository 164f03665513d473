"""The mean of each head's keys in one Triton launch.

The tokens of a head are split among several programs, so that there are enough of them to keep memory busy;
the last of them to arrive adds up what all have found, in an order that does not depend on which it is.

Prefixes: p_ pointer, b_ values in registers, o_ offsets, m_ mask, i_ index, s_ stride.
"""

import torch
import triton
import triton.language as tl

from .launcher import has_pdl, pdl_options, power_of_2, run
from .w4a16_launch import arrival_counters, processors_of

_NUM_WARPS = 4
# What a program has on the way: 8 loads of 16 bytes a thread.
_TILE_BYTES = 16 * 1024
# All run at the same time: together they have 64 KiB on the way.
_PROGRAMS_PER_PROCESSOR = 4
# fp32 values that a program has in registers when it adds up those of the splits.
_COMBINED = 8192

_OPTIONS = pdl_options(enable_fp_fusion=True)


@triton.jit(do_not_specialize=["tokens", "heads"])
def _key_mean_kernel(
    p_key,
    p_is_token,
    p_out,
    p_partials,
    p_arrived,
    tokens,
    heads,
    s_kb,
    s_kh,
    s_kt,
    s_mb,
    D: tl.constexpr,
    D_BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    PDL: tl.constexpr,
):
    """out = mean of the tokens of one head, over every TILE-th block of the tokens.

    key ``[B, heads, tokens, D]`` with strides s_kb, s_kh, s_kt; is_token ``[B or 1, tokens]`` with stride
    s_mb; out ``[B, heads, D]``; partials ``[B, heads, splits, D]`` sums, then as many counts without the D.
    Grid: (B * heads, splits).
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    i_head = tl.program_id(0)
    i_split = tl.program_id(1)
    splits = tl.num_programs(1)
    i_b = (i_head // heads).to(tl.int64)
    p_key += i_b * s_kb + (i_head % heads).to(tl.int64) * s_kh
    o_tile = tl.arange(0, TILE)
    o_d = tl.arange(0, D_BLOCK)
    m_d = o_d < D
    b_sums = tl.zeros([ROWS, D_BLOCK], tl.float32)
    b_counts = tl.zeros([TILE], tl.int32)
    for i_tile in tl.range(i_split, tl.cdiv(tokens, TILE), splits):
        o_token = i_tile * TILE + o_tile
        m_token = o_token < tokens
        if p_is_token is not None:
            m_token = tl.load(p_is_token + i_b * s_mb + o_token, mask=m_token, other=0) != 0
            b_counts += m_token.to(tl.int32)
        o_key = o_token.to(tl.int64)[:, None] * s_kt + o_d[None, :]
        b_key = tl.load(p_key + o_key, mask=m_token[:, None] & m_d[None, :], other=0.0)
        # A thread has the same one of ROWS tokens in each of its loads, and adds them up in registers.
        b_key = tl.reshape(b_key, [TILE // ROWS, ROWS, D_BLOCK])
        b_sums += tl.sum(b_key.to(tl.float32), axis=0)
    b_sum = tl.sum(b_sums, axis=0)
    if p_is_token is not None:
        count = tl.sum(b_counts, axis=0).to(tl.float32)
    else:
        count = tokens.to(tl.float32)

    p_out += i_head.to(tl.int64) * D
    if not IS_SPLIT:
        tl.store(p_out + o_d, tl.div_rn(b_sum, tl.maximum(count, 1.0)), mask=m_d)
    else:
        i_row = i_head * splits
        p_counts = p_partials + tl.num_programs(0) * splits * D
        tl.store(p_partials + (i_row + i_split) * D + o_d, b_sum, mask=m_d)
        if p_is_token is not None:
            tl.store(p_counts + i_row + i_split, count)
        # One thread counts for all of the program.
        tl.debug_barrier()
        is_last = tl.atomic_add(p_arrived + i_head, 1, sem="acq_rel") == splits - 1
        tl.debug_barrier()
        if is_last:
            tl.store(p_arrived + i_head, 0)
            b_all = tl.zeros([D_BLOCK], tl.float32)
            all_count = 0.0
            for first in tl.range(0, splits, CHUNK):
                o_split = first + tl.arange(0, CHUNK)
                m_split = o_split < splits
                o_part = (i_row + o_split)[:, None] * D + o_d[None, :]
                m_part = m_split[:, None] & m_d[None, :]
                # Other programs have written these: they are in the L2 cache, not in this processor's L1.
                b_part = tl.load(p_partials + o_part, mask=m_part, other=0.0, cache_modifier=".cg")
                b_all += tl.sum(b_part, axis=0)
                if p_is_token is not None:
                    b_count = tl.load(
                        p_counts + i_row + o_split, mask=m_split, other=0.0, cache_modifier=".cg"
                    )
                    all_count += tl.sum(b_count, axis=0)
            if p_is_token is None:
                all_count = count
            tl.store(p_out + o_d, tl.div_rn(b_all, tl.maximum(all_count, 1.0)), mask=m_d)


def tile_of(d: int, itemsize: int) -> tuple[int, int]:
    """Tokens that a program takes at a time, and those of one load of 16 bytes a thread.

    Args:
        d: size of a head.
        itemsize: bytes of an element.
    """
    row = power_of_2(d) * itemsize
    return max(1, _TILE_BYTES // row), max(1, _NUM_WARPS * 32 * 16 // row)


def choose_splits(heads: int, tiles: int, processors: int) -> int:
    """Among how many programs the tokens of a head are split.

    Args:
        heads: of all sequences.
        tiles: of a head's tokens.
        processors: of the device.
    """
    most = max(1, min(tiles, _PROGRAMS_PER_PROCESSOR * processors // heads))
    # No more of them than it takes: the last one has less to add up.
    return -(-tiles // -(-tiles // most))


def key_mean(key: torch.Tensor, is_token: torch.Tensor | None, out: torch.Tensor) -> None:
    """Run the kernel of `hf_hadacore::key_mean` on the current device.

    Args:
        key: ``[B, H, S, D]``, not empty, any strides.
        is_token: boolean ``[B or 1, S]``; None if all are.
        out: fp32 ``[B, H, D]``, contiguous.
    """
    batch, heads, tokens, d = key.shape
    tiles = -(-tokens // tile_of(d, key.element_size())[0])
    splits = choose_splits(batch * heads, tiles, processors_of(key.get_device()))
    arrived = arrival_counters(key.device, batch * heads) if splits > 1 else None
    launch(key, is_token, out, arrived, splits)


def launch(
    key: torch.Tensor,
    is_token: torch.Tensor | None,
    out: torch.Tensor,
    arrived: torch.Tensor | None,
    splits: int,
) -> None:
    """Run the kernel.

    Args:
        key, is_token, out: as in `key_mean`.
        arrived: int32, at least ``[B * H]`` zeros, which it leaves zero; None for one split.
        splits: programs for each head, at most one for each tile.
    """
    batch, heads, tokens, d = key.shape
    if key.stride(3) != 1:
        key = key.contiguous()
    s_mb = 0
    if is_token is not None:
        if is_token.stride(1) != 1:
            is_token = is_token.contiguous()
        s_mb = is_token.stride(0) if is_token.shape[0] > 1 else 0
    partials = None
    if splits > 1:
        partials = out.new_empty(batch * heads * splits * (d + 1))
    d_block = power_of_2(d)
    pdl = has_pdl(key.device)
    run(
        _key_mean_kernel,
        (key, is_token, out, partials, arrived),
        (tokens, heads, key.stride(0), key.stride(1), key.stride(2), s_mb),
        (d, d_block, *tile_of(d, key.element_size()), max(1, _COMBINED // d_block), splits > 1, pdl),
        (batch * heads, splits, 1),
        num_warps=_NUM_WARPS,
        **_OPTIONS[pdl],
    )
