"""The W4A16 kernel for 9 to some hundreds of tokens on Hopper: warp-specialized.

The product is transposed, ``out^T = W x^T``: weights are the A operand of `wgmma`, straight from the
registers in which they were unpacked, and x is the B operand in shared memory. One warp fetches tiles of x
by TMA into a ring; two warpgroups of 64 rows each take turns: while the product of one runs, the other
unpacks its next tile of weights. The fp32 sum over a group is scaled and added to the accumulator
(promotion), so the weights are never rounded. For few tokens K is split as in `w4a16_skinny`.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .w4a16_gluon import (
    block_of_expert,
    copy_block_to_shared,
    launch_dependents,
    load_groups,
    operand_32,
    operand_64,
    place_of_program,
    quarter_layout,
    split_words,
    store_rows,
    store_sum,
    wait_for_previous,
    words_layout,
    zero_constants,
)

# Of the two consumer warpgroups; with 24 for the producer's they fill the register file. With few tokens two
# programs can share it, which then are compiled with `TWO_PROGRAMS`.
CONSUMER_REGISTERS = gl.constexpr(240)
_HALF_CONSUMER_REGISTERS = gl.constexpr(104)
PRODUCER_REGISTERS = gl.constexpr(24)
TWO_PROGRAMS = {"maxnreg": 80}
UNSPECIALIZED = ["M", "k_tiles", "n_tiles", "m_tiles", "tiles_per_split", "experts"]


@gluon.jit
def _operands(
    b_words, b_zeros, GROUPS: gl.constexpr, HAS_ZERO: gl.constexpr, ACC: gl.constexpr, dtype: gl.constexpr
):
    """A tile's words [64, 16] -> the operands of its products: four of 32 inputs, or two of 64."""
    QUARTER: gl.constexpr = quarter_layout(64, 4)
    A: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    b_quarters = split_words(b_words)
    operands = ()
    PARTS: gl.constexpr = 4 if GROUPS == 4 else 2
    for part in gl.static_range(PARTS):
        if HAS_ZERO:
            b_zero = b_zeros[part * GROUPS // PARTS].to(gl.int32)
        else:
            b_zero = gl.full((64,), 8, gl.int32, layout=gl.SliceLayout(1, QUARTER))
        b_constants = zero_constants(b_zero, dtype)
        if PARTS == 4:
            b_q = gl.convert_layout(b_quarters[part], QUARTER)
            operands += (operand_32(b_q, b_constants, dtype, A),)
        else:
            b_q = gl.convert_layout(b_quarters[2 * part], QUARTER)
            b_next = gl.convert_layout(b_quarters[2 * part + 1], QUARTER)
            operands += (operand_64(b_q, b_next, b_constants, dtype, A),)
    return operands


@gluon.jit
def load_tile(
    p_tiles,
    o_words,
    p_scale,
    o_scale,
    p_zero,
    o_zero,
    first,
    i,
    count,
    s_group,
    GROUPS: gl.constexpr,
):
    m = i < count
    b_words = gl.load(p_tiles + o_words + i * 1024, mask=m, other=0, eviction_policy="evict_first")
    b_scales = load_groups(p_scale, o_scale, (first + i) * GROUPS, s_group, m, GROUPS, 1.0)
    b_zeros = load_groups(p_zero, o_zero, (first + i) * GROUPS, s_group, m, GROUPS, 8)
    return b_words, b_scales, b_zeros


@gluon.jit
def _multiply_tile(b_acc, b_operands, b_scales, s_x, s_full, s_empty, i, GROUPS: gl.constexpr):
    """acc + W x^T of tile i, whose x is or will be in the ring; frees its slot."""
    ACC: gl.constexpr = b_acc.type.layout
    SLOTS: gl.constexpr = s_x.shape[0]
    # One group per row: partial sums need no scale yet.
    SUMS: gl.constexpr = GROUPS if GROUPS > 0 else 1
    PARTS: gl.constexpr = len(b_operands)
    WIDTH: gl.constexpr = 128 // PARTS
    slot = i % SLOTS
    mbarrier.wait(s_full.index(slot), (i // SLOTS) & 1)
    x = s_x.index(slot)
    for i_sum in gl.static_range(SUMS):
        b_sum = b_acc if GROUPS == 0 else gl.zeros(b_acc.shape, gl.float32, layout=ACC)
        for part in gl.static_range(i_sum * (PARTS // SUMS), (i_sum + 1) * (PARTS // SUMS)):
            b_x = x.slice(part * WIDTH, WIDTH, dim=1).permute((1, 0))
            # [64, WIDTH] @ [WIDTH, BM] -> [64, BM]
            is_continued = GROUPS == 0 or part > i_sum * (PARTS // SUMS)
            b_sum = warpgroup_mma(b_operands[part], b_x, b_sum, use_acc=is_continued, is_async=True)
        busy = (b_sum,)
        busy += b_operands
        b_sum = warpgroup_mma_wait(0, deps=busy)[0]
        if GROUPS == 0:
            b_acc = b_sum
        else:
            b_acc += b_sum * gl.expand_dims(b_scales[i_sum].to(gl.float32), 1)
    mbarrier.arrive(s_empty.index(slot), count=1)
    return b_acc


@gluon.jit
def _consume(
    i_warpgroup,
    weights,
    results,
    ring,
    sizes,
    place,
    SPLIT_K: gl.constexpr,
    STAGES: gl.constexpr,
    GROUPS: gl.constexpr,
):
    """One warpgroup's 64 rows."""
    p_tiles, p_scale, p_zero = weights
    p_slots, p_bias, p_out, p_partials, p_arrived = results
    s_x, s_full, s_empty = ring
    M, N, k_tiles, s_group = sizes
    i_n, first_m, i_tile, i_k, first, count = place
    BM: gl.constexpr = s_x.shape[1]
    dtype: gl.constexpr = s_x.dtype
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])
    WORDS: gl.constexpr = words_layout(64, 4)
    QUARTER: gl.constexpr = quarter_layout(64, 4)
    HAS_ZERO: gl.constexpr = p_zero is not None

    # Rows beyond N are read from the last tile and never written.
    i_block = i_n * 2 + i_warpgroup
    first_n = i_block * 64
    p_tiles += gl.minimum(i_block, N // 64 - 1).to(gl.int64) * (k_tiles * 1024) + first.to(gl.int64) * 1024
    o_words = gl.expand_dims(gl.arange(0, 64, layout=gl.SliceLayout(1, WORDS)) * 16, 1)
    o_words += gl.expand_dims(gl.arange(0, 16, layout=gl.SliceLayout(0, WORDS)), 0)
    o_scale = gl.minimum(first_n + gl.arange(0, 64, layout=gl.SliceLayout(1, ACC)), N - 1)
    o_zero = gl.minimum(first_n + gl.arange(0, 64, layout=gl.SliceLayout(1, QUARTER)), N - 1)
    if GROUPS == 0:
        b_row_scale = gl.load(p_scale + o_scale)
        if HAS_ZERO:
            b_row_zero = (gl.load(p_zero + o_zero),)
        else:
            b_row_zero = (8,)

    b_words = ()
    b_scales = ()
    b_zeros = ()
    for stage in gl.static_range(STAGES):
        b_w, b_s, b_z = load_tile(
            p_tiles,
            o_words,
            p_scale,
            o_scale,
            p_zero,
            o_zero,
            first,
            stage,
            count,
            s_group,
            GROUPS,
        )
        b_words += (b_w,)
        b_scales += (b_s,)
        b_zeros += (b_z,)

    b_acc = gl.zeros((64, BM), gl.float32, layout=ACC)
    rounds = count // STAGES
    for i_round in range(rounds):
        next_words = ()
        next_scales = ()
        next_zeros = ()
        for stage in gl.static_range(STAGES):
            i = i_round * STAGES + stage
            zeros = b_row_zero if GROUPS == 0 else b_zeros[stage]
            b_operands = _operands(b_words[stage], zeros, GROUPS, HAS_ZERO, ACC, dtype)
            ahead = i + STAGES
            b_w, b_s, b_z = load_tile(
                p_tiles,
                o_words,
                p_scale,
                o_scale,
                p_zero,
                o_zero,
                first,
                ahead,
                count,
                s_group,
                GROUPS,
            )
            b_acc = _multiply_tile(b_acc, b_operands, b_scales[stage], s_x, s_full, s_empty, i, GROUPS)
            next_words += (b_w,)
            next_scales += (b_s,)
            next_zeros += (b_z,)
        b_words = next_words
        b_scales = next_scales
        b_zeros = next_zeros
    for stage in gl.static_range(STAGES - 1):
        i = rounds * STAGES + stage
        if i < count:
            zeros = b_row_zero if GROUPS == 0 else b_zeros[stage]
            b_operands = _operands(b_words[stage], zeros, GROUPS, HAS_ZERO, ACC, dtype)
            b_acc = _multiply_tile(b_acc, b_operands, b_scales[stage], s_x, s_full, s_empty, i, GROUPS)

    if GROUPS == 0:
        b_acc *= gl.expand_dims(b_row_scale.to(gl.float32), 1)
    wait_for_previous()
    if SPLIT_K > 1:
        store_sum(
            b_acc,
            first_n,
            first_m + gl.arange(0, BM, layout=gl.SliceLayout(0, ACC)),
            i_k,
            i_tile * 2 + i_warpgroup,
            p_bias,
            p_out,
            p_partials,
            p_arrived,
            M,
            N,
            SPLIT_K,
            ACC,
        )
    else:
        store_rows(b_acc, first_n, first_m, count > 0, p_bias, p_slots, p_out, M, N)


@gluon.jit
def allocate_ring(d_x, BM: gl.constexpr, SLOTS: gl.constexpr):
    """Room for SLOTS tiles of x, and the barriers that say which are filled and which are used."""
    s_x = gl.allocate_shared_memory(d_x.dtype, [SLOTS, BM, 128], d_x.layout)
    s_full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    s_empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(SLOTS):
        mbarrier.init(s_full.index(slot), count=1)
        mbarrier.init(s_empty.index(slot), count=2)
    return s_x, s_full, s_empty


@gluon.jit
def produce(d_x, ring, first_m, first, count):
    """Fetch tiles of x [BM, 128] into the ring."""
    s_x, s_full, s_empty = ring
    SLOTS: gl.constexpr = s_x.shape[0]
    BYTES: gl.constexpr = s_x.shape[1] * 128 * 2
    wait_for_previous()
    for i in range(count):
        slot = i % SLOTS
        mbarrier.wait(s_empty.index(slot), (i // SLOTS) & 1 ^ 1)
        mbarrier.expect(s_full.index(slot), BYTES)
        copy_block_to_shared(d_x, [first_m, (first + i) * 128], s_full.index(slot), s_x.index(slot))


@gluon.jit(do_not_specialize=UNSPECIALIZED)
def wide_kernel(
    d_x,
    p_tiles,
    p_scale,
    p_zero,
    p_blocks,
    p_slots,
    p_bias,
    p_out,
    p_partials,
    p_arrived,
    M,
    N,
    k_tiles,
    n_tiles,
    m_tiles,
    tiles_per_split,
    s_group,
    experts,
    BM: gl.constexpr,
    SPLIT_K: gl.constexpr,
    STAGES: gl.constexpr,
    SLOTS: gl.constexpr,
    GROUPS: gl.constexpr,
    HALF: gl.constexpr,
):
    """out [M, N] = x W^T + bias.

    d_x: TMA descriptor of x [M, K], blocks of [BM, 128]. The other tensors are those of `skinny_kernel`, with
    arrived [m_tiles n_tiles 2]. Grid (m_tiles n_tiles, SPLIT_K), m_tiles = ceil(M/BM), n_tiles = ceil(N/128);
    a program takes tiles_per_split tiles of K. STAGES tiles of weights are in flight.
    HALF: half of a processor's registers have to do.

    With the blocks and slots of `w4a16_routing` there are m_tiles blocks of rows instead, of one expert each:
    the weights are [experts, ...], and row r of x, sorted by expert, is for row slots[r] of out. Then K is
    not split.
    """
    launch_dependents()
    i_k = gl.program_id(1)
    i_n, i_m = place_of_program(n_tiles, m_tiles)
    i_tile = i_m * n_tiles + i_n
    first = i_k * tiles_per_split
    count = gl.minimum(k_tiles - first, tiles_per_split)
    first_m = i_m * BM
    if p_blocks is not None:
        expert, first_m, M, has_product = block_of_expert(p_blocks, i_m, experts)
        count = gl.where(has_product, count, 0)
        p_tiles += expert * (N // 64) * k_tiles * 1024
        first_group = expert * N * (k_tiles * GROUPS if GROUPS > 0 else 1)
        p_scale += first_group
        if p_zero is not None:
            p_zero += first_group
        if p_bias is not None:
            p_bias += expert * N
    ring = allocate_ring(d_x, BM, SLOTS)
    weights = (p_tiles, p_scale, p_zero)
    results = (p_slots, p_bias, p_out, p_partials, p_arrived)
    sizes = (M, N, k_tiles, s_group)
    place = (i_n, first_m, i_tile, i_k, first, count)
    gl.warp_specialize(
        [
            (_consume, (0, weights, results, ring, sizes, place, SPLIT_K, STAGES, GROUPS)),
            (_consume, (1, weights, results, ring, sizes, place, SPLIT_K, STAGES, GROUPS)),
            (produce, (d_x, ring, first_m, first, count)),
        ],
        [4, 1],
        [_HALF_CONSUMER_REGISTERS if HALF else CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )
