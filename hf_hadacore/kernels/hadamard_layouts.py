"""Where the Gluon kernels of the Hadamard transform keep each element: which register, lane and warp.

A program transforms a few rows of n = m * C elements, C = 2^c. Each bit of an element's index has a role,
which is a number here: bit j of its column (0 <= j < c) is j; bit j of the matrix index, over which the
product with H_m sums or which it gives out, is `MATRIX` + j, as the tensor core's instruction numbers them;
bit j of the row is `ROW` + j. Lists of roles run from the slowest bit to the fastest.

Every change of layout between the two products is a renaming. The first, H_m X, takes X as operand B of
``mma.m16n8k16``: lane 4 g + t holds matrix bits in t (two of them) and column bits in g (three). Its result
    has
matrix bits in g and column bits in t, which is how operand A of the second product, X H_16, wants them. This
is HadaCore's trick (arXiv:2412.08832). The other column bits lie in registers, where a butterfly is an
addition and a subtraction, or in warps: those are exchanged through shared memory, once.
"""

from dataclasses import dataclass
from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

MATRIX = 100
ROW = 200
# Bits of a warp's lane.
LANES = 5


@dataclass(frozen=True)
class Plan:
    """The roles of one kernel.

    Attributes:
        column_bits: c.
        row_bits: of the number of rows.
        vector: the column bit that the second product takes from registers.
        lanes: the three column bits (or row bits) of the first product's lanes.
        registers: further column and row bits, in registers.
        warps: those in warps.
        order: of memory: "rows" of [m, C]; "mixed": rows of a power of two with the matrix index made of low
            bits, so that neighbours in memory are neighbours in registers before and after; "columns" of one
            matrix [m, rows].
    """

    column_bits: int
    row_bits: int
    vector: int
    lanes: tuple[int, ...]
    registers: tuple[int, ...]
    warps: tuple[int, ...]
    order: str


@gluon.constexpr_function
def make_plan(c: int, row_bits: int, warp_bits: int, order: str) -> Plan:
    """Roles of the c column bits and the row bits; warps get the slowest."""
    columns = list(range(c))
    rows = [ROW + j for j in range(row_bits)]
    # Of the bits that the instruction has outside the matrix index, three are a lane's.
    fast, slow = (columns, rows) if c > 3 else (rows, columns) if order == "columns" else (rows[:0], rows)
    register_bits = c + row_bits - 3 - warp_bits
    if fast:
        low = min(len(fast), register_bits + 3, 5 if order == "mixed" else 6)
        # The lane bit that becomes a register is the slowest, so that neighbouring lanes store neighbours.
        chosen = (1, 2, 3) if low == 4 else (low - 1, low - 3, low - 2)
        lanes = tuple(fast[j] for j in chosen)
        rest = [role for role in fast + slow if role not in lanes]
    else:
        lanes, rest = tuple(rows[:3]), columns + rows[3:]
    registers, warps = tuple(rest[1:register_bits]), tuple(rest[register_bits:])
    return Plan(c, row_bits, rest[0], lanes, registers, warps, order)


@gluon.constexpr_function
def natural_order(plan: Plan, matrix_bits: int, is_result: bool) -> list[int]:
    """Roles of the bits of an element's place in a tile's memory, which has 2^matrix_bits matrix indices.

    The first product's instruction has input bits 1 and 2 in lanes, and result bits 0 to 2.
    """
    matrix = [0, 1, 2, 3] if is_result else [1, 2, 0, 3]
    if plan.order == "mixed":
        matrix = [3, 0, 1, 2] if is_result else [0, 1, 2, 3]
    matrix = [MATRIX + j for j in (*matrix, *range(4, matrix_bits))]
    columns = list(range(plan.column_bits))
    rows = [ROW + j for j in range(plan.row_bits)]
    if plan.order == "columns":
        fast_first = rows + matrix
    elif plan.order == "rows":
        fast_first = columns + matrix + rows
    elif plan.column_bits == 4:
        fast_first = [matrix[0], *columns, *matrix[1:], *rows]
    else:
        fast_first = [matrix[0], *columns[:2], *matrix[1:3], *columns[2:5], matrix[3], *columns[5:], *rows]
    return fast_first[::-1]


