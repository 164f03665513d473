"""Runs the kernels of GPTQ's columns under Triton's interpreter; test_gptq_columns.py starts it.

Where every operation is exact, all bits must be those of the loops in torch. Elsewhere the interpreter rounds
products before it adds them, as the kernels do, and torch's loops on a CPU do not: a value within that noise
of a tie may go either way, and takes the rest of its row along.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import itertools
from unittest.mock import patch

import torch
from gptq_cases import ORDERS, Chunk, correlated, exact_chunk, options_of, weights

from hf_hadacore.kernels import gptq_columns
from hf_hadacore.solvers import columns as loops
from hf_hadacore.solvers import coordinate_descent, gptq

# Of the whole numbers and a half at which rounding turns: far beyond noise, and hit by few.
NEAR_TIE = 1e-4


def framed(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A tensor of NaN, and as a part of it a place for one more."""
    frame = torch.full((len(tensor) + 2, *tensor.shape[1:]), float("nan"))
    return frame, frame[1:-1]


def is_framed(frame: torch.Tensor) -> bool:
    return bool(frame[0].isnan().all() and frame[-1].isnan().all() and frame[1:-1].isfinite().all())


def round_both(chunk: Chunk) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """c and difference of the kernel and the loop."""
    results = []
    for function in (gptq_columns.round_columns, loops.round_columns_reference):
        (frame_c, c), (frame_d, difference) = framed(chunk.values), framed(chunk.values)
        function(chunk.values.clone(), *chunk[1:6], c, difference)
        assert is_framed(frame_c) and is_framed(frame_d)
        results.append((c, difference))
    return results


def descend_both(chunk: Chunk) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """c and gradient of the kernel and the loop; the chunk is of one group."""
    hessian = chunk.matrix + chunk.matrix.triu(1).T
    # A power of two, by which everything can be divided.
    hessian.diagonal().fill_(4)
    results = []
    for function in (gptq_columns.descend_columns, loops.descend_columns_reference):
        (frame_c, c), (frame_g, gradient) = framed(chunk.c), framed(chunk.values)
        c.copy_(chunk.c)
        gradient.copy_(chunk.values)
        function(gradient, hessian, chunk.scale[0], chunk.zero[0], c)
        assert is_framed(frame_c) and is_framed(frame_g)
        results.append((c, gradient))
    return results


def check_exact(columns: int, rows: int, symmetric: bool) -> None:
    for groups, both in ((3, round_both), (1, descend_both)):
        kernel, loop = both(exact_chunk(columns, rows, groups, symmetric, seed=columns + rows))
        assert all(map(torch.equal, kernel, loop)), (both.__name__, columns, rows, groups, symmetric)


def check_rounded(rows: int) -> None:
    """Where nothing is exact: rows without a value near a tie."""
    k = 128
    lower = torch.linalg.cholesky(correlated(k) + 0.01 * torch.eye(k))
    factor = (lower / lower.diagonal()).T
    target = weights(k, rows)
    # As it is stored: its products with integers are exact.
    scale = (torch.rand(2, rows) * 0.005 + 0.002).half().float()
    zero = torch.randint(16, (2, rows)).float()
    chunk = Chunk(target.clone(), target, factor, scale, zero, torch.randint(2, (k,)), target)
    kernel, loop = round_both(chunk)
    difference = loop[1].double()
    exact = target.double() + factor.double().triu(1).T @ difference
    quotient = exact / scale[chunk.group].double()
    is_far = ((quotient - quotient.floor() - 0.5).abs() > NEAR_TIE).all(0)
    assert is_far.double().mean() > 0.9
    assert all(torch.equal(a[:, is_far], b[:, is_far]) for a, b in zip(kernel, loop, strict=True))


def check_solver(kind: str, group_size: int, symmetric: bool) -> None:
    """All of GPTQ and coordinate descent, with channels that calibration has not seen."""
    hessian = correlated(136)
    hessian[:5], hessian[:, :5] = 0, 0
    weight = weights(29, 136, torch.float16)
    weight[3] = 0
    weight[5, 7] = 1

    def solve() -> gptq.GptqResult:
        return gptq.gptq_quantize(
            weight, hessian, group_size=group_size, symmetric=symmetric, **options_of(kind, hessian)
        )

    loop = solve()
    with (
        patch.object(gptq, "round_columns", gptq_columns.round_columns),
        patch.object(coordinate_descent, "descend_columns", gptq_columns.descend_columns),
    ):
        kernel = solve()
    parts = [(a, b) for a, b in zip(kernel.weight[:3], loop.weight[:3], strict=True) if a is not None]
    equal_rows = torch.stack([(a == b).all(dim=1) for a, b in parts]).all(dim=0)
    assert equal_rows.double().mean() > 0.9, (kind, group_size, symmetric)
    assert abs(kernel.error / loop.error - 1) < 0.01


if __name__ == "__main__":
    torch.manual_seed(0)
    for size, symmetric in itertools.product([(8, 1), (40, 35)], (False, True)):
        check_exact(*size, symmetric)
    check_exact(128, 7, symmetric=False)
    check_rounded(30)
    # Groups of which the last is short, and rows that are one group and two chunks.
    for kind, group_size in zip((*ORDERS, "natural"), (32, 32, 128, -1), strict=True):
        check_solver(kind, group_size, symmetric=group_size == -1)
    print("interpreted gptq_columns")
