# mypy: ignore-errors
# A Gluon kernel is Python in form only: tuples grow at compile time.
"""The Hadamard transform of long rows and their 8-bit quantization in one pass: 8-bit activations.

A program of `hadamard_gluon` that keeps the fp32 results of its rows in registers until it knows the largest.
What is computed is `rotate_quantize.rotate_quantize_reference`'s.

Prefixes: p_ pointer, b_ values in registers, o_ offsets, m_ mask, i_ index, s_ stride.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .hadamard_gluon import load_operands, places
from .hadamard_layouts import make_plan, result_layout, tile_shape
from .hadamard_tile import log2, transform_tile
from .rotate_quantize_tiles import magnitude, scales_of, to_8_bits
from .w4a16_gluon import launch_dependents, wait_for_previous


# Alignment follows from UNIT: no need to compile for every number that 16 divides.
@gluon.jit(do_not_specialize=["rows", "s_x"])
def quantize_rows_kernel(
    p_x,
    p_values,
    p_scale,
    p_h,
    p_sign,
    rows,
    s_x,
    M: gl.constexpr,
    COLUMN_BITS: gl.constexpr,
    ROWS: gl.constexpr,
    MIXED: gl.constexpr,
    TERMS_1: gl.constexpr,
    UNIT: gl.constexpr,
    LARGEST: gl.constexpr,
    SMALLEST: gl.constexpr,
    POWER_OF_2: gl.constexpr,
    PDL: gl.constexpr,
):
    """8-bit values ``[rows, n]`` and scales ``[rows]`` of (x * sign) H^T / sqrt(n), n = M * 2^COLUMN_BITS.

    Rows of x are s_x * UNIT elements apart; ROWS of them go into a program. LARGEST is what the values' dtype
    holds, and maxima count as SMALLEST (bits of fp32) at least.
    """
    if PDL:
        launch_dependents()
    plan: gl.constexpr = make_plan(
        COLUMN_BITS, log2(ROWS), log2(gl.num_warps()), "mixed" if MIXED else "rows"
    )
    n: gl.constexpr = M << COLUMN_BITS
    norm: gl.constexpr = n**-0.5
    tiles: gl.constexpr = (M + 15) // 16
    layout: gl.constexpr = result_layout(plan)
    i_tile = gl.program_id(0)
    if PDL:
        wait_for_previous()
    operands = load_operands(p_x, p_sign, rows, s_x.to(gl.int64) * UNIT, i_tile, plan, M, n, TERMS_1)
    b_largest = gl.zeros(tile_shape(plan, 4), gl.int32, layout=layout)
    results = ()
    for i in gl.static_range(tiles):
        b_y = transform_tile(operands, p_h + i * 256 * tiles, plan, M, 2)
        b_largest = gl.maximum(b_largest, magnitude(b_y))
        results += (b_y,)
    # [rows, 1]
    b_maximum = gl.expand_dims(gl.max(b_largest, axis=1), 1)
    b_scale, b_inverse = scales_of(b_maximum, SMALLEST, LARGEST, norm, POWER_OF_2)
    o_row, _, m = places(i_tile, rows, 0, plan, layout, 4, n)
    gl.store(p_scale + o_row, b_scale, mask=o_row < rows)
    for i in gl.static_range(tiles):
        o_row, o_n, m = places(i_tile, rows, i * (16 << COLUMN_BITS), plan, layout, 4, n)
        gl.store(
            p_values + o_row * n + o_n, to_8_bits(results[i] * b_inverse, p_values.dtype.element_ty), mask=m
        )
