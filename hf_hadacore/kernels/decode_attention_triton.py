"""Attention of one new token per sequence over a masked key/value buffer, in one Triton launch.

The query heads that share a key head are the rows of one tile, so keys and values are read once. The keys
are split among several programs where a program for each key head would leave most of the GPU idle
(Flash-Decoding, https://crfm.stanford.edu/2023/10/12/flashdecoding.html); the last of them to arrive combines
what all have found, in an order that does not depend on which it is. The buffer is longer than what it
holds: blocks of keys at either end of which all are masked are not read, and the others go to the programs
by turns.

Prefixes: p_ pointer, b_ values in registers, o_ offsets, m_ mask, i_ index, s_ stride.
"""

import torch
import triton
import triton.language as tl

from .launcher import capability, on_device, pdl_options, power_of_2, run
from .pointwise_parts import prefetch
from .w4a16_launch import arrival_counters, processors_of

HEAD_DIMS = (64, 80, 96, 112, 128, 192, 256)
# Rows of the smallest product of tensor cores.
_MAX_GROUP = 16
_MAX_SPLITS = 32
# fp32 values that a program has in registers when it adds up those of the splits.
_COMBINED = 4096

# Three stages are two buffers of 32 KiB of keys and values: the next block is on its way while one is worked
# on.
_OPTIONS = pdl_options(num_stages=3, enable_fp_fusion=True)


@triton.jit
def _weights(b_logit, b_max, BASE_2: tl.constexpr = False):
    """exp(logit - max), or 2^(logit - max), and 0 where everything up to here is masked."""
    b_relative = b_logit - tl.where(b_max == float("-inf"), 0.0, b_max)
    return tl.exp2(b_relative) if BASE_2 else tl.exp(b_relative)


@triton.jit
def _live_blocks(p_mask, length, i_split, BLOCK: tl.constexpr, SPLITS: tl.constexpr):
    """The first of a program's blocks with a key that is not masked, and how many there are to the last."""
    # 2048 keys at a time.
    BLOCKS: tl.constexpr = 2048 // BLOCK
    o_i = tl.arange(0, BLOCKS)
    o_block = tl.arange(0, BLOCK)
    count = tl.cdiv(length - i_split * BLOCK, SPLITS * BLOCK)
    b_first = tl.full([BLOCKS], 0x7FFFFFFF, tl.int32)
    b_end = tl.zeros([BLOCKS], tl.int32)
    for i in tl.range(0, count, BLOCKS):
        o_key = ((i + o_i) * SPLITS + i_split)[:, None] * BLOCK + o_block[None, :]
        b_mask = tl.load(p_mask + o_key, mask=o_key < length, other=float("-inf"))
        m_live = tl.max((b_mask != float("-inf")).to(tl.int32), axis=1) > 0
        b_first = tl.where(m_live, tl.minimum(b_first, i + o_i), b_first)
        b_end = tl.where(m_live, i + o_i + 1, b_end)
    i_first = tl.min(b_first, axis=0)
    return i_first, tl.maximum(tl.max(b_end, axis=0) - i_first, 0)


