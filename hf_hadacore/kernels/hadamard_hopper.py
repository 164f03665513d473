# mypy: ignore-errors
# Gluon kernels are Python in form only: tuples grow at compile time and functions return either kind.
"""The Hadamard transform of long 16-bit rows on Hopper, read by ``wgmma`` from shared memory.

H_n = H_m ⊗ H_C as in `hadamard_tile`, with m up to 256 and C = 2^c up to 256. H_m and the next rows of x lie
in shared memory, copied there while a program works on the rows before, and are the operands of the exact
product H_m X as they are: x is in registers never. The fp32 sums that come out, 64 or 128 rows of H_m at a
time, hold all C columns of a row in the registers of one warp, in the order in which ``mma.m16n8k16`` wants
its operand A: the product with H_C follows at once, 16 columns by a product of two bf16 terms, the rest by
additions. No warp waits for another but once for each tile of rows.

Prefixes: p_ pointer, b_ values in registers, o_ offsets, m_ mask, i_ index, s_ stride or shared memory.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .hadamard_layouts import MATRIX, ROW, bit_layout
from .hadamard_tile import butterflies, inner_offsets, log2, outer_offsets, pieces_of, reorder, terms
from .w4a16_gluon import barrier, copy_to_shared, launch_dependents, wait_for_previous


@gluon.constexpr_function
def warps_of(matrix_rows):
    """Eight warps, two groups of four: of two times 64 rows of H_m, or of two halves of the columns."""
    return [matrix_rows // 16, 128 // matrix_rows]


@gluon.constexpr_function
def sums_order(c, row_bits, matrix_bits):
    """Roles (see `hadamard_layouts`) of the bits of ``[2^matrix_bits, rows * C]``, the slowest first."""
    return [MATRIX + j for j in range(matrix_bits)][::-1] + natural_columns(c, row_bits)


@gluon.constexpr_function
def natural_columns(c, row_bits):
    return [ROW + j for j in range(row_bits)][::-1] + list(range(c))[::-1]


@gluon.constexpr_function
def warp_roles(row_bits, matrix_bits):
    return [MATRIX + 4, MATRIX + 5, MATRIX + 6 if matrix_bits == 7 else ROW + row_bits - 1]


@gluon.constexpr_function
def register_roles(c, row_bits, matrix_bits):
    """Bits in registers that the product over 16 columns does not touch."""
    return [*range(4, c), *(ROW + j for j in range(row_bits if matrix_bits == 7 else row_bits - 1))]


@gluon.constexpr_function
def product_order(c, row_bits, matrix_bits, is_result):
    """Roles of ``[rest, 16]``: the second product's operand and its result.

    Of the result's 16 columns a thread holds two pairs of neighbours, which `sylvester_for_store` makes the
    four that follow one another in memory.
    """
    rest = [*(MATRIX + j for j in range(4)), *warp_roles(row_bits, matrix_bits)]
    rest += register_roles(c, row_bits, matrix_bits)
    return rest[::-1] + ([1, 3, 2, 0] if is_result else [3, 2, 1, 0])


@gluon.constexpr_function
def store_order(c, row_bits, matrix_bits):
    """Roles of ``[rows, 2^matrix_bits * C]``."""
    rows = [ROW + j for j in range(row_bits)][::-1]
    return rows + [MATRIX + j for j in range(matrix_bits)][::-1] + list(range(c))[::-1]


@gluon.constexpr_function
def store_layout(c, row_bits, matrix_bits):
    registers = [0, 1, MATRIX + 3, *register_roles(c, row_bits, matrix_bits)]
    lanes = [2, 3, MATRIX, MATRIX + 1, MATRIX + 2]
    shape = [1 << row_bits, 1 << (matrix_bits + c)]
    return bit_layout(
        registers, lanes, warp_roles(row_bits, matrix_bits), store_order(c, row_bits, matrix_bits), shape
    )


@gluon.constexpr_function
def butterfly_roles(c):
    return list(range(4, c))


@gluon.constexpr_function
def shared_layout(width):
    """Of 16-bit rows of this many elements."""
    return gl.NVMMASharedLayout(min(128, 2 * width), 16, 2)


@gluon.constexpr_function
def copy_layout(height, width, num_warps):
    """16 bytes a thread; a warp's threads side by side."""
    lanes = min(32, width // 8)
    return gl.BlockedLayout([1, 8], [32 // lanes, lanes], [num_warps, 1], [1, 0])


@gluon.jit
def sylvester_for_store(layout: gl.constexpr, dtype: gl.constexpr):
    """H_16 as operand B, columns in the order of `product_order`."""
    o_i = gl.expand_dims(gl.arange(0, 16, layout=gl.SliceLayout(1, layout)), 1)
    o_n = gl.expand_dims(gl.arange(0, 16, layout=gl.SliceLayout(0, layout)), 0)
    b_bits = o_i & ((o_n & 1) | (o_n >> 3 << 1) | ((o_n >> 1 & 3) << 2))
    b_bits ^= b_bits >> 2
    b_bits ^= b_bits >> 1
    return (1 - 2 * (b_bits & 1)).to(dtype)


@gluon.jit
def allocate(dtype: gl.constexpr, COUNT: gl.constexpr, HEIGHT: gl.constexpr, WIDTH: gl.constexpr):
    return gl.allocate_shared_memory(dtype, [COUNT, HEIGHT, WIDTH], shared_layout(WIDTH))


@gluon.jit
def copy_matrix(s_h, p_h, K: gl.constexpr, START: gl.constexpr, MATRIX_ROWS: gl.constexpr):
    """Columns START ... of H_m, ``[tiles, MATRIX_ROWS, 2^bits]``."""
    width: gl.constexpr = s_h.shape[2]
    layout: gl.constexpr = copy_layout(MATRIX_ROWS, width, gl.num_warps())
    o_h = outer_offsets(layout, MATRIX_ROWS) * K + START + inner_offsets(layout, width)
    tiles: gl.constexpr = s_h.shape[0]
    for i in gl.static_range(tiles):
        copy_to_shared(s_h.index(i), p_h + i * MATRIX_ROWS * K + o_h)


@gluon.jit
def copy_rows(
    s_piece,
    p_x,
    rows,
    s_x,
    i_tile,
    START: gl.constexpr,
    PART: gl.constexpr,
    M: gl.constexpr,
    C_BITS: gl.constexpr,
    ROWS: gl.constexpr,
):
    """Matrix rows START ... of a part of the columns of ROWS rows of x; what does not exist becomes 0.

    The instruction fills what is masked with zeros, which Triton's own pipelines count on.
    """
    layout: gl.constexpr = copy_layout(s_piece.shape[0], s_piece.shape[1], gl.num_warps())
    o_k = START + outer_offsets(layout, s_piece.shape[0])
    o_column = PART * s_piece.shape[1] + inner_offsets(layout, s_piece.shape[1])
    o_row = i_tile.to(gl.int64) * ROWS + o_column // (1 << C_BITS)
    o_x = o_row * s_x + o_column % (1 << C_BITS) + o_k * (1 << C_BITS)
    copy_to_shared(s_piece, p_x + o_x, mask=(o_row < rows) & (o_k < M))


@gluon.jit
def apply_sign(
    s_piece, p_sign, START: gl.constexpr, PART: gl.constexpr, M: gl.constexpr, C_BITS: gl.constexpr
):
    """Multiply what this thread has copied."""
    layout: gl.constexpr = copy_layout(s_piece.shape[0], s_piece.shape[1], gl.num_warps())
    o_k = START + outer_offsets(layout, s_piece.shape[0])
    o_column = PART * s_piece.shape[1] + inner_offsets(layout, s_piece.shape[1])
    o_sign = o_k * (1 << C_BITS) + o_column % (1 << C_BITS)
    b_sign = gl.load(p_sign + o_sign, mask=o_k < M, other=0.0)
    s_piece.store(s_piece.load(layout) * b_sign)


@gluon.jit
def start_product(
    s_hs, s_xs, i_matrix: gl.constexpr, i_x, mma: gl.constexpr, HEIGHT: gl.constexpr, WIDTH: gl.constexpr
):
    """Rows of H_m times columns of x, ``[HEIGHT, WIDTH]``; each piece is a group to wait for."""
    b_y = gl.zeros([HEIGHT, WIDTH], gl.float32, layout=mma)
    for i in gl.static_range(len(s_hs)):
        b_y = warpgroup_mma(s_hs[i].index(i_matrix), s_xs[i].index(i_x), b_y, is_async=True)
    return b_y


@gluon.jit
def transform_columns(b_y, C_BITS: gl.constexpr, ROW_BITS: gl.constexpr, MATRIX_BITS: gl.constexpr):
    """fp32 sums times H_C, in `store_layout`."""
    warps: gl.constexpr = gl.num_warps()
    rest: gl.constexpr = 1 << (C_BITS + ROW_BITS + MATRIX_BITS - 4)
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [warps, 1], [16, 8])
    order: gl.constexpr = product_order(C_BITS, ROW_BITS, MATRIX_BITS, False)
    result: gl.constexpr = product_order(C_BITS, ROW_BITS, MATRIX_BITS, True)
    natural: gl.constexpr = store_order(C_BITS, ROW_BITS, MATRIX_BITS)
    b_y = reorder(b_y, sums_order(C_BITS, ROW_BITS, MATRIX_BITS), order, [rest, 16])
    b_terms = terms(b_y, gl.DotOperandLayout(0, mma, 2), 2)
    b_h = sylvester_for_store(gl.DotOperandLayout(1, mma, 2), gl.bfloat16)
    b_y = mma_v2(b_terms[1], b_h, gl.zeros([rest, 16], gl.float32, layout=mma))
    b_y = mma_v2(b_terms[0], b_h, b_y)
    shape: gl.constexpr = [1 << ROW_BITS, 1 << (MATRIX_BITS + C_BITS)]
    b_y = butterflies(b_y, result, butterfly_roles(C_BITS), natural, shape)
    return gl.convert_layout(b_y, store_layout(C_BITS, ROW_BITS, MATRIX_BITS), assert_trivial=True)


@gluon.jit
def store_rows(
    b_y,
    p_out,
    rows,
    s_out,
    i_tile,
    i_matrix,
    PART: gl.constexpr,
    M: gl.constexpr,
    C_BITS: gl.constexpr,
    PART_BITS: gl.constexpr,
    ROW_BITS: gl.constexpr,
    MATRIX_BITS: gl.constexpr,
):
    """Round and store results that `transform_columns` gave, of a part of 2^PART_BITS columns."""
    layout: gl.constexpr = store_layout(PART_BITS, ROW_BITS, MATRIX_BITS)
    o_row = (i_tile.to(gl.int64) << ROW_BITS) + outer_offsets(layout, 1 << ROW_BITS)
    o_n = inner_offsets(layout, 1 << (MATRIX_BITS + PART_BITS))
    if PART_BITS < C_BITS:
        # Division, not a shift, tells Triton 3.6 that neighbours stay neighbours.
        o_n += o_n // (1 << PART_BITS) * ((1 << C_BITS) - (1 << PART_BITS)) + (PART << PART_BITS)
    o_n += i_matrix * (1 << (MATRIX_BITS + C_BITS))
    m = (o_row < rows) & (o_n < M << C_BITS)
    gl.store(p_out + o_row * s_out + o_n, b_y.to(p_out.dtype.element_ty), mask=m)


# Alignment follows from the unit: no need to compile for every number that 16 divides.
@gluon.jit(do_not_specialize=["rows", "s_x", "s_out"])
def hopper_kernel(
    p_x,
    p_out,
    p_h,
    p_sign,
    rows,
    s_x,
    s_out,
    scale,
    M: gl.constexpr,
    C_BITS: gl.constexpr,
    ROWS: gl.constexpr,
    MATRIX_ROWS: gl.constexpr,
    STAGES: gl.constexpr,
    PARTS: gl.constexpr,
    PDL: gl.constexpr,
):
    """out = scale * (x * sign) H^T, rows of M * 2^C_BITS 16-bit elements, ROWS of them at a time.

    p_h: H_M, ``[M rounded up to MATRIX_ROWS (64 or 128), M rounded up to 16]``, zeros around. Rows of x and
    out are s_x * 8 and s_out * 8 elements apart and begin at multiples of 16 bytes. out may be x. PARTS = 2,
    which needs ROWS = 1 and MATRIX_ROWS >= M, makes two products of a row, each of half of the columns.
    """
    if PDL:
        launch_dependents()
    pieces: gl.constexpr = pieces_of(M)
    tiles: gl.constexpr = (M + MATRIX_ROWS - 1) // MATRIX_ROWS
    k: gl.constexpr = (M + 15) // 16 * 16
    # Columns of a product, and their bits of a row.
    columns: gl.constexpr = (ROWS << C_BITS) // PARTS
    c_bits: gl.constexpr = C_BITS + 1 - PARTS
    row_bits: gl.constexpr = log2(ROWS)
    matrix_bits: gl.constexpr = log2(MATRIX_ROWS)
    dtype: gl.constexpr = p_x.dtype.element_ty
    warps: gl.constexpr = warps_of(MATRIX_ROWS)
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], warps, [16, columns // warps[1], 16])
    s_x = s_x.to(gl.int64) * 8
    s_out = s_out.to(gl.int64) * 8
    s_hs = ()
    s_xs = ()
    for i in gl.static_range(len(pieces)):
        s_hs += (allocate(dtype, tiles, MATRIX_ROWS, 1 << pieces[i][1]),)
        s_xs += (allocate(dtype, STAGES * PARTS, 1 << pieces[i][1], columns),)
        copy_matrix(s_hs[i], p_h, k, pieces[i][0], MATRIX_ROWS)
    if PDL:
        wait_for_previous()
    programs = gl.num_programs(0)
    for stage in gl.static_range(STAGES - 1):
        for i in gl.static_range(len(pieces)):
            i_tile = gl.program_id(0) + stage * programs
            for part in gl.static_range(PARTS):
                s_piece = s_xs[i].index(stage * PARTS + part)
                copy_rows(s_piece, p_x, rows, s_x, i_tile, pieces[i][0], part, M, C_BITS, ROWS)
        async_copy.commit_group()
    i_stage = 0
    for i_tile in range(gl.program_id(0), (rows + ROWS - 1) // ROWS, programs):
        async_copy.wait_group(STAGES - 2)
        if p_sign is not None:
            for i in gl.static_range(len(pieces)):
                for part in gl.static_range(PARTS):
                    s_piece = s_xs[i].index(i_stage * PARTS + part)
                    apply_sign(s_piece, p_sign, pieces[i][0], part, M, C_BITS)
        fence_async_shared()
        # Everybody's copies are there, and nobody reads the stage before any more.
        barrier()
        i_free = i_stage + STAGES - 1 if i_stage == 0 else i_stage - 1
        for i in gl.static_range(len(pieces)):
            i_next = i_tile + (STAGES - 1) * programs
            for part in gl.static_range(PARTS):
                s_piece = s_xs[i].index(i_free * PARTS + part)
                copy_rows(s_piece, p_x, rows, s_x, i_next, pieces[i][0], part, M, C_BITS, ROWS)
        async_copy.commit_group()
        # The tensor cores begin with the next product while the results of one are worked on.
        b_next = start_product(s_hs, s_xs, 0, i_stage * PARTS, mma, MATRIX_ROWS, columns)
        for i_product in gl.static_range(tiles * PARTS):
            b_y = b_next
            if i_product + 1 < tiles * PARTS:
                i_x = i_stage * PARTS + (i_product + 1) % PARTS
                b_next = start_product(s_hs, s_xs, (i_product + 1) // PARTS, i_x, mma, MATRIX_ROWS, columns)
                b_y = warpgroup_mma_wait(len(pieces), deps=(b_y,))
            else:
                b_y = warpgroup_mma_wait(0, deps=(b_y,))
            b_y = transform_columns(b_y, c_bits, row_bits, matrix_bits) * scale
            if PARTS == 1:
                store_rows(
                    b_y, p_out, rows, s_out, i_tile, i_product, 0, M, C_BITS, c_bits, row_bits, matrix_bits
                )
            elif i_product == 0:
                b_first = b_y
            else:
                b_sum, b_difference = b_first + b_y, b_first - b_y
                store_rows(b_sum, p_out, rows, s_out, i_tile, 0, 0, M, C_BITS, c_bits, row_bits, matrix_bits)
                store_rows(
                    b_difference, p_out, rows, s_out, i_tile, 0, 1, M, C_BITS, c_bits, row_bits, matrix_bits
                )
        i_stage = 0 if i_stage == STAGES - 1 else i_stage + 1
