"""The W4A16 kernel for few tokens (M <= 16) on Hopper: SplitK (arXiv:2402.00025), bound by memory.

The product is transposed, ``out^T = W x^T``, so that the 16 rows of the matrix instruction are weights and
its 8 columns are tokens. A program multiplies BN rows with a slice of K: it keeps its part of x in shared
memory and streams tiles of weights through registers, STAGES of them in flight. The weights of the first
stages are requested before the kernel waits for the one before it (programmatic dependent launch), which
hides most of what a small matrix costs beyond its bytes. The fp32 sums of the slices go through a workspace;
the program that arrives last adds them in ascending order, so the same input gives the same bits.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from .w4a16_gluon import (
    barrier,
    copy_to_shared,
    launch_dependents,
    load_groups,
    operand_32,
    quarter_layout,
    split_words,
    store_sum,
    wait_for_previous,
    words_layout,
    zero_constants,
)

_UNSPECIALIZED = ["M", "k_tiles"]


@gluon.jit
def _multiply_tile(
    b_acc,
    b_words,
    b_scales,
    b_zeros,
    s_x,
    GROUPS: gl.constexpr,
    HAS_ZERO: gl.constexpr,
    QUARTER: gl.constexpr,
):
    """acc + W x^T of one tile; W [BN, 128] as words, x [BM, 128] in shared memory."""
    ACC: gl.constexpr = b_acc.type.layout
    dtype: gl.constexpr = s_x.dtype
    # One group per row: partial sums need no scale yet, and all four quarters of a tile share their zeros.
    SUMS: gl.constexpr = GROUPS if GROUPS > 0 else 1
    b_quarters = split_words(b_words)
    if GROUPS == 0:
        b_sum = b_acc
    for i in gl.static_range(SUMS):
        if GROUPS > 0:
            b_sum = gl.zeros(b_acc.shape, gl.float32, layout=ACC)
        if HAS_ZERO:
            b_zero = b_zeros[i].to(gl.int32)
        else:
            b_zero = gl.full((b_acc.shape[0],), 8, gl.int32, layout=gl.SliceLayout(1, QUARTER))
        b_constants = zero_constants(b_zero, dtype)
        for quarter in gl.static_range(i * (4 // SUMS), (i + 1) * (4 // SUMS)):
            b_w = gl.convert_layout(b_quarters[quarter], QUARTER)
            b_w = operand_32(b_w, b_constants, dtype, gl.DotOperandLayout(0, ACC, 2))
            b_x = s_x.slice(32 * quarter, 32, dim=1).permute((1, 0)).load(gl.DotOperandLayout(1, ACC, 2))
            # [BN, 32] @ [32, BM] -> [BN, BM]
            b_sum = mma_v2(b_w, b_x, b_sum)
        if GROUPS > 0:
            b_acc += b_sum * gl.expand_dims(b_scales[i].to(gl.float32), 1)
    if GROUPS == 0:
        b_acc = b_sum
    return b_acc


@gluon.constexpr_function
def _accumulator_layout(num_warps):
    """Layout of out^T ``[BN, BM]``."""
    return gl.NVMMADistributedLayout([2, 0], [num_warps, 1], [16, 8])


@gluon.constexpr_function
def _inputs_layout(num_warps):
    """Layout in which tiles of x ``[BM, 128]`` are copied."""
    return gl.BlockedLayout([1, 8], [2, 16], [num_warps, 1], [1, 0])


@gluon.jit
def _multiply_slice(
    p_x,
    p_tiles,
    p_scale,
    p_zero,
    p_bias,
    p_out,
    p_partials,
    p_arrived,
    o_x,
    m_x,
    o_m,
    M,
    N,
    k_tiles,
    s_group,
    BM: gl.constexpr,
    BN: gl.constexpr,
    TILES: gl.constexpr,
    SPLIT_K: gl.constexpr,
    STAGES: gl.constexpr,
    GROUPS: gl.constexpr,
):
    """This program's part of out = x W^T + bias, for BM rows of x.

    Args as in `skinny_kernel`, and: where the rows of x begin, which of them there are, and which rows of
    out are theirs (M and above: none).
    """
    NUM_WARPS: gl.constexpr = gl.num_warps()
    WORDS: gl.constexpr = words_layout(BN, NUM_WARPS)
    QUARTER: gl.constexpr = quarter_layout(BN, NUM_WARPS)
    ACC: gl.constexpr = _accumulator_layout(NUM_WARPS)
    HAS_ZERO: gl.constexpr = p_zero is not None
    dtype: gl.constexpr = p_x.dtype.element_ty
    i_n = gl.program_id(0)
    i_k = gl.program_id(1)
    first = i_k * TILES
    count = gl.minimum(k_tiles - first, TILES)

    # Rows beyond N are read from the last row and never written.
    o_row = gl.arange(0, BN, layout=gl.SliceLayout(1, WORDS))
    i_block = gl.minimum(i_n * (BN // 64) + o_row // 64, N // 64 - 1) - i_n * (BN // 64)
    o_words = gl.expand_dims(i_block * (k_tiles * 1024) + o_row % 64 * 16, 1)
    o_words += gl.expand_dims(gl.arange(0, 16, layout=gl.SliceLayout(0, WORDS)), 0)
    p_tiles += (i_n * (BN // 64)).to(gl.int64) * (k_tiles * 1024) + first.to(gl.int64) * 1024
    o_scale = gl.minimum(i_n * BN + gl.arange(0, BN, layout=gl.SliceLayout(1, ACC)), N - 1)
    o_zero = gl.minimum(i_n * BN + gl.arange(0, BN, layout=gl.SliceLayout(1, QUARTER)), N - 1)

    b_words = ()
    b_scales = ()
    b_zeros = ()
    for stage in gl.static_range(STAGES):
        m = stage < count
        b_words += (
            gl.load(p_tiles + o_words + stage * 1024, mask=m, other=0, eviction_policy="evict_first"),
        )
        b_scales += (load_groups(p_scale, o_scale, (first + stage) * GROUPS, s_group, m, GROUPS, 1.0),)
        b_zeros += (load_groups(p_zero, o_zero, (first + stage) * GROUPS, s_group, m, GROUPS, 8),)
    if GROUPS == 0:
        b_row_scale = gl.load(p_scale + o_scale)
        if HAS_ZERO:
            b_row_zero = (gl.load(p_zero + o_zero),)
        else:
            b_row_zero = (8,)

    wait_for_previous()
    X: gl.constexpr = _inputs_layout(NUM_WARPS)
    s_x = gl.allocate_shared_memory(dtype, [TILES, BM, 128], gl.SwizzledSharedLayout(8, 1, 8, [1, 0]))
    o_k = first * 128 + gl.arange(0, 128, layout=gl.SliceLayout(0, X))
    o_xm = gl.expand_dims(o_x, 1)
    for tile in gl.static_range(TILES):
        m_row = gl.expand_dims(m_x & (tile < count), 1)
        copy_to_shared(s_x.index(tile), p_x + o_xm + gl.expand_dims(o_k + tile * 128, 0), mask=m_row)
        async_copy.commit_group()

    b_acc = gl.zeros((BN, BM), gl.float32, layout=ACC)
    rounds = count // STAGES
    for i_round in range(rounds):
        # One (empty) group is committed for every tile that is used up, so the oldest STAGES of the
        # outstanding groups are always the tiles of x that this round reads.
        async_copy.wait_group(TILES - STAGES)
        barrier()
        next_words = ()
        next_scales = ()
        next_zeros = ()
        for stage in gl.static_range(STAGES):
            async_copy.commit_group()
            i = i_round * STAGES + stage
            zeros = b_row_zero if GROUPS == 0 else b_zeros[stage]
            b_acc = _multiply_tile(
                b_acc, b_words[stage], b_scales[stage], zeros, s_x.index(i), GROUPS, HAS_ZERO, QUARTER
            )
            i += STAGES
            m = i < count
            next_words += (
                gl.load(p_tiles + o_words + i * 1024, mask=m, other=0, eviction_policy="evict_first"),
            )
            next_scales += (load_groups(p_scale, o_scale, (first + i) * GROUPS, s_group, m, GROUPS, 1.0),)
            next_zeros += (load_groups(p_zero, o_zero, (first + i) * GROUPS, s_group, m, GROUPS, 8),)
        b_words = next_words
        b_scales = next_scales
        b_zeros = next_zeros
    async_copy.wait_group(0)
    barrier()
    for stage in gl.static_range(STAGES - 1):
        i = rounds * STAGES + stage
        if i < count:
            zeros = b_row_zero if GROUPS == 0 else b_zeros[stage]
            b_acc = _multiply_tile(
                b_acc, b_words[stage], b_scales[stage], zeros, s_x.index(i), GROUPS, HAS_ZERO, QUARTER
            )

    if GROUPS == 0:
        b_acc *= gl.expand_dims(b_row_scale.to(gl.float32), 1)
    store_sum(b_acc, i_n * BN, o_m, i_k, i_n, p_bias, p_out, p_partials, p_arrived, M, N, SPLIT_K, ACC)


@gluon.jit(do_not_specialize=_UNSPECIALIZED)
def skinny_kernel(
    p_x,
    p_tiles,
    p_scale,
    p_zero,
    p_bias,
    p_out,
    p_partials,
    p_arrived,
    M,
    N,
    k_tiles,
    s_xm,
    s_group,
    BM: gl.constexpr,
    BN: gl.constexpr,
    TILES: gl.constexpr,
    SPLIT_K: gl.constexpr,
    STAGES: gl.constexpr,
    GROUPS: gl.constexpr,
):
    """out [M, N] = x W^T + bias, for M <= BM.

    x [M, K] with unit stride along K; tiles [N/64, k_tiles, 64, 16] words, k_tiles = K/128; scale and zero
    [groups, N] with stride s_group; partials [SPLIT_K, M, N] fp32; arrived [N/BN] int32, zero before and
    after. Grid (ceil(N/BN), SPLIT_K); a program takes TILES tiles of K, at least STAGES. GROUPS: groups of a
    tile, 0 for one per row.
    """
    launch_dependents()
    o_row = gl.arange(0, BM, layout=gl.SliceLayout(1, _inputs_layout(gl.num_warps())))
    _multiply_slice(
        p_x,
        p_tiles,
        p_scale,
        p_zero,
        p_bias,
        p_out,
        p_partials,
        p_arrived,
        o_row.to(gl.int64) * s_xm,
        o_row < M,
        gl.arange(0, BM, layout=gl.SliceLayout(0, _accumulator_layout(gl.num_warps()))),
        M,
        N,
        k_tiles,
        s_group,
        BM,
        BN,
        TILES,
        SPLIT_K,
        STAGES,
        GROUPS,
    )


@gluon.constexpr_function
def _slots_layout(size, num_warps):
    """Layout of a vector of which every warp holds all, so that none needs another one to search it."""
    bits = [[1 << i] for i in range(size.bit_length() - 1)]
    return gl.DistributedLinearLayout(bits[5:], bits[:5], [[0]] * (num_warps.bit_length() - 1), [], [size])


@gluon.jit
def _slots_of(o_x, o_m, p_expert, expert, i_slot, slots, SEARCH: gl.constexpr):
    """The slots of a program's rows, ``slots`` for rows without one, and whether the program has any.

    Of the slots of one expert the first takes as many as a program has rows, and so does the next one after
    them; programs of the slots in between have nothing to do. Without SEARCH every slot is alone.
    """
    b_x = gl.where(o_x == 0, i_slot, slots)
    b_m = gl.where(o_m == 0, i_slot, slots)
    is_first = True
    if SEARCH > 0:
        BM: gl.constexpr = o_m.shape[0]
        o_s = gl.arange(0, SEARCH, layout=_slots_layout(SEARCH, gl.num_warps()))
        m_same = (o_s < slots) & (gl.load(p_expert + o_s, mask=o_s < slots, other=0) == expert)
        is_first = gl.sum((m_same & (o_s < i_slot)).to(gl.int32)) % BM == 0
        next_slot = i_slot
        for row in gl.static_range(1, BM):
            next_slot = gl.min(gl.where(m_same & (o_s > next_slot), o_s, slots))
            b_x = gl.where(o_x == row, next_slot, b_x)
            b_m = gl.where(o_m == row, next_slot, b_m)
    return b_x, b_m, is_first


@gluon.jit
def _store_zeros(p_row, first_n, N, BN: gl.constexpr):
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    o_n = first_n + gl.arange(0, BN, layout=LAYOUT)
    gl.store(p_row + o_n, gl.zeros((BN,), p_row.dtype.element_ty, layout=LAYOUT), mask=o_n < N)


@gluon.jit(do_not_specialize=["slots", "experts", "slots_per_row", "k_tiles"])
def experts_kernel(
    p_x,
    p_tiles,
    p_scale,
    p_zero,
    p_expert,
    p_bias,
    p_out,
    p_partials,
    p_arrived,
    slots,
    experts,
    slots_per_row,
    N,
    k_tiles,
    s_xm,
    s_expert,
    BM: gl.constexpr,
    BN: gl.constexpr,
    TILES: gl.constexpr,
    SPLIT_K: gl.constexpr,
    STAGES: gl.constexpr,
    GROUPS: gl.constexpr,
    SEARCH: gl.constexpr,
):
    """out[s] = x[s // slots_per_row] W[expert[s]]^T + bias[expert[s]]; zeros for an expert that is not there.

    As `skinny_kernel`, with tiles [experts, N/64, k_tiles, 64, 16]; scale and zero [experts, groups, N], an
    expert's s_expert elements apart; expert integer [slots]; bias [experts, N]; partials [SPLIT_K, slots, N];
    arrived [slots, ceil(N/BN)]. Grid (ceil(N/BN), SPLIT_K, slots). SEARCH: a power of two from 32 and from
    the number of slots on, with which slots of the same expert share its weights; 0 if each reads its own.
    """
    launch_dependents()
    # The previous kernel may be the one that chooses the experts.
    wait_for_previous()
    i_slot = gl.program_id(2)
    expert = gl.load(p_expert + i_slot).to(gl.int64)
    if (expert >= 0) & (expert < experts):
        o_x = gl.arange(0, BM, layout=gl.SliceLayout(1, _inputs_layout(gl.num_warps())))
        o_m = gl.arange(0, BM, layout=gl.SliceLayout(0, _accumulator_layout(gl.num_warps())))
        b_x, b_m, is_first = _slots_of(o_x, o_m, p_expert, expert, i_slot, slots, SEARCH)
        if is_first:
            _multiply_slice(
                p_x,
                p_tiles + expert * (N // 64) * k_tiles * 1024,
                p_scale + expert * s_expert,
                None if p_zero is None else p_zero + expert * s_expert,
                None if p_bias is None else p_bias + expert * N,
                p_out,
                p_partials,
                p_arrived + i_slot * gl.num_programs(0),
                (b_x // slots_per_row).to(gl.int64) * s_xm,
                b_x < slots,
                b_m,
                slots,
                N,
                k_tiles,
                N,
                BM,
                BN,
                TILES,
                SPLIT_K,
                STAGES,
                GROUPS,
            )
    elif gl.program_id(1) == 0:
        _store_zeros(p_out + i_slot.to(gl.int64) * N, gl.program_id(0) * BN, N, BN)
