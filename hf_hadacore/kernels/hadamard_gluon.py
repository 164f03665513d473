# mypy: ignore-errors
# Gluon kernels are Python in form only: tuples grow at compile time and functions return either kind.
"""The Hadamard transform of rows, and of columns, in one pass: tiles of `hadamard_tile` in and out of memory.

A program holds all m * C elements of its rows; the products give 16 rows of H_m at a time, a tile.

To transform and do something else (quantize), a kernel calls `load_operands`, then `transform_tile` for each
16 rows of H_m (only one for powers of two with m = 16): fp32 values in `hadamard_layouts.result_layout`, at
`places`.

Prefixes: p_ pointer, b_ values in registers, o_ offsets, m_ mask, i_ index, s_ stride.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .hadamard_layouts import input_layout, make_plan, result_layout, tile_shape
from .hadamard_tile import as_operands, inner_offsets, log2, outer_offsets, pieces_of, transform_tile
from .w4a16_gluon import launch_dependents, wait_for_previous


@gluon.jit
def places(
    i_tile, rows, first, plan: gl.constexpr, layout: gl.constexpr, BITS: gl.constexpr, N: gl.constexpr
):
    """For 2^BITS matrix indices of a tile: rows, places in a row from `first` on, and which of them exist."""
    shape: gl.constexpr = tile_shape(plan, BITS)
    o_row = i_tile.to(gl.int64) * shape[0] + outer_offsets(layout, shape[0])
    o_n = first + inner_offsets(layout, shape[1])
    return o_row, o_n, (o_row < rows) & (o_n < N)


@gluon.jit
def load_piece(
    p_x, rows, s_x, i_tile, plan: gl.constexpr, START: gl.constexpr, BITS: gl.constexpr, N: gl.constexpr
):
    first: gl.constexpr = START << plan.column_bits
    o_row, o_n, m = places(i_tile, rows, first, plan, input_layout(plan, BITS), BITS, N)
    return gl.load(p_x + o_row * s_x + o_n, mask=m, other=0.0)


@gluon.jit
def signed(b_x, p_sign, plan: gl.constexpr, START: gl.constexpr, BITS: gl.constexpr, N: gl.constexpr):
    if p_sign is not None:
        o_n = (START << plan.column_bits) + inner_offsets(input_layout(plan, BITS), b_x.shape[1])
        b_x *= gl.load(p_sign + o_n, mask=o_n < N, other=0.0).to(b_x.dtype)
    return b_x


@gluon.jit
def load_operands(
    p_x, p_sign, rows, s_x, i_tile, plan: gl.constexpr, M: gl.constexpr, N: gl.constexpr, TERMS: gl.constexpr
):
    """The rows of a tile, times their signs, as `transform_tile` takes them."""
    pieces: gl.constexpr = pieces_of(M)
    loaded = ()
    for i in gl.static_range(len(pieces)):
        loaded += (load_piece(p_x, rows, s_x, i_tile, plan, pieces[i][0], pieces[i][1], N),)
    # Only now, so that all loads are on their way.
    operands = ()
    for i in gl.static_range(len(pieces)):
        b_x = signed(loaded[i], p_sign, plan, pieces[i][0], pieces[i][1], N)
        operands += (as_operands(b_x, plan, pieces[i][1], TERMS),)
    return operands


@gluon.jit
def transform_and_store(
    operands,
    p_out,
    p_h,
    rows,
    s_out,
    scale,
    i_tile,
    i_matrix,
    plan: gl.constexpr,
    M: gl.constexpr,
    N: gl.constexpr,
    TERMS: gl.constexpr,
):
    """One `transform_tile`, scaled, rounded and stored."""
    padded: gl.constexpr = (M + 15) // 16 * 16
    b_y = transform_tile(operands, p_h + i_matrix * 16 * padded, plan, M, TERMS) * scale
    first = i_matrix * (16 << plan.column_bits)
    o_row, o_n, m = places(i_tile, rows, first, plan, result_layout(plan), 4, N)
    gl.store(p_out + o_row * s_out + o_n, b_y.to(p_out.dtype.element_ty), mask=m)


# Alignment follows from UNIT: no need to compile for every number that 16 divides.
@gluon.jit(do_not_specialize=["rows", "s_x", "s_out"])
def rows_kernel(
    p_x,
    p_out,
    p_h,
    p_sign,
    rows,
    s_x,
    s_out,
    scale,
    M: gl.constexpr,
    COLUMN_BITS: gl.constexpr,
    ROWS: gl.constexpr,
    MIXED: gl.constexpr,
    TERMS_1: gl.constexpr,
    TERMS_2: gl.constexpr,
    UNIT: gl.constexpr,
    UNROLLED: gl.constexpr,
    SPLIT: gl.constexpr,
    PDL: gl.constexpr,
):
    """out = scale * (x * sign) H^T, rows of M * 2^COLUMN_BITS elements, ROWS of them in SPLIT programs.

    Rows of x and out are s_x * UNIT and s_out * UNIT elements apart. SPLIT divides the number of tiles; if it
    is 1, out may be x.
    """
    if PDL:
        launch_dependents()
    plan: gl.constexpr = make_plan(
        COLUMN_BITS, log2(ROWS), log2(gl.num_warps()), "mixed" if MIXED else "rows"
    )
    n: gl.constexpr = M << COLUMN_BITS
    tiles: gl.constexpr = (M + 15) // 16 // SPLIT
    i_tile = gl.program_id(0) // SPLIT
    i_first = gl.program_id(0) % SPLIT * tiles
    if PDL:
        wait_for_previous()
    operands = load_operands(p_x, p_sign, rows, s_x.to(gl.int64) * UNIT, i_tile, plan, M, n, TERMS_1)
    if UNROLLED:
        for i in gl.static_range(tiles):
            i_matrix = i_first + i
            transform_and_store(
                operands,
                p_out,
                p_h,
                rows,
                s_out.to(gl.int64) * UNIT,
                scale,
                i_tile,
                i_matrix,
                plan,
                M,
                n,
                TERMS_2,
            )
    else:
        for i_matrix in range(i_first, i_first + tiles):
            transform_and_store(
                operands,
                p_out,
                p_h,
                rows,
                s_out.to(gl.int64) * UNIT,
                scale,
                i_tile,
                i_matrix,
                plan,
                M,
                n,
                TERMS_2,
            )


@gluon.jit
def column_places(
    inner, i_block, START, plan: gl.constexpr, layout: gl.constexpr, BITS: gl.constexpr, M: gl.constexpr
):
    """Places in a matrix ``[M, inner]`` of a block of columns, from row START on, and which of them exist."""
    shape: gl.constexpr = tile_shape(plan, BITS)
    o_k = START + outer_offsets(layout, shape[0])
    o_j = i_block * shape[1] + inner_offsets(layout, shape[1])
    return o_k.to(gl.int64) * inner + o_j, (o_k < M) & (o_j < inner)


@gluon.jit
def load_columns(
    p_x, p_sign, inner, i_block, plan: gl.constexpr, START: gl.constexpr, BITS: gl.constexpr, M: gl.constexpr
):
    o_x, m = column_places(inner, i_block, START, plan, input_layout(plan, BITS), BITS, M)
    b_x = gl.load(p_x + o_x, mask=m, other=0.0)
    if p_sign is not None:
        b_x *= gl.load(p_sign + o_x, mask=m, other=0.0).to(b_x.dtype)
    return b_x


@gluon.jit(do_not_specialize=["inner", "blocks", "s_x", "s_out"])
def columns_kernel(
    p_x,
    p_out,
    p_h,
    p_sign,
    inner,
    blocks,
    s_x,
    s_out,
    scale,
    M: gl.constexpr,
    COLUMNS: gl.constexpr,
    TERMS: gl.constexpr,
    UNIT: gl.constexpr,
    PDL: gl.constexpr,
):
    """out = scale * H_M (x * sign) for matrices ``[M, inner * UNIT]``.

    They lie s_x * UNIT and s_out * UNIT elements apart; `blocks` programs of COLUMNS columns share one. out
    may be x.
    """
    if PDL:
        launch_dependents()
    plan: gl.constexpr = make_plan(0, log2(COLUMNS), log2(gl.num_warps()), "columns")
    layout: gl.constexpr = result_layout(plan)
    pieces: gl.constexpr = pieces_of(M)
    tiles: gl.constexpr = (M + 15) // 16
    inner *= UNIT
    i_block = gl.program_id(0) % blocks
    i_outer = (gl.program_id(0) // blocks).to(gl.int64)
    if PDL:
        wait_for_previous()
    operands = ()
    for i in gl.static_range(len(pieces)):
        b_x = load_columns(
            p_x + i_outer * s_x * UNIT, p_sign, inner, i_block, plan, pieces[i][0], pieces[i][1], M
        )
        operands += (as_operands(b_x, plan, pieces[i][1], TERMS),)
    for i in range(tiles):
        b_y = transform_tile(operands, p_h + i * 256 * tiles, plan, M, TERMS) * scale
        o_out, m = column_places(inner, i_block, i * 16, plan, layout, 4, M)
        gl.store(p_out + i_outer * s_out * UNIT + o_out, b_y.to(p_out.dtype.element_ty), mask=m)
