# mypy: ignore-errors
"""The Hadamard transform of long rows: while a program transforms some, its next rows are on their way.

A long row fills the registers of so many warps that hardly another program fits beside it, and nothing would
be read while it computes. So a program takes one tile of rows after the other, and copies each into shared
memory while it works on the one before. Everything else is `hadamard_gluon`'s.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from .hadamard_gluon import as_operands, log2, places, signed, transform_and_store
from .hadamard_layouts import input_layout, make_plan, tile_shape
from .w4a16_gluon import barrier, copy_to_shared, launch_dependents, wait_for_previous


@gluon.jit
def start_copy(s_tile, p_x, rows, s_x, i_tile, plan: gl.constexpr, BITS: gl.constexpr, VECTOR: gl.constexpr):
    """Ask for a tile's rows, VECTOR elements a thread; those that do not exist become 0."""
    n: gl.constexpr = 1 << (BITS + plan.column_bits)
    layout: gl.constexpr = gl.BlockedLayout([1, VECTOR], [1, 32], [1, gl.num_warps()], [1, 0])
    o_row, o_n, m = places(i_tile, rows, 0, plan, layout, BITS, n)
    copy_to_shared(s_tile, p_x + o_row * s_x + o_n, mask=m)
    async_copy.commit_group()


@gluon.jit(do_not_specialize=["rows", "s_x", "s_out"])
def streamed_kernel(
    p_x,
    p_out,
    p_h,
    p_sign,
    rows,
    s_x,
    s_out,
    scale,
    BITS: gl.constexpr,
    COLUMN_BITS: gl.constexpr,
    ROWS: gl.constexpr,
    TERMS_1: gl.constexpr,
    TERMS_2: gl.constexpr,
    PDL: gl.constexpr,
):
    """out = scale * (x * sign) H, rows of 2^(BITS + COLUMN_BITS) elements, ROWS of them at a time.

    H_m has order 2^BITS = 16. Rows of x and out are s_x * 8 and s_out * 8 elements apart, and x begins at a
    multiple of 16 bytes. out may be x.
    """
    if PDL:
        launch_dependents()
    plan: gl.constexpr = make_plan(COLUMN_BITS, log2(ROWS), log2(gl.num_warps()), "mixed")
    shape: gl.constexpr = tile_shape(plan, BITS)
    # 16 bytes: x has several terms if it has 32 bits.
    vector: gl.constexpr = 8 if TERMS_1 == 1 else 4
    shared: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    s_tile = gl.allocate_shared_memory(p_x.dtype.element_ty, shape, shared)
    s_x = s_x.to(gl.int64) * 8
    s_out = s_out.to(gl.int64) * 8
    if PDL:
        wait_for_previous()
    start_copy(s_tile, p_x, rows, s_x, gl.program_id(0), plan, BITS, vector)
    for i_tile in range(gl.program_id(0), (rows + ROWS - 1) // ROWS, gl.num_programs(0)):
        async_copy.wait_group(0)
        barrier()
        b_x = s_tile.load(input_layout(plan, BITS))
        barrier()
        start_copy(s_tile, p_x, rows, s_x, i_tile + gl.num_programs(0), plan, BITS, vector)
        b_x = signed(b_x, p_sign, plan, 0, BITS, shape[1])
        operands = (as_operands(b_x, plan, BITS, TERMS_1),)
        transform_and_store(
            operands, p_out, p_h, rows, s_out, scale, i_tile, 0, plan, 1 << BITS, shape[1], TERMS_2
        )
