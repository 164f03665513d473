"""The fused W4A16 SplitK kernel in Triton (arXiv:2402.00025): dequantize and multiply in one pass.

Each program multiplies one tile of outputs with a slice of K. With more than one slice per tile the fp32
partial sums go through a workspace and a second kernel adds them in a fixed order, so that the same input
gives the same bits every time. Prefixes: p_ pointer, b_ values in registers, o_ offsets, m_ mask, i_ index,
s_ stride.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .. import int4

# One K block is one group, so that its scale multiplies a whole partial product.
_GROUP_BLOCKS = {32: 32, 64: 64, 128: 128, -1: 128}


class Schedule(NamedTuple):
    """How a product is cut into programs.

    Attributes:
        block_m: tokens of a tile.
        block_n: outputs of a tile.
        split_k: programs that share the K dimension of a tile; 1 writes the result directly.
        num_warps: warps per program.
        num_stages: depth of the software pipeline.
    """

    block_m: int
    block_n: int
    split_k: int
    num_warps: int = 4
    num_stages: int = 4


def supports(dtype: torch.dtype, in_features: int, group_size: int) -> bool:
    """Whether the kernel can run; otherwise the reference does."""
    size = group_size if group_size in _GROUP_BLOCKS else 0
    # A single group that is shorter than its nominal size is one block with a masked tail.
    return dtype in (torch.float16, torch.bfloat16) and size != 0 and in_features > 0


def choose_schedule(m: int, n: int, k: int, group_size: int, device: torch.device) -> Schedule:
    """A schedule for a shape, by rule: fill the GPU about twice, in as few K slices as that takes.

    Args:
        m: tokens.
        n: outputs.
        k: inputs.
        group_size: g, or -1.
        device: a CUDA device.
    """
    block_m = 16 if m <= 16 else 32 if m <= 32 else 64
    block_n = 64 if m <= 64 else 128
    tiles = -(-m // block_m) * -(-n // block_n)
    blocks = -(-k // _GROUP_BLOCKS[group_size])
    wanted = 2 * torch.cuda.get_device_properties(device).multi_processor_count // max(1, tiles)
    split_k = 1
    while split_k * 2 <= min(wanted, blocks // 2, 16):
        split_k *= 2
    return Schedule(block_m, block_n, split_k)


def launch(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    input_perm: torch.Tensor | None,
    bias: torch.Tensor | None,
    group_size: int,
    out: torch.Tensor,
    schedule: Schedule,
) -> None:
    """Run the kernel.

    Args:
        x: fp16 or bf16 ``[M, K]``, any strides.
        packed, scale, zero, input_perm, bias, group_size: as in `w4a16_linear`.
        out: ``[M, N]`` contiguous, in the dtype of x; every element is written.
        schedule: how the product is cut.
    """
    (m, k), n = x.shape, packed.shape[0]
    if m == 0 or n == 0:
        return
    block_k = _GROUP_BLOCKS[group_size]
    blocks = triton.cdiv(k, block_k)
    split_k = min(schedule.split_k, blocks)
    partials = out if split_k == 1 else torch.empty((split_k, m, n), dtype=torch.float32, device=x.device)
    num_n = triton.cdiv(n, schedule.block_n)
    grid = (num_n * triton.cdiv(m, schedule.block_m), split_k)
    _w4a16_kernel[grid](
        x,
        packed.contiguous(),
        scale.contiguous(),
        zero if zero is None else zero.contiguous(),
        input_perm,
        bias if split_k == 1 else None,
        partials,
        m,
        n,
        k // int4.NIBBLES_PER_WORD,
        num_n,
        triton.cdiv(blocks, split_k),
        x.stride(0),
        x.stride(1),
        scale.shape[1],
        ONE_GROUP=group_size == -1,
        BM=schedule.block_m,
        BN=schedule.block_n,
        BK=block_k,
        num_warps=schedule.num_warps,
        num_stages=schedule.num_stages,
    )
    if split_k > 1:
        block = 1024
        _reduce_kernel[(triton.cdiv(m * n, block),)](
            partials, bias, out, m * n, n, SPLIT_K=split_k, BLOCK=block, num_warps=4
        )


# Sizes that are not specialised on, so that a new shape seldom means a new kernel. `words` and the strides of
# x are: whether they are multiples of 16 or 1 decides how wide the loads can be.
_RUNTIME_SIZES = ["M", "N", "num_n", "blocks_per_split", "groups"]


@triton.jit(do_not_specialize=_RUNTIME_SIZES)
def _w4a16_kernel(
    p_x,
    p_packed,
    p_scale,
    p_zero,
    p_perm,
    p_bias,
    p_out,
    M,
    N,
    words,
    num_n,
    blocks_per_split,
    s_xm,
    s_xk,
    groups,
    ONE_GROUP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """out[i_k] = (W x^T)^T over one slice of K.

    x [M, K], packed [N, words = K/8], scale and zero [N, groups].

    The product is transposed so that the weights stand on the wide side of the matrix instruction and few
    tokens cost little. ``q - z`` is exact in 16 bits; the scale multiplies fp32 sums over a block, which lies
    within one group.
    """
    i_tile = tl.program_id(0)
    i_k = tl.program_id(1)
    o_n = (i_tile % num_n) * BN + tl.arange(0, BN)
    o_m = (i_tile // num_n) * BM + tl.arange(0, BM)
    m_n = o_n < N
    m_m = o_m < M
    # Rows of x, weights and results may lie beyond 2^31 elements.
    o_n64 = o_n.to(tl.int64)
    o_m64 = o_m.to(tl.int64)
    o_shift = tl.arange(0, 8) * 4

    b_acc = tl.zeros((BN, BM), dtype=tl.float32)
    first = i_k * blocks_per_split
    last = tl.minimum(first + blocks_per_split, tl.cdiv(words, BK // 8))
    for i_block in range(first, last):
        o_word = i_block * (BK // 8) + tl.arange(0, BK // 8)
        o_k = i_block * BK + tl.arange(0, BK)
        m_k = o_k < words * 8
        b_words = tl.load(
            p_packed + o_n64[:, None] * words + o_word[None, :],
            mask=m_n[:, None] & (o_word < words)[None, :],
            other=0,
        )
        # [BN, BK/8] words -> [BN, BK] nibbles, k ascending
        b_q = tl.reshape((b_words[:, :, None] >> o_shift[None, None, :]) & 15, (BN, BK))

        o_group = o_n64 * groups + (0 if ONE_GROUP else i_block)
        b_scale = tl.load(p_scale + o_group, mask=m_n, other=0.0).to(tl.float32)
        if p_zero is None:
            b_q = b_q - 8
        else:
            b_q = b_q - tl.load(p_zero + o_group, mask=m_n, other=0).to(tl.int32)[:, None]

        o_x = o_k
        if p_perm is not None:
            o_x = tl.load(p_perm + o_k, mask=m_k, other=0)
        b_x = tl.load(
            p_x + o_m64[None, :] * s_xm + o_x.to(tl.int64)[:, None] * s_xk,
            mask=m_k[:, None] & m_m[None, :],
            other=0.0,
        )
        # [BN, BK] @ [BK, BM] -> [BN, BM]
        b_acc += tl.dot(b_q.to(b_x.dtype), b_x) * b_scale[:, None]

    if p_bias is not None:
        b_acc += tl.load(p_bias + o_n, mask=m_n, other=0.0).to(tl.float32)[:, None]
    o_out = (i_k.to(tl.int64) * M + o_m64)[None, :] * N + o_n64[:, None]
    tl.store(p_out + o_out, b_acc.to(p_out.dtype.element_ty), mask=m_n[:, None] & m_m[None, :])


@triton.jit(do_not_specialize=["N"])
def _reduce_kernel(p_partials, p_bias, p_out, size, N, SPLIT_K: tl.constexpr, BLOCK: tl.constexpr):
    """out = sum of partials [SPLIT_K, size] in ascending order, plus bias; size = M N."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < size
    b_acc = tl.zeros((BLOCK,), dtype=tl.float32)
    for i in range(SPLIT_K):
        b_acc += tl.load(p_partials + i * tl.cast(size, tl.int64) + o, mask=m, other=0.0)
    if p_bias is not None:
        b_acc += tl.load(p_bias + o % N, mask=m, other=0.0).to(tl.float32)
    tl.store(p_out + o, b_acc.to(p_out.dtype.element_ty), mask=m)
