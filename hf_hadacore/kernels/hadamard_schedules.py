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
        streams: programs that a processor runs at the same time, each transforming one tile of rows after the
            other while it loads the next (`hadamard_streamed`, mixed only); 0 for a program a tile.
    """

    matrix: int
    column_bits: int
    rows: int
    num_warps: int
    is_mixed: bool
    is_unrolled: bool
    streams: int = 0


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
def choose(heads: tuple[int, ...], column_bits: int, is_wide: bool) -> Schedule:
    """The schedule for rows of prod(heads) * 2^column_bits elements.

    Args:
        heads, column_bits: as in `Steps`.
        is_wide: x is fp32.
    """
    m, c = prod(heads), column_bits
    if not heads and c >= 8:
        if c == 15 and not is_wide:
            return schedule(128, 8, 32, 8, is_unrolled=False)
        wide_rows = c in (11, 13, 14, 15) and not is_wide
        return schedule(16, c - 4, 128 if wide_rows else 64, 4, is_mixed=True)
    if not heads:
        m, c = max(1, 1 << c >> 3), min(c, 3)
    elif c == _PRODUCT_BITS:
        m, c = 2 * m, 3
    columns = 64 if m <= 32 and not is_wide else 32
    return schedule(m, c, columns, 4, is_unrolled=m <= 32)


def schedule(
    m: int,
    c: int,
    columns: int,
    min_warps: int,
    is_mixed: bool = False,
    is_unrolled: bool = True,
    streams: int = 0,
) -> Schedule:
    """A schedule by the number of columns of a warp: rows of a program as many as its warps have room for.

    Args:
        m, c: as in `Schedule`.
        columns: of a warp, of one or several rows; at least 16.
        min_warps: more are taken where one row needs more.
        is_mixed, is_unrolled, streams: as in `Schedule`.
    """
    num_warps = max(min_warps, (1 << c) // columns)
    return Schedule(m, c, (num_warps * columns) >> c, num_warps, is_mixed, is_unrolled, streams)


def candidates(heads: tuple[int, ...], column_bits: int) -> list[Schedule]:
    """Schedules worth timing for rows of 16-bit elements."""
    m, c = prod(heads), column_bits
    mixed: list[Schedule] = []
    if heads:
        splits = [(m << a, c - a) for a in range(2) if c >= a]
    elif c < 8:
        splits = [(max(1, 1 << c >> 3), min(c, 3))]
    else:
        splits = [(1 << a, c - a) for a in (6, 7) if c >= 13]
        mixed = [
            schedule(16, c - 4, columns, num_warps, is_mixed=True, streams=streams)
            for columns in (64, 128)
            for num_warps in (1, 2, 4, 8)
            for streams in ((0, 1, 2, 3, 4) if c >= 12 else (0, 8 if columns == 64 else 4) if c > 8 else (0,))
        ]
    others = [
        schedule(matrix, rest, columns, num_warps, is_unrolled=is_unrolled)
        for matrix, rest in splits
        for columns in ((64, 128) if matrix <= 16 else (32, 64))
        # A thread's share of x and of one tile of the result must fit its registers.
        if matrix <= MAX_MATRIX and rest != _PRODUCT_BITS and (matrix + 47) // 16 * columns <= 640
        for num_warps in (2, 4, 8)
        for is_unrolled in ((True,) if matrix <= 16 else (True, False) if matrix <= 64 else (False,))
    ]
    return [
        each
        for each in dict.fromkeys(mixed + others)
        if each.num_warps <= 16 and (each.column_bits > 3 or each.rows >= 16)
    ]
