"""How the Gluon kernels of the Hadamard transform cut a size into products, and a problem into programs."""

from functools import cache
from math import prod
from typing import NamedTuple

import torch

from ..hadamard_matrices import hadamard_matrix

# Rows that are longer do not fit one program.
MAX_ROW = 1 << 15
# A larger matrix takes more arithmetic than a pass over memory has time for.
MAX_MATRIX = 256
# The rows of H_m up to which programs of `hadamard_gluon` keep up with memory.
_LIGHT_MATRIX = 32
# Of a program; more of them would have too few registers each.
_MAX_WARPS = 16
# Of a Hopper processor, for all its programs; the system takes 1024 more for each.
_SHARED_BYTES = 226 << 10
# Fewer elements than this do not fill a GPU for long.
SMALL = 1 << 22
# In the rows a program holds, column bits beyond three are another product's, which needs more than four.
_PRODUCT_BITS = 4


class Steps(NamedTuple):
    """H_n as products that kernels know: (H_l1 ⊗ H_l2 ⊗ ...) ⊗ H_m ⊗ H_C.

    Attributes:
        leading: (l1, l2, ...), each a pass of its own over memory; empty for most sizes.
        heads: orders whose Kronecker product is H_m; empty if the rest is a power of two.
        column_bits: c, with C = 2^c.
    """

    leading: tuple[int, ...]
    heads: tuple[int, ...]
    column_bits: int


class Schedule(NamedTuple):
    """How rows of m * 2^c elements are transformed.

    Attributes:
        matrix: m; a power of two may stand for bits of C.
        column_bits: c.
        rows: of one program.
        num_warps: of one program.
        is_mixed: the matrix index is made of low bits (see `hadamard_layouts.Plan`); for powers of two from
            256 on, with m = 16.
        is_unrolled: the loop over 16 rows of H_m is unrolled.
        split: programs that share rows, each of which reads all of them and makes its part of the result: for
            few rows; a divisor of the number of 16 rows of H_m. Not in place.
    """

    matrix: int
    column_bits: int
    rows: int
    num_warps: int
    is_mixed: bool
    is_unrolled: bool
    split: int = 1


