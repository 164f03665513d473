"""Hadamard matrices: orthogonal, of every order that models need, and composed as documented."""

from math import prod

import pytest
import torch

from hf_hadacore.errors import UnsupportedError
from hf_hadacore.hadamard_matrices import hadamard_factors, hadamard_matrix

MODEL_SIZES = {
    80: (80,),
    96: (96,),
    112: (112,),
    192: (12, 16),
    576: (36, 16),
    3072: (12, 256),
    4864: (76, 64),
    5120: (20, 256),
    6144: (12, 512),
    8960: (140, 64),
    10240: (20, 512),
    11008: (172, 64),
    13824: (108, 128),
    14336: (28, 512),
    18944: (148, 128),
    27648: (108, 256),
    28672: (28, 1024),
    29568: (44, 28, 24),
}


def is_orthogonal(h: torch.Tensor) -> bool:
    wide = h.double()  # BLAS; the sums are exact
    return h.abs().eq(1).all().item() and torch.equal(
        wide @ wide.T, h.shape[0] * torch.eye(h.shape[0]).double()
    )


@pytest.mark.parametrize("size", MODEL_SIZES)
def test_factors_of_model_sizes(size):
    factors = hadamard_factors(size)
    assert factors == MODEL_SIZES[size]
    assert prod(factors) == size
    assert all(is_orthogonal(hadamard_matrix(factor)) for factor in factors)


@pytest.mark.parametrize("exponent", range(21))
def test_powers_of_two_are_one_factor(exponent):
    assert hadamard_factors(2**exponent) == (2**exponent,)


def test_every_order_that_is_offered_is_orthogonal():
    unsupported = []
    for n in range(1, 600):
        try:
            h = hadamard_matrix(n)
        except UnsupportedError:
            unsupported.append(n)
            continue
        assert h.dtype == torch.int8 and is_orthogonal(h), n
        assert prod(hadamard_factors(n)) == n
    # What Paley's constructions do not reach, beside sizes that have no Hadamard matrix.
    missing = {n for n in unsupported if n % 4 == 0}
    expected = {
        116,
        156,
        188,
        232,
        236,
        260,
        268,
        292,
        324,
        356,
        372,
        376,
        404,
        412,
        428,
        436,
        452,
        472,
        476,
        508,
        520,
        532,
        536,
        584,
        596,
    }
    assert missing == expected


def test_largest_fields():
    for order in (924, 972):  # Paley II over GF(461), Paley I over GF(971)
        assert is_orthogonal(hadamard_matrix(order)), order


def test_sylvester_is_in_natural_order():
    h = hadamard_matrix(64)
    expected = [[(-1) ** (i & j).bit_count() for j in range(64)] for i in range(64)]
    assert h.tolist() == expected


def test_matrix_is_the_kronecker_product_of_its_factors():
    a, b, c = (hadamard_matrix(factor) for factor in hadamard_factors(6336))
    row = 4321
    i, j, k = row // 144, row // 12 % 12, row % 12
    assert torch.equal(hadamard_matrix(6336)[row], torch.kron(torch.kron(a[i], b[j]), c[k]))


def test_what_is_cached_does_not_depend_on_who_asks_first():
    with torch.device("meta"), torch.inference_mode():
        h = hadamard_matrix(60)
    assert h.device.type == "cpu" and not h.is_inference()


@pytest.mark.parametrize(
    ("n", "parts"),
    [
        (3, ("order 3", "2 and 4")),
        (6, ("4 and 8", "block_size=2")),
        (116, ("112 and 120", "block_size=4")),
        (14337, ("14336 and ",)),
        (4 * 1000003, ("block_size=4",)),
        (0, ("at least 1", "found 0")),
        (-4, ("at least 1",)),
    ],
)
def test_impossible_sizes_say_what_works(n, parts):
    with pytest.raises(UnsupportedError) as error:
        hadamard_factors(n)
    assert all(part in str(error.value) for part in parts), str(error.value)