@triton.jit
def combine(
    p_acc,
    p_max,
    p_sum,
    o_row,
    rows,
    splits,
    D: tl.constexpr,
    SPLITS: tl.constexpr,
    D_BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    BASE_2: tl.constexpr,
):
    """Add up rows o_row of the partial results ``[splits, rows, D]`` of at most SPLITS splits.

    Returns:
        Sums of values, maxima, and sums of weights.
    """
    o_d = tl.arange(0, D_BLOCK)
    b_max = tl.full([o_row.shape[0]], float("-inf"), tl.float32)
    b_sum = tl.zeros([o_row.shape[0]], tl.float32)
    b_acc = tl.zeros([o_row.shape[0], D_BLOCK], tl.float32)
    for first in tl.static_range(0, SPLITS, CHUNK):
        o_s = first + tl.arange(0, CHUNK)
        m_rows = (o_s < splits)[:, None] & (o_row < rows)[None, :]
        o_rows = o_s[:, None] * rows + o_row[None, :]
        m_acc = m_rows[:, :, None] & (o_d < D)[None, None, :]
        o_acc = o_rows[:, :, None] * D + o_d[None, None, :]
        # Other programs have written these: they are in the L2 cache, not in this processor's L1.
        b_part = tl.load(p_acc + o_acc, mask=m_acc, other=0.0, cache_modifier=".cg")
        b_part_max = tl.load(p_max + o_rows, mask=m_rows, other=float("-inf"), cache_modifier=".cg")
        b_part_sum = tl.load(p_sum + o_rows, mask=m_rows, other=0.0, cache_modifier=".cg")
        b_new_max = tl.maximum(b_max, tl.max(b_part_max, axis=0))
        b_weight = _weights(b_part_max, b_new_max[None, :], BASE_2)
        b_decay = _weights(b_max, b_new_max, BASE_2)
        b_sum = b_sum * b_decay + tl.sum(b_weight * b_part_sum, axis=0)
        b_acc = b_acc * b_decay[:, None] + tl.sum(b_weight[:, :, None] * b_part, axis=0)
        b_max = b_new_max
    return b_acc, b_max, b_sum


