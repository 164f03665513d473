"""Triton kernel of `attention_8bit`: few queries over a long cache, and many where no other kernel fits.

A tile's rows are queries of one head or, where there are few queries, of all the heads that share a key
head, so that keys and values are read once. The keys of a tile are split among programs where there are few
tiles (Flash-Decoding, https://crfm.stanford.edu/2023/10/12/flashdecoding.html): each takes as many blocks of
those keys that are seen, which only the device knows. The last of them to arrive combines what all have
found, in an order that does not depend on which it is.

Prefixes: p_ pointer, b_ values in registers, o_ offsets, m_ mask, i_ index.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl

from .attention_schedules import Schedule, choose, combined_at_a_time, pack_of
from .attention_tiles import LOG2_P, blocks, bounds, store_rows
from .decode_attention_triton import combine
from .launcher import capability, has_pdl, pdl_options, power_of_2, run
from .pointwise_parts import prefetch_lines
from .w4a16_launch import arrival_counters, processors_of

HEAD_DIMS = (64, 80, 96, 112, 128, 192, 256)
# Offsets in a head are 32-bit.
_MAX_SIZE = 1 << 31
_TINY = tl.constexpr(2.0**-126)

_OPTIONS = pdl_options(enable_fp_fusion=True)


@triton.jit(do_not_specialize=["length", "queries", "window", "rows_kept"])
def _attention_kernel(
    p_q,
    p_k,
    p_v,
    p_q_scale,
    p_k_scale,
    p_v_scale,
    p_start,
    p_end,
    p_position,
    p_sinks,
    p_offset,
    p_out,
    p_partials,
    p_arrived,
    length,
    queries,
    window,
    rows_kept,
    scale,
    offset_scale,
    cap,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PACK: tl.constexpr,
    D: tl.constexpr,
    D_BLOCK: tl.constexpr,
    SCALED: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    COMBINED_ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    SWAP: tl.constexpr,
    PDL: tl.constexpr,
):
    """ROWS rows of ``[B * HEADS / PACK, PACK * queries, D]``; grid: (B * HEADS / PACK, tiles, SPLITS).

    GROUP heads share a key head; PACK is GROUP or 1. SCALED tokens share a scale of keys and one of values.
    t = log2(e) logit is x = q k^T * scale + offset * offset_scale or, with SOFTCAP, cap - 2 cap / (2^x + 1).
    partials, fp32, ``[B * HEADS / PACK * tiles, SPLITS, rows_kept, D]`` sums of values, then as many maxima
    and sums of weights without the D.
    """
    UNITS: tl.constexpr = HEADS // PACK
    i_unit = tl.program_id(0)
    # The tiles that see most come first.
    i_tile = tl.num_programs(1) - 1 - tl.program_id(1)
    i_split = tl.program_id(2)
    i_b = i_unit // UNITS
    i_kv = (i_unit * PACK // GROUP).to(tl.int64)
    length_16 = tl.cdiv(length, 16) * 16
    scales = tl.cdiv(length, SCALED)
    p_k += i_kv * length * D
    p_v += i_kv * length_16 * D
    p_k_scale += i_kv * scales
    p_v_scale += i_kv * scales
    if PACK == 1:
        i_first = i_tile * ROWS
        i_last = tl.minimum(i_first + ROWS, queries) - 1
    else:
        i_first = 0
        i_last = queries - 1
    o_block = tl.arange(0, BLOCK)
    o_d = tl.arange(0, D_BLOCK)
    m_d = o_d < D
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        if SPLITS > 1:
            # What is asked into the L2 cache is right whatever is still being written, and bounds that are
            # not final yet only decide what is asked for.
            i_start, i_end, i_position = bounds(p_start, p_end, p_position, i_b, length, queries)
            i_block, count, active = blocks(
                i_start, i_end, i_position, i_first, i_last, window, i_split, CAUSAL, WINDOW, BLOCK, SPLITS
            )
            if (i_split < active) & (count > 0) & ((i_block + 1) * BLOCK <= length):
                # Requests for each 128 bytes of keys, and for each row of values.
                o_line = tl.arange(0, BLOCK * D_BLOCK // 128) * 128
                prefetch_lines(p_k + i_block * BLOCK * D + tl.minimum(o_line, BLOCK * D - 1))
                prefetch_lines(p_v + i_block * BLOCK + tl.minimum(o_d, D - 1) * length_16)
        tl.extra.cuda.gdc_wait()
    i_start, i_end, i_position = bounds(p_start, p_end, p_position, i_b, length, queries)
    i_block, count, active = blocks(
        i_start, i_end, i_position, i_first, i_last, window, i_split, CAUSAL, WINDOW, BLOCK, SPLITS
    )
    if i_split >= active:
        return

    o_row = i_tile * ROWS + tl.arange(0, ROWS)
    m_row = o_row < PACK * queries
    o_token = o_row % queries if PACK > 1 else o_row
    i_rows = i_unit.to(tl.int64) * PACK * queries
    m_q = m_row[:, None] & m_d[None, :]
    b_q = tl.load(p_q + i_rows * D + (o_row[:, None] * D + o_d[None, :]), mask=m_q, other=0.0)
    b_scale = tl.load(p_q_scale + i_rows + o_row, mask=m_row, other=0.0) * scale
    if p_offset is not None:
        b_offset = tl.load(p_offset + i_rows + o_row, mask=m_row, other=0.0) * offset_scale
    # Of each row; and of all, where nothing needs to be masked.
    b_start = tl.zeros([ROWS], tl.int32) + i_start
    b_end = tl.zeros([ROWS], tl.int32) + i_end
    i_clear = i_start
    i_clear_end = i_end
    if WINDOW:
        b_start = tl.maximum(b_start, i_position + o_token - window + 1)
        i_clear = tl.maximum(i_start, i_position + i_last - window + 1)
    if CAUSAL:
        b_end = tl.minimum(b_end, i_position + o_token + 1)
        i_clear_end = tl.minimum(i_end, i_position + i_first + 1)
    # Values come in aligned pieces of 16.
    i_end_16 = tl.cdiv(i_end, 16) * 16
    product_dtype: tl.constexpr = tl.int32 if p_q.dtype.element_ty == tl.int8 else tl.float32
    # The axes of keys and of rows in products of queries and keys.
    KEYS: tl.constexpr = 0 if SWAP else 1
    OTHER: tl.constexpr = 1 - KEYS
    b_max = tl.full([ROWS], float("-inf"), tl.float32)
    b_sum = tl.zeros([ROWS], tl.float32)
    b_acc = tl.zeros([D_BLOCK, ROWS] if SWAP else [ROWS, D_BLOCK], tl.float32)
    # Triton 3.9 only overlaps the loads of a loop with its products if it starts from 0.
    for i in tl.range(0, count):
        i_key = (i_block + i) * BLOCK
        o_key = i_key + o_block
        m_k = (o_key < i_end)[:, None] & m_d[None, :]
        m_v = (o_key < i_end_16)[None, :] & m_d[:, None]
        b_k = tl.load(p_k + o_key[:, None] * D + o_d[None, :], mask=m_k, other=0.0)
        b_v = tl.load(p_v + o_d[:, None] * length_16 + o_key[None, :], mask=m_v, other=0.0)
        if SCALED == 1:
            m_there = (o_key >= i_start) & (o_key < i_end)
            b_k_scale = tl.load(p_k_scale + o_key, mask=m_there, other=0.0)
            b_v_scale = tl.load(p_v_scale + o_key, mask=m_there, other=0.0)
        else:
            b_k_scale = tl.load(p_k_scale + i_key // SCALED)
            b_unit = tl.load(p_v_scale + i_key // SCALED)
        # [ROWS, D] @ [D, BLOCK] -> [ROWS, BLOCK], or what all of this is transposed
        if SWAP:
            b_t = tl.dot(b_k, tl.trans(b_q), out_dtype=product_dtype).to(tl.float32)
        else:
            b_t = tl.dot(b_q, tl.trans(b_k), out_dtype=product_dtype).to(tl.float32)
        if SCALED == 1:
            b_t = b_t * tl.expand_dims(b_scale, KEYS) * tl.expand_dims(b_k_scale, OTHER)
        else:
            b_t = b_t * tl.expand_dims(b_scale * b_k_scale, KEYS)
        if p_offset is not None:
            b_t += tl.expand_dims(b_offset, KEYS)
        if SOFTCAP:
            b_t = cap - 2.0 * cap / (tl.exp2(b_t) + 1.0)
        if (i_key < i_clear) | (i_key + BLOCK > i_clear_end):
            o_keys = tl.expand_dims(o_key, OTHER)
            m = (o_keys >= tl.expand_dims(b_start, KEYS)) & (o_keys < tl.expand_dims(b_end, KEYS))
            b_t = tl.where(m, b_t, float("-inf"))
        b_new_max = tl.maximum(b_max, tl.max(b_t, axis=KEYS))
        b_safe_max = tl.where(b_new_max == float("-inf"), 0.0, b_new_max)
        b_p = tl.exp2(b_t - tl.expand_dims(b_safe_max - LOG2_P, KEYS))
        b_decay = tl.exp2(b_max - b_safe_max)
        b_max = b_new_max
        b_sum = b_sum * b_decay + tl.sum(b_p, axis=KEYS)
        if SCALED == 1:
            b_unit = tl.maximum(tl.max(b_v_scale, axis=0), _TINY)
            b_p = b_p * tl.expand_dims(b_v_scale * (1.0 / b_unit), OTHER)
        # The order of tokens in V: what a thread has of the product above is its part of the operand.
        b_p = b_p.to(p_v.dtype.element_ty)
        # [ROWS, BLOCK] @ [BLOCK, D] -> [ROWS, D]. Tensor cores drop bits of long sums: blocks add up in fp32.
        if SWAP:
            b_p = tl.reshape(b_p, (BLOCK // 16, 2, 4, 2, ROWS))
            b_p = tl.reshape(tl.permute(b_p, (0, 2, 1, 3, 4)), (BLOCK, ROWS))
            b_part = tl.dot(b_v, b_p)
        else:
            b_p = tl.reshape(b_p, (ROWS, BLOCK // 16, 2, 4, 2))
            b_p = tl.reshape(tl.permute(b_p, (0, 1, 3, 2, 4)), (ROWS, BLOCK))
            b_part = tl.dot(b_p, tl.trans(b_v))
        b_acc = b_acc * tl.expand_dims(b_decay, KEYS) + b_part * b_unit

    if SWAP:
        b_acc = tl.trans(b_acc)
    i_head = i_unit % UNITS * PACK
    if SPLITS == 1 or active == 1:
        store_rows(
            p_out,
            p_sinks,
            o_row,
            i_b,
            i_first,
            i_head,
            queries,
            m_row,
            b_acc,
            b_max,
            b_sum,
            HEADS,
            PACK,
            D,
            D_BLOCK,
        )
        return
    rows = tl.num_programs(0).to(tl.int64) * tl.num_programs(1) * SPLITS * rows_kept
    i_tiles = i_unit * tl.num_programs(1) + i_tile
    i_partial = i_tiles.to(tl.int64) * SPLITS * rows_kept
    p_max = p_partials + rows * D + i_partial
    p_sum = p_max + rows
    p_partials += i_partial * D
    o_kept = tl.arange(0, ROWS)
    m_kept = o_kept < rows_kept
    o_partial = i_split * rows_kept + o_kept
    tl.store(p_partials + o_partial[:, None] * D + o_d[None, :], b_acc, mask=m_kept[:, None] & m_d[None, :])
    tl.store(p_max + o_partial, b_max, mask=m_kept)
    tl.store(p_sum + o_partial, b_sum, mask=m_kept)
    # One thread counts for all of the program.
    tl.debug_barrier()
    is_last = tl.atomic_add(p_arrived + i_tiles, 1, sem="acq_rel") == active - 1
    tl.debug_barrier()
    if is_last:
        tl.store(p_arrived + i_tiles, 0)
        for i_row in tl.range(0, rows_kept, COMBINED_ROWS):
            o_part = i_row + tl.arange(0, COMBINED_ROWS)
            b_all, b_all_max, b_all_sum = combine(
                p_partials, p_max, p_sum, o_part, rows_kept, active, D, SPLITS, D_BLOCK, CHUNK, True
            )
            o_all = i_tile * ROWS + o_part
            m_all = (o_part < rows_kept) & (o_all < PACK * queries)
            store_rows(
                p_out,
                p_sinks,
                o_all,
                i_b,
                i_first,
                i_head,
                queries,
                m_all,
                b_all,
                b_all_max,
                b_all_sum,
                HEADS,
                PACK,
                D,
                D_BLOCK,
            )


def fits(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> bool:
    """Whether `launch` can do it, if `attention_8bit` accepts it.

    Args:
        query, key, value: as there.
        options: as there; all fit.
    """
    d, length_16 = value.shape[2:]
    return (
        d in HEAD_DIMS
        and query.numel() > 0
        and length_16 > 0
        and (max(length_16, query.shape[2]) + 128) * 256 < _MAX_SIZE
        and query.is_cuda
        and capability(query.get_device()) >= (8, 9)
    )


def launch(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_scale: torch.Tensor,
    key_scale: torch.Tensor,
    value_scale: torch.Tensor,
    out: torch.Tensor,
    *,
    scale: float,
    is_causal: bool,
    window: int,
    softcap: float,
    key_start: torch.Tensor | None,
    key_end: torch.Tensor | None,
    query_start: torch.Tensor | None,
    sinks: torch.Tensor | None,
    logit_offset: torch.Tensor | None,
    schedule: Schedule | None = None,
) -> None:
    """Run the kernel on the current device. The same inputs with the same schedule give the same bits.

    Args:
        query, key, value, query_scale, key_scale, value_scale, scale, is_causal, window, softcap, key_start,
            key_end, query_start, sinks, logit_offset: as in `attention_8bit`.
        out: fp16 or bf16 ``[B, Sq, Hq, D]``, contiguous; every element is written.
        schedule: how the work is cut, if not as usual.
    """
    batch, heads, queries, d = query.shape
    key_heads, length = key.shape[1], key.shape[2]
    if schedule is None:
        index = query.get_device()
        sizes = (batch, heads, key_heads, queries, length, d)
        schedule = choose(*sizes, processors_of(index), capability(index))
    rows, block, num_warps, num_stages, splits, is_swapped = schedule
    pack = pack_of(heads, key_heads, queries)
    units, tiles = batch * heads // pack, -(-pack * queries // rows)
    rows_kept = min(rows, pack * queries)
    partials = arrived = out
    if splits > 1:
        size = units * tiles * splits * rows_kept * (d + 2)
        partials = torch.empty(size, dtype=torch.float32, device=query.device)
        arrived = _counters(query.device, units * tiles)
    d_block = power_of_2(d)
    log2_e = math.log2(math.e)
    to_t = 2 * log2_e / softcap if softcap else log2_e
    pdl = has_pdl(query.device)
    run(
        _attention_kernel,
        (
            query,
            key,
            value,
            query_scale,
            key_scale,
            value_scale,
            key_start,
            key_end,
            query_start,
            sinks,
            logit_offset,
            out,
            partials,
            arrived,
        ),
        (length, queries, min(window, 1 << 30), rows_kept, scale * to_t, to_t, softcap * log2_e),
        (
            heads,
            heads // key_heads,
            pack,
            d,
            d_block,
            1 if key_scale.shape[2] == length else 128,
            is_causal,
            window > 0,
            softcap > 0,
            rows,
            block,
            splits,
            *combined_at_a_time(schedule, rows_kept, d_block),
            is_swapped,
            pdl,
        ),
        (units, tiles, splits),
        num_warps=num_warps,
        num_stages=num_stages,
        **_OPTIONS[pdl],
    )


def _counters(device: torch.device, count: int) -> torch.Tensor:
    # The interpreter's programs run one after another on any device.
    if device.type != "cuda":
        return torch.zeros(count, dtype=torch.int32, device=device)
    return arrival_counters(device, count)
