"""Hadamard matrices of every order that models need, constructed, and how a size is composed of small ones.

A Hadamard matrix of order m has entries of +1 and -1 and H H^T = m I. Orders 2^k are Sylvester's in natural
order, ``H[i, j] = (-1)^popcount(i & j)``. Others come from Paley's two constructions over a finite field
(R. E. A. C. Paley, "On orthogonal matrices", 1933), from Williamson's four circulant matrices (J. Williamson,
"Hadamard's determinant theorem and the sum of four squares", 1944), and from Kronecker products of these.
"""

from collections.abc import Iterator
from functools import cache
from itertools import product
from math import prod

import torch

from .errors import UnsupportedError

# A larger factor costs more arithmetic than fits beside one pass over memory: taken only if nothing else is.
_MAX_FACTOR = 256
_MAX_ORDER = 1024
# The fewest rows that a tensor core takes: a smaller power of two joins another factor.
_MIN_FACTOR = 16

# Bit j of a number: whether element j of the first row is -1. Found by a search over symmetric rows; those of
# 43 are constant on the cosets of the group of order 6, as Williamson's are.
_WILLIAMSON_ROWS = {
    23: (321312, 4610658, 5782554, 6651558),
    43: (340587130656, 1981388991288, 2773233490452, 5464557920754),
}


def hadamard_factors(n: int) -> tuple[int, ...]:
    """The orders (f1, f2, ...) with H_n = H_f1 ⊗ H_f2 ⊗ ..., f1 belonging to the slowest index.

    2^k is its own only factor, (2^k,). Otherwise n = s * 2^k with s odd, and s = s1 * s2 * ... is split so
    that each si * 2^j, with the smallest j that gives one, is the order of a Paley or Williamson matrix. Of
    the splits for which 2^k suffices the one is taken that has, in this order: no factor above 256; fewest
    elements once each factor is padded to a power of two; one factor beside 2^k; smallest largest factor
    (Sylvester's left out); fewest factors. Factors go from large to small. What is left of 2^k comes last,
    and if it is below 16 it joins the factor before: 44, 28, 12 and 2 become (44, 28, 24).

    Args:
        n: the size, at least 1.

    Raises:
        UnsupportedError: no Hadamard matrix of this order can be built here.
    """
    factors = _factors(n) if n >= 1 else None
    if factors is None:
        raise UnsupportedError(_why_not(n))
    return factors


def has_hadamard_matrix(n: int) -> bool:
    """Whether `hadamard_factors` knows a Hadamard matrix of this order.

    Args:
        n: the size.
    """
    return n >= 1 and _factors(n) is not None


def hadamard_matrix(n: int) -> torch.Tensor:
    """The matrix that `hadamard_factors` stands for.

    Returns:
        int8 ``[n, n]`` of +1 and -1. Up to n = 1024 it is cached: not to be written to.

    Raises:
        UnsupportedError: as `hadamard_factors` does.
    """
    return _cached_matrix(n) if n <= _MAX_ORDER else _matrix(n)