@triton.jit
def _decode_attention_kernel(
    p_q,
    p_keys,
    p_values,
    p_mask,
    p_out,
    p_partials,
    p_arrived,
    length,
    s_qb,
    s_qh,
    s_mb,
    scale,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    D_BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    """out = softmax(scale * q k^T + mask) v for the query heads of one key head, over every SPLITS-th block.

    q ``[B, KV_HEADS * GROUP, D]`` with strides s_qb, s_qh; keys, values ``[B, KV_HEADS, length, D]``; mask
    ``[B or 1, length]``; out ``[B, KV_HEADS, GROUP, D]``; partials, fp32, ``[B, KV_HEADS, SPLITS, GROUP, D]``
    sums of values, then as many maxima and sums of weights without the D. Grid: (B * KV_HEADS, SPLITS).
    """
    i_head = tl.program_id(0)
    i_split = tl.program_id(1)
    i_b = (i_head // KV_HEADS).to(tl.int64)
    p_keys += i_head.to(tl.int64) * length * D
    p_values += i_head.to(tl.int64) * length * D
    o_block = tl.arange(0, BLOCK)
    if p_mask is not None:
        p_mask += i_b * s_mb
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        # What is asked into the L2 cache is right whatever is still being written, and a mask that is not
        # final yet only decides what is asked for. It must not stay in L1.
        i_key = i_split * BLOCK
        is_live = i_key + BLOCK <= length
        if p_mask is not None:
            m_hint = i_key + o_block < length
            b_hint = tl.load(p_mask + i_key + o_block, mask=m_hint, other=float("-inf"), cache_modifier=".cg")
            is_live = is_live & (tl.max(b_hint.to(tl.float32), axis=0) > float("-inf"))
        if is_live:
            prefetch(p_keys + i_key * D, BLOCK * D, BLOCK * D_BLOCK)
            prefetch(p_values + i_key * D, BLOCK * D, BLOCK * D_BLOCK)
        tl.extra.cuda.gdc_wait()

    o_g = tl.arange(0, ROWS)
    o_d = tl.arange(0, D_BLOCK)
    m_g = o_g < GROUP
    m_d = o_d < D
    m_q = m_g[:, None] & m_d[None, :]
    o_qh = (i_head % KV_HEADS) * GROUP + o_g
    b_q = tl.load(p_q + i_b * s_qb + o_qh[:, None] * s_qh + o_d[None, :], mask=m_q, other=0.0)
    if p_mask is not None:
        i_first, count = _live_blocks(p_mask, length, i_split, BLOCK, SPLITS)
    else:
        i_first, count = 0, tl.cdiv(length - i_split * BLOCK, SPLITS * BLOCK)
    b_max = tl.full([ROWS], float("-inf"), tl.float32)
    b_sum = tl.zeros([ROWS], tl.float32)
    b_acc = tl.zeros([ROWS, D_BLOCK], tl.float32)
    # Triton 3.9 only overlaps the loads of a loop with its products if it starts from 0.
    for i in tl.range(0, count):
        o_key = ((i_first + i) * SPLITS + i_split) * BLOCK + o_block
        m_key = o_key < length
        m_kv = m_key[:, None] & m_d[None, :]
        o_kv = o_key.to(tl.int64)[:, None] * D + o_d[None, :]
        b_k = tl.load(p_keys + o_kv, mask=m_kv, other=0.0)
        b_v = tl.load(p_values + o_kv, mask=m_kv, other=0.0)
        # [ROWS, D] @ [D, BLOCK] -> [ROWS, BLOCK]
        b_logit = tl.dot(b_q, tl.trans(b_k)) * scale
        if p_mask is not None:
            b_mask = tl.load(p_mask + o_key, mask=m_key, other=float("-inf"))
            b_logit += b_mask.to(tl.float32)[None, :]
        else:
            b_logit = tl.where(m_key[None, :], b_logit, float("-inf"))
        b_new_max = tl.maximum(b_max, tl.max(b_logit, axis=1))
        b_weight = _weights(b_logit, b_new_max[:, None])
        b_decay = _weights(b_max, b_new_max)
        b_sum = b_sum * b_decay + tl.sum(b_weight, axis=1)
        # [ROWS, BLOCK] @ [BLOCK, D] -> [ROWS, D]
        b_acc = tl.dot(b_weight.to(b_v.dtype), b_v, b_acc * b_decay[:, None])
        b_max = b_new_max

    if SPLITS == 1:
        # As PyTorch has it: attention to nothing gives 0.
        b_out = b_acc / tl.where(b_sum == 0.0, 1.0, b_sum)[:, None]
        o_out = (i_head * GROUP + o_g).to(tl.int64)[:, None] * D + o_d[None, :]
        tl.store(p_out + o_out, b_out.to(p_out.dtype.element_ty), mask=m_q)
    else:
        rows = tl.num_programs(0) * SPLITS * GROUP
        p_max = p_partials + rows * D
        p_sum = p_max + rows
        i_row = i_head * SPLITS * GROUP
        o_row = i_row + i_split * GROUP + o_g
        tl.store(p_partials + o_row[:, None] * D + o_d[None, :], b_acc, mask=m_q)
        tl.store(p_max + o_row, b_max, mask=m_g)
        tl.store(p_sum + o_row, b_sum, mask=m_g)
        # One thread counts for all of the program.
        tl.debug_barrier()
        is_last = tl.atomic_add(p_arrived + i_head, 1, sem="acq_rel") == SPLITS - 1
        tl.debug_barrier()
        if is_last:
            tl.store(p_arrived + i_head, 0)
            o_all = tl.arange(0, GROUP_BLOCK)
            b_all, _, b_all_sum = combine(
                p_partials + i_row * D,
                p_max + i_row,
                p_sum + i_row,
                o_all,
                GROUP,
                SPLITS,
                D,
                SPLITS,
                D_BLOCK,
                CHUNK,
                False,
            )
            b_out = b_all / tl.where(b_all_sum == 0.0, 1.0, b_all_sum)[:, None]
            o_out = (i_head * GROUP + o_all).to(tl.int64)[:, None] * D + o_d[None, :]
            m_out = (o_all < GROUP)[:, None] & m_d[None, :]
            tl.store(p_out + o_out, b_out.to(p_out.dtype.element_ty), mask=m_out)


def block_of(head_dim: int) -> int:
    """Keys that a program takes at a time: 16 KiB, few enough for short buffers to be split."""
    return 64 if head_dim <= 128 else 32


def choose_splits(key_heads: int, length: int, processors: int) -> int:
    """Among how many programs the keys of a head are split: about one program for each processor.

    Args:
        key_heads: of all sequences.
        length: of the buffer; each program has at least 64 keys of it.
        processors: of the device.
    """
    return max(1, min(processors // key_heads, -(-length // 64), _MAX_SPLITS))


def fits(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """Whether `decode_attention` can do it.

    Args:
        query, keys, values, mask: as there, or anything else that attention is called with.
    """
    q_shape, shape, dtype = query.shape, keys.shape, query.dtype
    if not (
        len(q_shape) == len(shape) == 4
        and q_shape[2] == 1
        and q_shape[0] == shape[0]
        and q_shape[3] == shape[3]
        and shape[3] in HEAD_DIMS
        and values.shape == shape
        and shape[2] > 0
        and q_shape[0] * q_shape[1] > 0
        and q_shape[1] % shape[1] == 0
        and q_shape[1] // shape[1] <= _MAX_GROUP
        and (dtype == torch.bfloat16 or dtype == torch.float16)
        and keys.dtype == values.dtype == dtype
        and keys.device == values.device == query.device
        and query.stride(3) == 1
        and keys.is_contiguous()
        and values.is_contiguous()
        and capability(query.get_device()) >= (8, 0)
    ):
        return False
    return mask is None or (
        mask.dim() == 4
        and mask.shape[1:] == (1, 1, shape[2])
        and mask.shape[0] in (1, shape[0])
        and mask.stride(3) == 1
        and (mask.dtype == dtype or mask.dtype == torch.float32)
        and mask.device == query.device
    )


def decode_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
) -> torch.Tensor:
    """Attention of one token per sequence; fp32 inside, the weights rounded to the dtype of the values.

    The same inputs on the same kind of device give the same bits.

    Args:
        query: fp16 or bf16 ``[B, Hq, 1, D]`` on CUDA, any strides but 1 between the elements of a head; D one
            of `HEAD_DIMS`, Hq at most 16 times Hkv.
        keys, values: ``[B, Hkv, L, D]``, contiguous, of the dtype of the query.
        mask: added to the logits, ``[B or 1, 1, 1, L]``, of that dtype or fp32; None adds nothing.
        scale: of the products of queries and keys; None for D**-0.5.

    Returns:
        ``[B, 1, Hq, D]``, contiguous. A sequence of which everything is masked gives 0, as with PyTorch.
    """
    batch, heads, _, d = query.shape
    _, kv_heads, length, _ = keys.shape
    index = query.get_device()
    out = torch.empty((batch, 1, heads, d), dtype=query.dtype, device=query.device)
    splits = choose_splits(batch * kv_heads, length, processors_of(index))
    with on_device(query.device):
        arrived = arrival_counters(query.device, batch * kv_heads) if splits > 1 else out
        launch(query, keys, values, mask, scale, out, arrived, splits, capability(index) >= (9, 0))
    return out


def launch(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
    out: torch.Tensor,
    arrived: torch.Tensor,
    splits: int,
    has_pdl: bool,
) -> None:
    """Run the kernel on the current device.

    Args:
        query, keys, values, mask, scale: as in `decode_attention`.
        out: what that returns.
        arrived: int32, at least ``[B * Hkv]`` zeros, which it leaves zero; anything for one split.
        splits: programs for each key head, at most one for each 64 keys.
        has_pdl: whether the device has programmatic dependent launch.
    """
    batch, heads, _, d = query.shape
    _, kv_heads, length, _ = keys.shape
    group = heads // kv_heads
    partials = out
    if splits > 1:
        size = batch * heads * splits * (d + 2)
        partials = torch.empty(size, dtype=torch.float32, device=query.device)
    group_block, d_block = power_of_2(group), power_of_2(d)
    run(
        _decode_attention_kernel,
        (query, keys, values, mask, out, partials, arrived),
        (
            length,
            query.stride(0),
            query.stride(1),
            mask.stride(0) if mask is not None and mask.shape[0] > 1 else 0,
            d**-0.5 if scale is None else scale,
        ),
        (
            kv_heads,
            group,
            d,
            splits,
            block_of(d),
            _MAX_GROUP,
            group_block,
            d_block,
            min(power_of_2(splits), max(1, _COMBINED // (group_block * d_block))),
            has_pdl,
        ),
        (batch * kv_heads, splits, 1),
        num_warps=4,
        **_OPTIONS[has_pdl],
    )
