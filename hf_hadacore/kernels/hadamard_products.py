"""The Hadamard transform through torch's matrix products: on the CPU, and on GPUs without a kernel for it."""

from functools import lru_cache

import torch

from ..hadamard_matrices import hadamard_matrix

# Bytes to work on at a time: two buffers of them fit the caches of a CPU.
_CHUNK_BYTES = 1 << 20
# Powers of two up to this one are one matrix product; larger ones are split into factors of 8 to 32.
_MAX_DENSE = 64


def transform_by_products(
    x: torch.Tensor,
    out: torch.Tensor,
    *,
    factors: tuple[int, ...],
    scale: float,
    sign: torch.Tensor | None,
    transpose: bool,
) -> None:
    """out = scale * H (sign * x) per row through torch's matrix products, in chunks of bounded memory.

    Args:
        x, out: ``[rows, n]``; out may be x.
        factors: as `hadamard_factors(n)` gives them.
        scale: in front of H.
        sign: ``[n]`` or None.
        transpose: H^T instead of H.
    """
    rows, n = x.shape
    # Sums of 32 products lose more of fp32 than a butterfly does, and what the user allows fp32 products to
    # be (TF32, bf16) is not meant for a rotation.
    backend = torch.backends.cuda if x.is_cuda else torch.backends.mkldnn
    fits = x.dtype != torch.float32 and backend.matmul.fp32_precision in ("none", "ieee")
    dtype = torch.float32 if fits else torch.float64
    matrices = _matrices(factors, scale, dtype, transpose, x.device)
    step = max(1, _CHUNK_BYTES // (dtype.itemsize * n))
    buffers = torch.empty((2, min(step, rows) * n), dtype=dtype, device=x.device)
    for part, result in zip(x.split(step), out.split(step), strict=True):
        source, target = buffers[:, : part.numel()]
        source.view_as(part).copy_(part)
        if sign is not None:
            source.view_as(part).mul_(sign)
        inner = n
        for matrix in matrices:
            order = matrix.shape[0]
            inner //= order
            # `out=` also keeps autocast away.
            if inner == 1:  # [rows * outer, order] @ [order, order]
                torch.mm(source.view(-1, order), matrix, out=target.view(-1, order))
            else:  # [order, order] @ [rows * outer, order, inner]
                columns = source.view(-1, order, inner)
                left = matrix.T.expand(columns.shape[0], order, order)
                torch.bmm(left, columns, out=target.view_as(columns))
            source, target = target, source
        result.copy_(source.view_as(part))


@lru_cache(maxsize=32)
def _matrices(
    factors: tuple[int, ...], scale: float, dtype: torch.dtype, transpose: bool, device: torch.device
) -> list[torch.Tensor]:
    """What rows are multiplied by from the right, axis by axis.

    They stay on the device, since a CUDA graph cannot record a copy from the CPU.
    """
    matrices = [hadamard_matrix(order).to(dtype) for order in _small_factors(factors)]
    # First, so that sums of large numbers overflow no earlier than the result.
    matrices[0] *= scale
    return [(matrix if transpose else matrix.T).to(device) for matrix in matrices]


def _small_factors(factors: tuple[int, ...]) -> tuple[int, ...]:
    """The factors with large powers of two split further, which Sylvester's matrices allow anywhere."""
    *others, last = factors
    if last & (last - 1) or last <= _MAX_DENSE:
        return factors
    exponent = last.bit_length() - 1
    parts = -(-exponent // 5)
    return (*others, *(1 << (exponent + i) // parts for i in range(parts)))
