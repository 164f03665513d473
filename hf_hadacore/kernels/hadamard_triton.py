"""Launches the Hadamard transform's Gluon kernels, `hadamard_gluon`, on NVIDIA GPUs with bf16 tensor cores.

Where there are none, `hadamard_products` takes their place.
"""

from functools import cache
from math import prod
from typing import Any

import torch

from ..hadamard_matrices import hadamard_matrix
from . import hadamard_schedules as schedules
from .hadamard_products import transform_by_products
from .launcher import has_pdl, pdl_options, run
from .rotate_quantize_checks import bits_of
from .w4a16_launch import processors_of

# Intermediate results of sizes that take several passes stay in the L2 cache: rows are transformed in groups.
_WORKSPACE_BYTES = 1 << 24
_OPTIONS = pdl_options()
# Columns of a program of the passes over leading factors, and its warps.
_COLUMNS, _COLUMN_WARPS = 64, 4
# Of a program of `hadamard_hopper`, which is made for two groups of four.
_HOPPER_WARPS = 8


def launch(
    x: torch.Tensor,
    out: torch.Tensor,
    *,
    factors: tuple[int, ...],
    scale: float,
    sign: torch.Tensor | None = None,
    transpose: bool = False,
    schedule: schedules.Schedule | schedules.HopperSchedule | None = None,
) -> None:
    """out = scale * H (sign * x) per row, on the current device.

    Args:
        x: fp16, bf16 or fp32 CUDA tensor ``[rows, n]``; fastest if rows begin at multiples of 16 bytes.
        out: of the same shape and dtype, rows that do not overlap; x itself is fine.
        factors: as `hadamard_matrices.hadamard_factors(n)` gives them.
        scale: in front of H; n**-0.5 makes it a rotation.
        sign: ``[n]`` of +1 and -1 in the dtype of x, or None.
        transpose: H^T instead of H.
        schedule: for tuning; chosen by size if None.
    """
    rows, n = x.shape
    if rows == 0:
        return
    # Tensor cores add in fp32, but do not round as fp32 sums are rounded, which fp32 results would show.
    if not _has_kernel(x.device) or out.dtype == torch.float32:
        transform_by_products(x, out, factors=factors, scale=scale, sign=sign, transpose=transpose)
        return
    steps = schedules.steps_of(factors)
    if n > 1 and x.stride(1) != 1:
        x = x.contiguous()
    if (n > 1 and out.stride(1) != 1) or (steps.leading and not out.is_contiguous()):
        result = torch.empty_like(out, memory_format=torch.contiguous_format)
        launch(x, result, factors=factors, scale=scale, sign=sign, transpose=transpose, schedule=schedule)
        out.copy_(result)
        return
    if not steps.leading:
        _transform_rows(x, out, steps, scale, sign, transpose, schedule)
        return
    group = min(rows, max(1, _WORKSPACE_BYTES // (4 * n)))
    workspace = torch.empty((group, n), dtype=torch.float32, device=x.device)
    for part, result in zip(x.split(group), out.split(group), strict=True):
        source, signs, inner = part, sign, n
        for order in steps.leading:
            target = workspace[: len(part)].view(-1, inner)
            _transform_columns(source, target, order, signs, transpose)
            inner //= order
            source, signs = target.view(-1, inner), None
        _transform_rows(source, result.view(-1, inner), steps, scale, None, transpose, schedule)


def quantizes(x: torch.Tensor, factors: tuple[int, ...]) -> bool:
    """Whether `launch_quantized` takes rows of this size on this device, but for the 8-bit dtype."""
    return _has_kernel(x.device) and not schedules.steps_of(factors).leading


def launch_quantized(
    x: torch.Tensor,
    values: torch.Tensor,
    scale: torch.Tensor,
    *,
    factors: tuple[int, ...],
    largest: float,
    smallest: float,
    power_of_2: bool = False,
    sign: torch.Tensor | None = None,
    schedule: schedules.Schedule | None = None,
) -> None:
    """H (sign * x) / sqrt(n) per row as 8-bit values with a scale, on the current device.

    Args:
        x: as for `launch`, with at least one row.
        values: 8-bit ``[rows, n]``, contiguous.
        scale: fp32 ``[rows]``, contiguous.
        factors: as for `launch`; `quantizes` says of which.
        largest: of the dtype of values.
        smallest: a maximum that is below this counts as this, before the division by sqrt(n).
        power_of_2: round scales up to powers of two.
        sign: ``[n]`` of +1 and -1, or None.
        schedule: for tuning; chosen by size if None.
    """
    from .hadamard_quantize import quantize_rows_kernel

    rows = x.shape[0]
    if x.stride(1) != 1:
        x = x.contiguous()
    steps = schedules.steps_of(factors)
    is_wide = x.dtype == torch.float32
    if schedule is None:
        schedule = schedules.choose_quantized(steps.heads, steps.column_bits, is_wide)
    orders = (*steps.heads, schedule.matrix // prod(steps.heads))
    matrix = _packed_matrix(orders, schedule.is_mixed, False, x.dtype, x.device)
    unit = _unit(x.stride(0))
    options = (schedule.is_mixed, 2 if is_wide else 1, unit, largest, bits_of(smallest), power_of_2)
    _run(
        quantize_rows_kernel,
        (x, values, scale, matrix, sign),
        (rows, x.stride(0) // unit),
        (schedule.matrix, schedule.column_bits, schedule.rows, *options),
        -(-rows // schedule.rows),
        schedule.num_warps,
    )


def _transform_rows(
    x: torch.Tensor,
    out: torch.Tensor,
    steps: schedules.Steps,
    scale: float,
    sign: torch.Tensor | None,
    transpose: bool,
    schedule: schedules.Schedule | schedules.HopperSchedule | None,
) -> None:
    from .hadamard_gluon import rows_kernel
    from .hadamard_hopper import hopper_kernel

    rows = x.shape[0]
    terms, later_terms = _terms(x, out)
    unit = _unit(x.stride(0), out.stride(0))
    is_aligned = unit == 8 and (x.data_ptr() | out.data_ptr()) % 16 == 0
    is_small = x.numel() <= schedules.SMALL
    if schedule is None and is_aligned and terms == 1 and _is_hopper(x.device):
        schedule = schedules.choose_hopper(steps.heads, steps.column_bits, is_small)
    if schedule is None:
        schedule = schedules.choose(steps.heads, steps.column_bits, x.dtype == torch.float32, is_small)
    orders = (*steps.heads, schedule.matrix // prod(steps.heads))
    sizes = (rows, x.stride(0) // unit, out.stride(0) // unit, scale)
    programs = -(-rows // schedule.rows)
    if isinstance(schedule, schedules.Schedule) and x.data_ptr() == out.data_ptr():
        schedule = schedule._replace(split=1)
    m, c = schedule.matrix, schedule.column_bits
    if isinstance(schedule, schedules.HopperSchedule):
        matrix = _padded_matrix(orders, schedule.matrix_rows, transpose, x.dtype, x.device)
        constants = (m, c, schedule.rows, schedule.matrix_rows, schedule.stages, schedule.parts)
        programs = min(programs, schedule.residents * processors_of(x.device.index or 0))
        _run(hopper_kernel, (x, out, matrix, sign), sizes, constants, programs, _HOPPER_WARPS)
        return
    matrix = _packed_matrix(orders, schedule.is_mixed, transpose, x.dtype, x.device)
    options = (schedule.is_mixed, terms, later_terms, unit, schedule.is_unrolled, schedule.split)
    _run(
        rows_kernel,
        (x, out, matrix, sign),
        sizes,
        (m, c, schedule.rows, *options),
        programs * schedule.split,
        schedule.num_warps,
    )


def _transform_columns(
    x: torch.Tensor, out: torch.Tensor, order: int, sign: torch.Tensor | None, transpose: bool
) -> None:
    """out = H_order (sign * x), each row being a matrix ``[order, n / order]``; out is fp32."""
    from .hadamard_gluon import columns_kernel

    rows, n = x.shape
    inner = n // order
    blocks = -(-inner // _COLUMNS)
    unit = _unit(x.stride(0), out.stride(0), inner)
    _run(
        columns_kernel,
        (x, out, _packed_matrix((order,), False, transpose, x.dtype, x.device), sign),
        (inner // unit, blocks, x.stride(0) // unit, out.stride(0) // unit, 1.0),
        (order, _COLUMNS, _terms(x, out)[0], unit),
        rows * blocks,
        _COLUMN_WARPS,
    )


def _run(
    kernel: Any,
    tensors: tuple[torch.Tensor | None, ...],
    sizes: tuple[int | float, ...],
    constants: tuple[Any, ...],
    programs: int,
    num_warps: int,
) -> None:
    pdl = has_pdl(tensors[0].device) if tensors[0] is not None else False
    constants = (*constants, pdl)
    run(kernel, tensors, sizes, constants, (programs, 1, 1), num_warps=num_warps, **_OPTIONS[pdl])


def _terms(x: torch.Tensor, out: torch.Tensor) -> tuple[int, int]:
    """bf16 terms of x and of intermediate values that leave no error beside the rounding of the result.

    Intermediate fp32 results of sizes that take several passes keep all 24 bits.
    """
    later = 3 if x.dtype == out.dtype == torch.float32 else 2
    return 1 if x.dtype != torch.float32 else later, later


def _unit(*strides: int) -> int:
    """Strides are given in this unit, so that kernels know when 16-byte accesses are aligned."""
    return 8 if all(stride % 8 == 0 for stride in strides) else 1


@cache
def _has_kernel(device: torch.device) -> bool:
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


@cache
def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


@cache
def _packed_matrix(
    orders: tuple[int, ...], is_mixed: bool, transpose: bool, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """The Kronecker product of the matrices of some orders as `pack` puts it, on a device."""
    dtype = torch.bfloat16 if dtype == torch.float32 else dtype
    return pack(_product(orders, transpose), is_mixed).to(device, dtype)


@cache
def _padded_matrix(
    orders: tuple[int, ...], rows: int, transpose: bool, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """The same, row by row; rows are rounded up to a multiple of some, columns of 16, with zeros."""
    m = prod(orders)
    padded = torch.zeros(-(-m // rows) * rows, -(-m // 16) * 16, dtype=torch.int8)
    padded[:m, :m] = _product(orders, transpose)
    return padded.to(device, dtype)


def _product(orders: tuple[int, ...], transpose: bool) -> torch.Tensor:
    matrix = torch.ones(1, 1, dtype=torch.int8)
    for order in orders:
        matrix = torch.kron(matrix, hadamard_matrix(order))
    return matrix.T if transpose else matrix


def pack(matrix: torch.Tensor, is_mixed: bool) -> torch.Tensor:
    """A matrix in the order in which threads hold the operand of ``mma.m16n8k16``.

    Args:
        matrix: ``[m, m]``.
        is_mixed: bits of rows and columns are numbered as `hadamard_layouts.natural_order` does in this case.

    Returns:
        ``[m / 16, m / 16, 256]``, m rounded up to a multiple of 16 and filled with zeros; the last dimension
        holds each lane's 8 elements of 16 rows and columns.
    """
    m = matrix.shape[0]
    tiles = -(-m // 16)
    padded = matrix.new_zeros(16 * tiles, 16 * tiles)
    padded[:m, :m] = matrix
    bits = [torch.arange(256) >> j & 1 for j in range(8)]
    # Elements: input bit 0, result bit 3, input bit 3; lanes: input bits 1 and 2, result bits 0 to 2.
    inputs, results = (bits[0], bits[3], bits[4], bits[2]), (bits[5], bits[6], bits[7], bits[1])
    if is_mixed:
        column = _number(inputs)
        row = _number((results[3], *results[:3]))
    else:
        column = _number((inputs[1], inputs[2], inputs[0], inputs[3]))
        row = _number(results)
    blocks = padded.view(tiles, 16, tiles, 16).transpose(1, 2)
    return blocks[:, :, row, column].contiguous()


def _number(bits: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return torch.stack([bit << j for j, bit in enumerate(bits)]).sum(0)