def _matrix(n: int) -> torch.Tensor:
    factors = hadamard_factors(n)
    # Whoever asks first may be building a model on the meta device or be in inference mode; this is cached.
    with torch.device("cpu"), torch.inference_mode(False):
        if len(factors) > 1:
            return _kronecker([hadamard_matrix(factor) for factor in factors])
        order = _core_order(_odd_part(n)) or 1
        core = torch.ones(1, 1, dtype=torch.int8) if order == 1 else _core(order)
        return _kronecker([core, _sylvester(n // order)])


_cached_matrix = cache(_matrix)


@cache
def _factors(n: int) -> tuple[int, ...] | None:
    odd = _odd_part(n)
    if odd == 1:
        return (n,)
    candidates = [
        _merged(sorted(orders, reverse=True), n // prod(orders))
        for orders in _core_splits(odd, odd)
        if n % prod(orders) == 0
    ]
    return min(candidates, key=_preference, default=None)


def _merged(cores: list[int], left: int) -> tuple[int, ...]:
    if left >= _MIN_FACTOR:
        return (*cores, left)
    return (*cores[:-1], cores[-1] * left)


def _preference(factors: tuple[int, ...]) -> tuple:
    padded = [_next_power_of_two(factor) for factor in factors]
    largest = max(size for size, factor in zip(padded, factors, strict=True) if _odd_part(factor) > 1)
    is_pair = len(factors) == 2 and _odd_part(factors[1]) == 1
    return largest > _MAX_FACTOR, prod(padded), not is_pair, largest, len(factors), factors


def _core_splits(odd: int, largest: int) -> Iterator[list[int]]:
    """Every way to write `odd` as a product of numbers up to `largest`, as the orders that they give."""
    if odd == 1:
        yield []
    for part in range(3, min(odd, largest, _MAX_ORDER // 4) + 1, 2):
        order = _core_order(part) if odd % part == 0 else None
        if order is not None:
            for rest in _core_splits(odd // part, part):
                yield [order, *rest]


@cache
def _core_order(odd: int) -> int | None:
    """The smallest order odd * 2^j that has a construction of its own."""
    order = 4 * odd
    while order <= _MAX_ORDER and odd > 1:
        if order // 4 in _WILLIAMSON_ROWS or _paley_field(order) is not None:
            return order
        order *= 2
    return None


def _paley_field(order: int) -> tuple[int, int] | None:
    """(p, k) of the field GF(p^k) of Paley's construction: I if it has order - 1 elements, else II."""
    return _prime_power(order - 1, 3) or _prime_power(order // 2 - 1, 1)


def _prime_power(q: int, remainder: int) -> tuple[int, int] | None:
    """(p, k) if q is p^k and leaves this remainder modulo 4."""
    if q < 2 or q % 4 != remainder:
        return None
    prime = next((p for p in range(3, int(q**0.5) + 1, 2) if q % p == 0), q)
    exponent = 1
    while prime**exponent < q:
        exponent += 1
    return (prime, exponent) if prime**exponent == q else None


def _core(order: int) -> torch.Tensor:
    if order // 4 in _WILLIAMSON_ROWS:
        return _williamson(order // 4)
    field = _paley_field(order)
    assert field is not None, "only orders of _core_order get here"
    q = field[0] ** field[1]
    # Q bordered: [[0, 1], [±1, Q]], antisymmetric for Paley I, symmetric for Paley II.
    conference = torch.zeros(q + 1, q + 1, dtype=torch.int8)
    conference[0, 1:] = 1
    conference[1:, 0] = 1 if q % 4 == 1 else -1
    conference[1:, 1:] = _jacobsthal(*field)
    eye = torch.eye(q + 1, dtype=torch.int8)
    if order == q + 1:
        return conference + eye
    off_diagonal = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)
    diagonal = torch.tensor([[1, -1], [-1, -1]], dtype=torch.int8)
    return torch.kron(conference, off_diagonal) + torch.kron(eye, diagonal)


def _jacobsthal(p: int, k: int) -> torch.Tensor:
    """Q[a, b] = 0 if a = b, 1 if a - b is a square of GF(p^k), -1 if not; int8 ``[p^k, p^k]``."""
    character = _quadratic_character(p, k)
    elements = torch.tensor(list(product(range(p), repeat=k)))
    lookup = torch.tensor(
        [character.get(element, 0) for element in product(range(p), repeat=k)], dtype=torch.int8
    )
    radix = torch.tensor([p**i for i in reversed(range(k))])
    differences = (elements[:, None] - elements[None]) % p
    return lookup[(differences * radix).sum(-1)]


def _quadratic_character(p: int, k: int) -> dict[tuple[int, ...], int]:
    """1 for the squares and -1 for the others of GF(p^k), whose elements are polynomials of k coefficients.

    The powers of x modulo a polynomial x^k - c of degree k run through the whole field if, and only if, that
    polynomial is primitive; then the even powers are the squares.
    """
    for c in product(range(p), repeat=k):
        character: dict[tuple[int, ...], int] = {}
        element, sign = (1, *(0,) * (k - 1)), 1
        while element not in character:
            character[element] = sign
            top, shifted = element[-1], (0, *element[:-1])
            element = tuple((a + top * b) % p for a, b in zip(shifted, c, strict=True))
            sign = -sign
        if len(character) == p**k - 1 and not all(a == 0 for a in element):
            return character
    raise AssertionError("every finite field has a primitive polynomial")


def _williamson(n: int) -> torch.Tensor:
    """Order 4n: four symmetric circulants with A² + B² + C² + D² = 4n I in the pattern of a quaternion."""
    shift = (torch.arange(n)[None] - torch.arange(n)[:, None]) % n
    first_rows = [torch.tensor([-1 if row >> j & 1 else 1 for j in range(n)]) for row in _WILLIAMSON_ROWS[n]]
    a, b, c, d = (row.to(torch.int8)[shift] for row in first_rows)
    blocks = [[a, b, c, d], [-b, a, -d, c], [-c, d, a, -b], [-d, -c, b, a]]
    return torch.cat([torch.cat(row, dim=1) for row in blocks])


def _sylvester(n: int) -> torch.Tensor:
    return _kronecker([torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)] * (n.bit_length() - 1))


def _kronecker(matrices: list[torch.Tensor]) -> torch.Tensor:
    result = torch.ones(1, 1, dtype=torch.int8)
    for matrix in matrices:
        result = torch.kron(result, matrix)
    return result


def _odd_part(n: int) -> int:
    return n // (n & -n)


def _next_power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _why_not(n: int) -> str:
    if n < 1:
        return f"a Hadamard transform needs a size of at least 1, found {n}"
    # Multiples of this step are small numbers times a power of two, where sizes that work lie close together.
    step = max(4, _next_power_of_two(n) // 256)
    below = next(size for size in (*range(n // step * step, 0, -step), 2) if _factors(size))
    above = next(size for size in range(-(-n // step) * step, 2 * n + 4, step) if _factors(size))
    message = (
        f"no Hadamard matrix of order {n} can be built; the nearest sizes that work are {below} and {above}"
    )
    block = n & -n
    if block > 1:
        message += f", and block_size={block} transforms blocks of {block} elements instead"
    return message