class HopperSchedule(NamedTuple):
    """How `hadamard_hopper` transforms rows of m * 2^c elements.

    Attributes:
        matrix: m.
        column_bits: c.
        rows: transformed at a time.
        matrix_rows: of H_m in one product: 64, where the two groups of warps share the columns, or 128.
        stages: of shared memory, each for `rows` rows.
        residents: programs that share a processor; its registers hold the sums of two small products.
        parts: 2 makes a product of each half of a row's columns, so that the tensor cores work on one while
            the results of the other are worked on; several `tiles` do this anyway.
    """

    matrix: int
    column_bits: int
    rows: int
    matrix_rows: int
    stages: int
    residents: int
    parts: int = 1

    @property
    def tiles(self) -> int:
        """Products that make H_m."""
        return -(-self.matrix // self.matrix_rows)

    @property
    def shared_bytes(self) -> int:
        padded = -(-self.matrix // 16) * 16
        return 2 * padded * (self.tiles * self.matrix_rows + self.stages * (self.rows << self.column_bits))

    @property
    def cycles(self) -> float:
        """Estimate of what a processor computes for each element; a copy takes 0.31 cycles on an H100.

        Its tensor cores do some 1600 multiplications a cycle in the first product; what follows is 0.13
        cycles for each row of H_m, also those that only pad it.
        """
        padding = self.tiles * self.matrix_rows / self.matrix
        return padding * (-(-self.matrix // 16) * 16 / 1600 + 0.13)


@cache
def steps_of(factors: tuple[int, ...]) -> Steps:
    """Split a size.

    Args:
        factors: as `hadamard_matrices.hadamard_factors` gives them.
    """
    *heads, last = factors
    c = _sylvester_bits(last)
    if last >> c > 1:
        heads.append(last >> c)
    leading = []
    while heads and (prod(heads) > MAX_MATRIX or prod(heads) << c > MAX_ROW):
        leading.append(heads.pop(0))
    while 1 << c > MAX_ROW:
        bits = min(7, max(4, c - 13))
        leading.append(1 << bits)
        c -= bits
    return Steps(tuple(leading), tuple(heads), c)


def _sylvester_bits(order: int) -> int:
    """The largest c with H_order = H ⊗ H_C, C = 2^c."""
    if order & (order - 1) == 0:
        return order.bit_length() - 1
    matrix = hadamard_matrix(order)
    c = (order & -order).bit_length() - 1
    while not torch.equal(torch.kron(matrix[:: 1 << c, :: 1 << c], hadamard_matrix(1 << c)), matrix):
        c -= 1
    return c


@cache
def choose(heads: tuple[int, ...], column_bits: int, is_wide: bool, is_small: bool) -> Schedule:
    """The schedule for rows of prod(heads) * 2^column_bits elements, as measured on an H100.

    Args:
        heads, column_bits: as in `Steps`.
        is_wide: x is fp32.
        is_small: at most `SMALL` elements: programs should be many and short.
    """
    m, c = prod(heads), column_bits
    if not heads and c >= 8:
        columns = 128 if c >= 14 and not is_wide else 64
        min_warps = 1 if is_small else 8 if c <= 10 else 4 if is_wide else 1
        return schedule(16, c - 4, columns, min_warps, is_mixed=True)
    if not heads:
        m, c = max(1, 1 << c >> 3), min(c, 3)
    elif c == _PRODUCT_BITS:
        m, c = 2 * m, 3
    is_light = m <= _LIGHT_MATRIX
    columns = 64 if not is_wide and (m <= 16 or (is_light and c > 3)) else 32
    return schedule(m, c, columns, 4 if is_light else 2, is_unrolled=is_light)


@cache
def choose_quantized(heads: tuple[int, ...], column_bits: int, is_wide: bool) -> Schedule:
    """The schedule of programs that keep the fp32 results of their rows in registers.

    Args:
        heads, column_bits, is_wide: as for `choose`.
    """
    found = choose(heads, column_bits, is_wide, is_small=False)
    tiles = -(-found.matrix // 16)
    if tiles == 1:
        return found
    # For each tile a thread has half as many results as its warp has columns. More than 8 warps of 16 columns
    # could not exchange the bits that lie between them.
    columns = 16 if found.column_bits < 8 and (tiles > 8 or is_wide) else 32
    return schedule(found.matrix, found.column_bits, columns, 2 if found.column_bits > 3 else 128 // columns)


@cache
def choose_hopper(heads: tuple[int, ...], column_bits: int, is_small: bool) -> HopperSchedule | None:
    """The schedule for rows of 16-bit elements, as measured on an H100; None where `choose` has a better one.

    Args:
        heads, column_bits: as in `Steps`.
        is_small: as for `choose`.
    """
    m, n = prod(heads), prod(heads) << column_bits
    if n < 1 << 12 or (m <= _LIGHT_MATRIX and (n <= 1 << 14 or (is_small and not heads))):
        return None
    found = hopper_candidates(heads, column_bits)
    if is_small:
        found.sort(key=lambda each: (each.residents, each.rows))
    return found[0] if found else None


def hopper_candidates(heads: tuple[int, ...], column_bits: int) -> list[HopperSchedule]:
    """Schedules that fit a Hopper processor, the most promising first."""
    found = [
        HopperSchedule(prod(heads) << bits, column_bits - bits, rows, matrix_rows, stages, residents, parts)
        for bits in range(column_bits + 1)
        for rows in (1, 2, 4, 8)
        for matrix_rows in (64, 128)
        for stages in (2, 3, 4)
        for residents in (1, 2)
        for parts in (1, 2)
    ]
    # The last one of equal ones has the most stages.
    fitting = {each._replace(stages=0): each for each in found if _fits_hopper(each)}
    # Little arithmetic; programs that compute while others wait; rows on their way beside the next ones; long
    # products, which read H_m less often.
    return sorted(
        fitting.values(),
        key=lambda each: (
            round(each.cycles, 1),
            -each.residents,
            each.stages < 3,
            -each.parts,
            -(each.rows << each.column_bits) * each.matrix_rows,
            each.cycles,
        ),
    )


def _fits_hopper(schedule: HopperSchedule) -> bool:
    columns = schedule.rows << schedule.column_bits
    # A product's sums: 128 a thread, or 64 where there is more to hold.
    most = 256 * 64 if schedule.residents > 1 or schedule.tiles > 1 else 256 * 128
    return (
        4 <= schedule.column_bits <= 8
        and 32 <= schedule.matrix <= MAX_MATRIX
        and 128 <= columns
        and columns * schedule.matrix_rows <= most
        # Both groups of warps have rows, or both have columns.
        and (schedule.matrix_rows == 128 or schedule.rows > 1)
        and schedule.tiles * schedule.residents <= 3
        # Two programs' registers do not hold two parts, nor are halves of fewer columns worth a product.
        and (
            schedule.parts == 1
            or (columns == 256 and schedule.rows == schedule.tiles == schedule.residents == 1)
        )
        and (schedule.shared_bytes + 1024) * schedule.residents <= _SHARED_BYTES
        and schedule.cycles <= 0.31
    )


def schedule(
    m: int,
    c: int,
    columns: int,
    min_warps: int,
    is_mixed: bool = False,
    is_unrolled: bool = True,
) -> Schedule:
    """A schedule by the number of columns of a warp: rows of a program as many as its warps have room for.

    Args:
        m, c: as in `Schedule`.
        columns: of a warp, of one or several rows; at least 16. More where warps would be too many.
        min_warps: more are taken where one row needs more.
        is_mixed, is_unrolled: as in `Schedule`.
    """
    columns = max(columns, (1 << c) // _MAX_WARPS)
    num_warps = max(min_warps, (1 << c) // columns)
    return Schedule(m, c, (num_warps * columns) >> c, num_warps, is_mixed, is_unrolled)


def candidates(heads: tuple[int, ...], column_bits: int) -> list[Schedule]:
    """Schedules worth timing for rows of 16-bit elements, but for Hopper's."""
    m, c = prod(heads), column_bits
    if not heads and c >= 8:
        found = [
            schedule(16, c - 4, columns, min_warps, is_mixed=True)
            for columns in ((64, 128) if c >= 14 else (32, 64))
            for min_warps in (1, 8)
        ]
    else:
        if not heads:
            m, c = max(1, 1 << c >> 3), min(c, 3)
        elif c == _PRODUCT_BITS:
            m, c = 2 * m, 3
        found = [
            schedule(m, c, columns, min_warps, is_unrolled=m <= _LIGHT_MATRIX)
            for columns in (32, 64)
            if _fits_registers(m, columns)
            for min_warps in (2, 4)
        ]
    found += split_candidates(heads, column_bits)
    return [each for each in dict.fromkeys(found) if each.column_bits > 3 or each.rows >= 16]


def split_candidates(heads: tuple[int, ...], column_bits: int) -> list[Schedule]:
    """Schedules for few long rows."""
    found = []
    for bits in range(column_bits - _PRODUCT_BITS):
        m, c = prod(heads) << bits, column_bits - bits
        tiles = -(-m // 16)
        if not 2 <= tiles <= MAX_MATRIX // 16 or m << c < 1 << 12 or c > 9:
            continue
        for columns in (32, 64):
            if _fits_registers(m, columns):
                unsplit = schedule(m, c, columns, 1)
                found.append(unsplit._replace(split=tiles))
    return found


def quantized_candidates(heads: tuple[int, ...], column_bits: int) -> list[Schedule]:
    """Schedules whose programs can keep all results, 128 a thread at most."""
    found = [each._replace(split=1) for each in candidates(heads, column_bits)]
    fitting = [
        each
        for each in found
        if -(-each.matrix // 16) * (each.rows << each.column_bits) <= 256 * each.num_warps
    ]
    return list(dict.fromkeys([choose_quantized(heads, column_bits, False), *fitting]))


def _fits_registers(m: int, columns: int) -> bool:
    """Whether a thread's share of x and of one tile of the result does."""
    return (m + 47) // 16 * columns <= 640