@gluon.constexpr_function
def tile_shape(plan: Plan, matrix_bits: int) -> list[int]:
    """``[rows, 2^matrix_bits * C]``, or ``[2^matrix_bits, rows]`` of a tile in the order "columns"."""
    if plan.order == "columns":
        return [1 << matrix_bits, 1 << plan.row_bits]
    return [1 << plan.row_bits, 1 << matrix_bits + plan.column_bits]


@gluon.constexpr_function
def operand_order(plan: Plan, matrix_bits: int) -> list[int]:
    """Roles of ``[2^matrix_bits, columns]``: the first product's operand and its result."""
    columns = [*plan.lanes, *plan.warps, plan.vector, *plan.registers]
    return ([MATRIX + j for j in range(matrix_bits)][::-1]) + columns[::-1]


@gluon.constexpr_function
def second_order(plan: Plan) -> list[int]:
    """Roles of ``[rest, 16]``: the second product's operand and its result."""
    rest = [*(MATRIX + j for j in range(4)), *plan.warps, *plan.registers]
    return [*rest[::-1], plan.vector, *plan.lanes[::-1]]


@gluon.constexpr_function
def bit_layout(
    registers: list[int], lanes: list[int], warps: list[int], natural: list[int], shape: list[int]
) -> Any:
    inner_bits = shape[1].bit_length() - 1

    def basis(role: int) -> list[int]:
        place = len(natural) - 1 - natural.index(role)
        return [0, 1 << place] if place < inner_bits else [1 << (place - inner_bits), 0]

    # Neighbours in memory are neighbours in registers.
    register_bases = sorted(basis(role) for role in registers)
    return gl.DistributedLinearLayout(
        register_bases, [basis(role) for role in lanes], [basis(role) for role in warps], [], shape
    )


@gluon.constexpr_function
def input_layout(plan: Plan, matrix_bits: int) -> Any:
    """Layout of a tile of x: operand B of the first product by other names."""
    registers = [plan.vector, *plan.registers, *(MATRIX + j for j in (0, *range(3, matrix_bits)))]
    lanes = [MATRIX + 1, MATRIX + 2, *plan.lanes]
    natural = natural_order(plan, matrix_bits, False)
    return bit_layout(registers, lanes, list(plan.warps), natural, tile_shape(plan, matrix_bits))


@gluon.constexpr_function
def crossing_bits(plan: Plan) -> list[int]:
    """Column bits that lie in warps."""
    return [role for role in plan.warps if role < MATRIX]


@gluon.constexpr_function
def result_layout(plan: Plan) -> Any:
    """Layout of a tile of the result (16 matrix indices); bits that crossed warps are registers here."""
    natural, shape = natural_order(plan, 4, True), tile_shape(plan, 4)
    crossing = crossing_bits(plan)
    if not crossing:
        registers = [plan.vector, plan.lanes[0], *plan.registers, MATRIX + 3]
        lanes = [*plan.lanes[1:], *(MATRIX + j for j in range(3))]
        return bit_layout(registers, lanes, list(plan.warps), natural, shape)
    register_bits = len(natural) - LANES - len(plan.warps)
    free = [role for role in natural[::-1] if role not in crossing]
    low = max(0, min(3, register_bits - len(crossing)))
    more = register_bits - len(crossing) - low
    registers = [*crossing, *free[:low], *free[low + LANES : low + LANES + more]]
    return bit_layout(registers, free[low : low + LANES], free[low + LANES + more :], natural, shape)


@gluon.constexpr_function
def permutation(source: list[int], target: list[int]) -> list[int]:
    """Which dimension of `source` each dimension of `target` is."""
    return [source.index(role) for role in target]


@gluon.constexpr_function
def butterfly_bits(plan: Plan) -> list[int]:
    """Column bits in registers that no product sums over."""
    bits = plan.registers if plan.column_bits > 3 else (plan.vector, *plan.registers)
    return [role for role in bits if role < MATRIX]


@gluon.constexpr_function
def with_last(order: list[int], roles: list[int], count: int) -> list[int]:
    """The order after the first `count` roles have been made the last, one after the other."""
    for role in roles[:count]:
        order = [other for other in order if other != role] + [role]
    return order


@gluon.constexpr_function
def ones(count: int) -> list[int]:
    """The shape of a tensor with a dimension for each bit."""
    return [2] * count
