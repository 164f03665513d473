"""The W4A16 kernel for hundreds of tokens and more on Hopper: bound by tensor cores.

As `w4a16_wide`, but a program has 256 rows of weights, so that x is read half as often: with 128 the L2 cache
is what one waits for. Each of two warpgroups has two halves of 64 rows and works on one while the tensor
cores work on the other. There are no registers left for the sum of a group beside that of all groups, so the
sum is kept in units of the current group's scale: before a group's product is added, it is multiplied by the
previous scale and divided by the new one, in fp32, and the weights are never rounded here either.
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
    launch_dependents,
    load_group_words,
    operand_32,
    operand_64,
    place_of_program,
    quarter_layout,
    rows_layout,
    split_words,
    store_rows,
    store_sum,
    value_of_word,
    wait_for_previous,
    words_layout,
    zero_constants,
)
from .w4a16_wide import CONSUMER_REGISTERS, PRODUCER_REGISTERS, UNSPECIALIZED, allocate_ring, produce

# Nobody can divide by 0. A group with a scale this small adds nothing that an fp32 sum would notice.
_SMALLEST_SCALE = gl.constexpr(2.0**-64)


@gluon.jit
def _unit_of_group(b_word, o_rows, SCALE: gl.constexpr):
    """The scale of a group in fp32, and nothing smaller than what can be divided by."""
    b_scale = value_of_word(b_word, o_rows, SCALE).to(gl.float32)
    return gl.where(gl.abs(b_scale) < _SMALLEST_SCALE, _SMALLEST_SCALE, b_scale)


@gluon.jit
def _divide(b_above, b_below):
    """Rounded to nearest, without branches, for numbers and quotients that are normal."""
    b_inverse = gl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [b_below], dtype=gl.float32, is_pure=True, pack=1
    )
    b_inverse = gl.fma(gl.fma(-b_below, b_inverse, 1.0), b_inverse, b_inverse)
    b_quotient = b_above * b_inverse
    return gl.fma(gl.fma(-b_below, b_quotient, b_above), b_inverse, b_quotient)


@gluon.jit
def _change_unit(
    b_acc,
    b_before,
    b_scales,
    part: gl.constexpr,
    PARTS: gl.constexpr,
    GROUPS: gl.constexpr,
    HAS_ZERO: gl.constexpr,
    SCALE: gl.constexpr,
):
    """The sum in units of the scale of a part's group; nothing to do within a group.

    b_before: the scales of the tile before, if this is the first part; the sum is in units of the last.
    """
    if GROUPS > 0 and part * GROUPS % PARTS == 0:
        i_group: gl.constexpr = part * GROUPS // PARTS
        o_rows = gl.arange(0, 64, layout=b_scales[i_group].type.layout)
        if i_group == 0:
            b_unit = _unit_of_group(b_before[GROUPS - 1], o_rows, SCALE)
        else:
            b_unit = _unit_of_group(b_scales[i_group - 1], o_rows, SCALE)
        b_scale = _unit_of_group(b_scales[i_group], o_rows, SCALE)
        # The quick division has a bias that would add up over hundreds of groups. Of the other two the one
        # with branches measures some percent faster without zeros, and slower with them.
        b_ratio = _divide(b_unit, b_scale) if HAS_ZERO else gl.div_rn(b_unit, b_scale)
        b_acc *= gl.expand_dims(b_ratio, 1)
    return b_acc


@gluon.jit
def _operand(
    b_words,
    b_zeros,
    part: gl.constexpr,
    PARTS: gl.constexpr,
    GROUPS: gl.constexpr,
    HAS_ZERO: gl.constexpr,
    A: gl.constexpr,
    dtype: gl.constexpr,
):
    """q - z of one part of a tile's inputs."""
    QUARTER: gl.constexpr = quarter_layout(64, 4)
    b_quarters = split_words(b_words)
    if HAS_ZERO:
        b_zero = value_of_word(
            b_zeros[part * GROUPS // PARTS], gl.arange(0, 64, layout=gl.SliceLayout(1, QUARTER)), gl.uint8
        )
    else:
        b_zero = gl.full((64,), 8, gl.int32, layout=gl.SliceLayout(1, QUARTER))
    b_constants = zero_constants(b_zero, dtype)
    if PARTS == 4:
        return operand_32(gl.convert_layout(b_quarters[part], QUARTER), b_constants, dtype, A)
    else:
        b_q = gl.convert_layout(b_quarters[2 * part], QUARTER)
        b_next = gl.convert_layout(b_quarters[2 * part + 1], QUARTER)
        return operand_64(b_q, b_next, b_constants, dtype, A)


@gluon.jit
def _load_tile(
    p_tiles, o_words, p_scale, o_scale, p_zero, o_zero, first, i, count, s_group, GROUPS: gl.constexpr
):
    """The words of tile i of 64 rows, and of its scales and zeros; beyond the last tile, its scales."""
    m = i < count
    b_words = gl.load(p_tiles + o_words + i * 1024, mask=m, other=0)
    first_group = (first + gl.minimum(i, count - 1)) * GROUPS
    b_scales = load_group_words(p_scale, o_scale, first_group, s_group, count > 0, GROUPS, 1.0)
    b_zeros = load_group_words(p_zero, o_zero, first_group, s_group, count > 0, GROUPS, 8)
    return b_words, b_scales, b_zeros


@gluon.jit
def _consume(
    i_warpgroup,
    weights,
    results,
    ring,
    sizes,
    place,
    SPLIT_K: gl.constexpr,
    GROUPS: gl.constexpr,
):
    """One warpgroup's 128 rows."""
    p_tiles, p_scale, p_zero = weights
    p_slots, p_bias, p_out, p_partials, p_arrived = results
    s_x, s_full, s_empty = ring
    M, N, k_tiles, s_group = sizes
    i_n, first_m, i_tile, i_k, first, count = place
    SLOTS: gl.constexpr = s_x.shape[0]
    BM: gl.constexpr = s_x.shape[1]
    dtype: gl.constexpr = s_x.dtype
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])
    A: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    WORDS: gl.constexpr = words_layout(64, 4)
    QUARTER: gl.constexpr = quarter_layout(64, 4)
    ROWS: gl.constexpr = gl.SliceLayout(1, ACC)
    HAS_ZERO: gl.constexpr = p_zero is not None
    SCALE: gl.constexpr = p_scale.dtype.element_ty
    PARTS: gl.constexpr = 4 if GROUPS == 4 else 2
    WIDTH: gl.constexpr = 128 // PARTS

    o_words = gl.expand_dims(gl.arange(0, 64, layout=gl.SliceLayout(1, WORDS)) * 16, 1)
    o_words += gl.expand_dims(gl.arange(0, 16, layout=gl.SliceLayout(0, WORDS)), 0)
    first_n = i_n * 256 + i_warpgroup * 128
    # Rows beyond N are read from the last tile and never written.
    last = N // 64 - 1
    i_block = first_n // 64
    p_tiles += first.to(gl.int64) * 1024
    p_tiles_0 = p_tiles + gl.minimum(i_block, last).to(gl.int64) * (k_tiles * 1024)
    p_tiles_1 = p_tiles + gl.minimum(i_block + 1, last).to(gl.int64) * (k_tiles * 1024)
    o_scale = first_n + gl.arange(0, 64, layout=ROWS)
    o_zero = first_n + gl.arange(0, 64, layout=gl.SliceLayout(1, QUARTER))
    o_scale_0 = gl.minimum(o_scale, N - 1)
    o_scale_1 = gl.minimum(o_scale + 64, N - 1)
    o_zero_0 = gl.minimum(o_zero, N - 1)
    o_zero_1 = gl.minimum(o_zero + 64, N - 1)

    b_words_0, b_scales_0, b_zeros_0 = _load_tile(
        p_tiles_0,
        o_words,
        p_scale,
        o_scale_0,
        p_zero,
        o_zero_0,
        first,
        gl.to_tensor(0),
        count,
        s_group,
        GROUPS,
    )
    b_words_1, b_scales_1, b_zeros_1 = _load_tile(
        p_tiles_1,
        o_words,
        p_scale,
        o_scale_1,
        p_zero,
        o_zero_1,
        first,
        gl.to_tensor(0),
        count,
        s_group,
        GROUPS,
    )
    if GROUPS == 0:
        if HAS_ZERO:
            b_zeros_0 = load_group_words(p_zero, o_zero_0, gl.to_tensor(0), s_group, True, 1, 8)
            b_zeros_1 = load_group_words(p_zero, o_zero_1, gl.to_tensor(0), s_group, True, 1, 8)
    b_sum_0 = gl.zeros((64, BM), gl.float32, layout=ACC)
    b_sum_1 = gl.zeros((64, BM), gl.float32, layout=ACC)
    b_a_0 = _operand(b_words_0, b_zeros_0, 0, PARTS, GROUPS, HAS_ZERO, A, dtype)
    for i in range(count):
        # At any time the product of one half runs while the sum and the operand of the other are made ready.
        # None runs at the end of a turn: the assembler would not follow it around the loop.
        slot = i % SLOTS
        x = s_x.index(slot)
        b_next_0, b_next_scales_0, b_next_zeros_0 = _load_tile(
            p_tiles_0, o_words, p_scale, o_scale_0, p_zero, o_zero_0, first, i + 1, count, s_group, GROUPS
        )
        b_next_1, b_next_scales_1, b_next_zeros_1 = _load_tile(
            p_tiles_1, o_words, p_scale, o_scale_1, p_zero, o_zero_1, first, i + 1, count, s_group, GROUPS
        )
        mbarrier.wait(s_full.index(slot), (i // SLOTS) & 1)
        b_x = x.slice(0, WIDTH, dim=1).permute((1, 0))
        b_acc_0 = warpgroup_mma(b_a_0, b_x, b_sum_0, is_async=True)
        b_a_1 = _operand(b_words_1, b_zeros_1, 0, PARTS, GROUPS, HAS_ZERO, A, dtype)
        b_acc_1 = warpgroup_mma(b_a_1, b_x, b_sum_1, is_async=True)
        for part in gl.static_range(1, PARTS):
            b_x = x.slice(part * WIDTH, WIDTH, dim=1).permute((1, 0))
            b_sum_0, b_a_0 = warpgroup_mma_wait(1, deps=(b_acc_0, b_a_0))
            b_sum_0 = _change_unit(b_sum_0, b_scales_0, b_scales_0, part, PARTS, GROUPS, HAS_ZERO, SCALE)
            b_a_0 = _operand(b_words_0, b_zeros_0, part, PARTS, GROUPS, HAS_ZERO, A, dtype)
            b_acc_0 = warpgroup_mma(b_a_0, b_x, b_sum_0, is_async=True)
            b_sum_1, b_a_1 = warpgroup_mma_wait(1, deps=(b_acc_1, b_a_1))
            b_sum_1 = _change_unit(b_sum_1, b_scales_1, b_scales_1, part, PARTS, GROUPS, HAS_ZERO, SCALE)
            b_a_1 = _operand(b_words_1, b_zeros_1, part, PARTS, GROUPS, HAS_ZERO, A, dtype)
            b_acc_1 = warpgroup_mma(b_a_1, b_x, b_sum_1, is_async=True)
        b_words_0, b_words_1 = b_next_0, b_next_1
        if GROUPS > 0 and HAS_ZERO:
            b_zeros_0, b_zeros_1 = b_next_zeros_0, b_next_zeros_1
        b_sum_0, b_a_0 = warpgroup_mma_wait(1, deps=(b_acc_0, b_a_0))
        b_sum_0 = _change_unit(b_sum_0, b_scales_0, b_next_scales_0, 0, PARTS, GROUPS, HAS_ZERO, SCALE)
        b_a_0 = _operand(b_words_0, b_zeros_0, 0, PARTS, GROUPS, HAS_ZERO, A, dtype)
        b_sum_1, b_a_1 = warpgroup_mma_wait(0, deps=(b_acc_1, b_a_1))
        b_sum_1 = _change_unit(b_sum_1, b_scales_1, b_next_scales_1, 0, PARTS, GROUPS, HAS_ZERO, SCALE)
        mbarrier.arrive(s_empty.index(slot), count=1)
        if GROUPS > 0:
            b_scales_0, b_scales_1 = b_next_scales_0, b_next_scales_1

    if GROUPS == 0:
        b_unit_0 = gl.load(p_scale + o_scale_0).to(gl.float32)
        b_unit_1 = gl.load(p_scale + o_scale_1).to(gl.float32)
    else:
        b_unit_0 = _unit_of_group(b_scales_0[0], gl.arange(0, 64, layout=ROWS), SCALE)
        b_unit_1 = _unit_of_group(b_scales_1[0], gl.arange(0, 64, layout=ROWS), SCALE)
    b_sum_0 *= gl.expand_dims(b_unit_0, 1)
    b_sum_1 *= gl.expand_dims(b_unit_1, 1)
    wait_for_previous()
    if SPLIT_K > 1:
        OUT: gl.constexpr = rows_layout()
        o_m = first_m + gl.arange(0, BM, layout=gl.SliceLayout(0, OUT))
        i_tile = i_tile * 4 + i_warpgroup * 2
        store_sum(
            b_sum_0, first_n, o_m, i_k, i_tile, p_bias, p_out, p_partials, p_arrived, M, N, SPLIT_K, OUT
        )
        first_n += 64
        i_tile += 1
        store_sum(
            b_sum_1, first_n, o_m, i_k, i_tile, p_bias, p_out, p_partials, p_arrived, M, N, SPLIT_K, OUT
        )
    else:
        store_rows(b_sum_0, first_n, first_m, count > 0, p_bias, p_slots, p_out, M, N)
        store_rows(b_sum_1, first_n + 64, first_m, count > 0, p_bias, p_slots, p_out, M, N)


@gluon.jit(do_not_specialize=UNSPECIALIZED)
def prefill_kernel(
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
    SLOTS: gl.constexpr,
    GROUPS: gl.constexpr,
):
    """out [M, N] = x W^T + bias.

    d_x: TMA descriptor of x [M, K], blocks of [BM, 128]. The other tensors are those of `wide_kernel`, also
    for experts, with arrived [m_tiles n_tiles 4]. Grid (m_tiles n_tiles, SPLIT_K), m_tiles = ceil(M/BM),
    n_tiles = ceil(N/256); a program takes tiles_per_split tiles of K.
    """
    launch_dependents()
    i_n, i_m = place_of_program(n_tiles, m_tiles)
    i_tile = i_m * n_tiles + i_n
    i_k = gl.program_id(1)
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
            (_consume, (0, weights, results, ring, sizes, place, SPLIT_K, GROUPS)),
            (_consume, (1, weights, results, ring, sizes, place, SPLIT_K, GROUPS)),
            (produce, (d_x, ring, first_m, first, count)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )
