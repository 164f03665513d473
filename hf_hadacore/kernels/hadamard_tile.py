# mypy: ignore-errors
# Gluon kernels are Python in form only: tuples grow at compile time and functions return either kind.
"""16 rows of a Hadamard transform of n = m * 2^c elements, in registers, on NVIDIA's tensor cores: a tile.

H_n = H_m ⊗ H_C with C = 2^c: a row is a matrix [m, C], and y = scale * H_m X H_C. The first product is exact:
x has 16 bits, H is ±1, sums are fp32. The second sums over 16 columns, and before it the fp32 sums are split
into a high and a low bf16 term (bf16 for its range: fp16 would overflow), whose products go into one fp32
accumulator. The other column bits take additions in fp32. So the one rounding that matters is the last. fp32
inputs, and then also what stands between the products, are split into three terms, which keep all 24 bits.

Which thread has what is `hadamard_layouts`' business: between the products nothing moves from thread to
thread.

Prefixes: p_ pointer, b_ values in registers, o_ offsets.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.language.core import builtin

from .hadamard_layouts import (
    butterfly_bits,
    crossing_bits,
    natural_order,
    ones,
    operand_order,
    permutation,
    result_layout,
    second_order,
    tile_shape,
    with_last,
)


@builtin
def permute(b_x, source, target, _semantic=None):
    """Dimensions of two, one for each bit, from one order of roles to another.

    Triton 3.6's own function does not take an order that was computed.
    """
    return _semantic.permute(b_x, permutation(source, target))


@gluon.jit
def reorder(b_x, source: gl.constexpr, target: gl.constexpr, shape: gl.constexpr):
    """The same elements with the bits of their place in another order (and the tensor in another shape)."""
    b_x = gl.reshape(b_x, ones(len(source)))
    b_x = permute(b_x, source, target)
    return gl.reshape(b_x, shape)


@gluon.jit
def butterfly(b_x, source: gl.constexpr, target: gl.constexpr):
    """Transform over the bit that is last in target."""
    b_even, b_odd = gl.split(permute(b_x, source, target))
    return gl.join(b_even + b_odd, b_even - b_odd)


@gluon.jit
def butterflies(b_x, source: gl.constexpr, roles: gl.constexpr, target: gl.constexpr, shape: gl.constexpr):
    """Transform over bits that lie in registers, and `reorder` from source to target."""
    b_x = gl.reshape(b_x, ones(len(source)))
    for i in gl.static_range(len(roles)):
        b_x = butterfly(b_x, with_last(source, roles, i), with_last(source, roles, i + 1))
    b_x = permute(b_x, with_last(source, roles, len(roles)), target)
    return gl.reshape(b_x, shape)


@gluon.jit
def reinterpret(b_x, dtype: gl.constexpr):
    """The same bits as another type of this size."""
    return b_x.to(dtype, bitcast=True)


@gluon.jit
def terms(b_x, layout: gl.constexpr, COUNT: gl.constexpr):
    """fp32 values as a sum of bf16 terms, the largest first.

    All but the last are truncated: instructions for bits run four times as fast as those that convert.
    """
    result = ()
    for _ in gl.static_range(COUNT - 1):
        b_bits = reinterpret(b_x, gl.int32)
        b_term = reinterpret((b_bits >> 16).to(gl.int16), gl.bfloat16)
        b_x -= reinterpret(b_bits & -65536, gl.float32)
        result += (gl.convert_layout(b_term, layout, assert_trivial=True),)
    result += (gl.convert_layout(b_x.to(gl.bfloat16), layout, assert_trivial=True),)
    return result


@gluon.jit
def sylvester_16(layout: gl.constexpr, dtype: gl.constexpr):
    """H_16 as an operand: (-1)^popcount(i & j)."""
    o_i = gl.expand_dims(gl.arange(0, 16, layout=gl.SliceLayout(1, layout)), 1)
    o_j = gl.expand_dims(gl.arange(0, 16, layout=gl.SliceLayout(0, layout)), 0)
    b_bits = o_i & o_j
    b_bits ^= b_bits >> 2
    b_bits ^= b_bits >> 1
    return (1 - 2 * (b_bits & 1)).to(dtype)


@gluon.constexpr_function
def log2(n):
    return n.bit_length() - 1


@gluon.constexpr_function
def pieces_of(matrix):
    """The matrix index, padded to a multiple of 16, cut into powers of two: (start, bits) of each."""
    pieces, start = [], 0
    for bits in range(12, 3, -1):
        if -(-matrix // 16) * 16 >> bits & 1:
            pieces.append((start, bits))
            start += 1 << bits
    return pieces


@gluon.constexpr_function
def packed_layout(bits, warp_bits):
    """Layout of a packed part of H_m; each lane's 8 elements of 16 x 16 are neighbours in memory."""
    more = [[256 << i] for i in range(bits - 4)]
    lanes = [[8], [16], [32], [64], [128]]
    return gl.DistributedLinearLayout([[1], [2], [4], *more], lanes, [[0]] * warp_bits, [], [16 << bits])


# Bits of H's elements: those of the input here, those of the result + 100.
@gluon.constexpr_function
def packed_order(bits):
    return [*range(bits - 1, 3, -1), 102, 101, 100, 2, 1, 3, 103, 0]


@gluon.constexpr_function
def matrix_order(bits):
    return [103, 102, 101, 100, *range(bits - 1, -1, -1)]


@gluon.jit
def load_matrix(p_h, layout: gl.constexpr, BITS: gl.constexpr, WARP_BITS: gl.constexpr):
    """A packed part of H_m, ``[16, 2^BITS]``, as operand A of the first product."""
    b_h = gl.load(p_h + gl.arange(0, 16 << BITS, layout=packed_layout(BITS, WARP_BITS)))
    b_h = reorder(b_h, packed_order(BITS), matrix_order(BITS), [16, 1 << BITS])
    return gl.convert_layout(b_h, layout, assert_trivial=True)


@gluon.jit
def as_operands(b_x, plan: gl.constexpr, BITS: gl.constexpr, TERMS: gl.constexpr):
    """A tile of x with 2^BITS matrix indices as operand B of the first product: its terms."""
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [1, gl.num_warps()], [16, 8])
    layout: gl.constexpr = gl.DotOperandLayout(1, mma, 2)
    shape: gl.constexpr = [1 << BITS, 1 << (plan.row_bits + plan.column_bits)]
    b_x = reorder(b_x, natural_order(plan, BITS, False), operand_order(plan, BITS), shape)
    if TERMS == 1:
        return (gl.convert_layout(b_x, layout, assert_trivial=True),)
    else:
        return terms(b_x, layout, TERMS)


@gluon.jit
def add_product(b_y, b_terms, p_h, layout: gl.constexpr, START: gl.constexpr, BITS: gl.constexpr):
    """y + H x for one piece of the matrix index."""
    b_h = load_matrix(p_h + 16 * START, gl.DotOperandLayout(0, layout, 2), BITS, log2(gl.num_warps()))
    # The smallest term first.
    for i in gl.static_range(len(b_terms)):
        b_y = mma_v2(b_h, b_terms[len(b_terms) - 1 - i], b_y)
    return b_y


@gluon.jit
def transform_tile(operands, p_h, plan: gl.constexpr, M: gl.constexpr, TERMS: gl.constexpr):
    """16 rows of H_m times x, times H_C, in fp32, in `result_layout`.

    Args:
        operands: for each of `pieces_of` M, what `as_operands` gave.
        p_h: the packed 16 rows of H_m.
        TERMS: into which the second product's operand is split.
    """
    warps: gl.constexpr = gl.num_warps()
    columns: gl.constexpr = 1 << (plan.row_bits + plan.column_bits)
    pieces: gl.constexpr = pieces_of(M)
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [1, warps], [16, 8])
    b_y = gl.zeros([16, columns], gl.float32, layout=mma)
    for i in gl.static_range(len(pieces)):
        b_y = add_product(b_y, operands[i], p_h, mma, pieces[i][0], pieces[i][1])

    order: gl.constexpr = second_order(plan)
    b_y = reorder(b_y, operand_order(plan, 4), order, [columns, 16])
    if plan.column_bits > 3:
        mma_2: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [warps, 1], [16, 8])
        b_terms = terms(b_y, gl.DotOperandLayout(0, mma_2, 2), TERMS)
        b_h = sylvester_16(gl.DotOperandLayout(1, mma_2, 2), gl.bfloat16)
        b_y = gl.zeros([columns, 16], gl.float32, layout=mma_2)
        for i in gl.static_range(TERMS):
            b_y = mma_v2(b_terms[TERMS - 1 - i], b_h, b_y)

    natural: gl.constexpr = natural_order(plan, 4, True)
    shape: gl.constexpr = tile_shape(plan, 4)
    crossing: gl.constexpr = crossing_bits(plan)
    b_y = butterflies(b_y, order, butterfly_bits(plan), natural, shape)
    if len(crossing) > 0:
        b_y = gl.convert_layout(b_y, result_layout(plan))
        return butterflies(b_y, natural, crossing, natural, shape)
    else:
        return gl.convert_layout(b_y, result_layout(plan), assert_trivial=True)


@gluon.jit
def inner_offsets(layout: gl.constexpr, SIZE: gl.constexpr):
    return gl.expand_dims(gl.arange(0, SIZE, layout=gl.SliceLayout(0, layout)), 0)


@gluon.jit
def outer_offsets(layout: gl.constexpr, SIZE: gl.constexpr):
    return gl.expand_dims(gl.arange(0, SIZE, layout=gl.SliceLayout(1, layout)), 1)
