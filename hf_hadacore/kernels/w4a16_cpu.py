"""int4 products on the CPU, through torch's own kernels.

Decoding (few tokens, bf16) reads the weight in the order of torch's int4 kernel,
`aten::_weight_int4pack_mm_for_cpu`. Everything else dequantizes blocks of rows, with FBGEMM's 4-bit row
decoder (`quantized::embedding_bag_4bit_unpack`), and multiplies them with a dense product.
"""

import math
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .. import int4
from ..int4 import Int4Weight

# Above this many tokens dequantizing first is faster (measured on two AVX-512 cores).
MAX_DECODE_TOKENS = 16
# Sizes that torch's kernel takes, and what it wants N to be a multiple of.
_KERNEL_GROUPS = (32, 64, 128, 256)
_ROW_MULTIPLE = 16
# Elements that are dequantized at a time: 32 MB in fp32, several times smaller than a large layer.
_BLOCK_ELEMENTS = 1 << 23

torch.library.define(
    "hf_hadacore::w4a16_decode_cpu",
    "(Tensor x, Tensor tiles, Tensor scales_zeros, Tensor? bias, int group_size, int out_features) -> Tensor",
)


class CpuPackedWeight(NamedTuple):
    """A weight in the order that torch's int4 CPU kernel reads.

    Attributes:
        tiles: uint8 ``[N', K'/2]``, N' and K' padded, in an order that depends on the machine.
        scales_zeros: bf16 ``[K'/g, N', 2]``; w = (q - 8) * scale + zero.
        group_size: g as the kernel counts it.
        out_features: N.
    """

    tiles: torch.Tensor
    scales_zeros: torch.Tensor
    group_size: int
    out_features: int


def pack_for_cpu(weight: Int4Weight) -> CpuPackedWeight:
    """Reorder a weight for torch's int4 CPU kernel.

    Args:
        weight: ``[N, K/8]`` on the CPU.

    Returns:
        The reordered copy: the same nibbles, and ``zero = (8 - z) * scale`` rounded to bf16, which adds
        to the error of asymmetric weights (about a fifth of the result's own rounding).
    """
    n, k = weight.packed.shape[0], weight.in_features
    # One scale per row, or a row shorter than its group: any group size of the kernel's serves.
    size = weight.group_size if weight.group_size in _KERNEL_GROUPS else 128
    pad_n, pad_k = -n % _ROW_MULTIPLE, -k % size
    q = F.pad(int4.unpack(weight.packed).to(torch.int32), (0, pad_k, 0, pad_n))
    scale, zero = weight.scale.float(), weight.zero
    offset = torch.zeros_like(scale) if zero is None else (8.0 - zero.float()) * scale
    both = torch.stack((scale, offset), dim=-1)
    if scale.shape[1] == 1:
        both = both.expand(n, q.shape[1] // size, 2)
    scales_zeros = F.pad(both.transpose(0, 1), (0, 0, 0, pad_n)).to(torch.bfloat16).contiguous()
    tiles = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q, 1)
    return CpuPackedWeight(tiles, scales_zeros, size, n)


def w4a16_decode_cpu(x: torch.Tensor, weight: CpuPackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """y = x W^T + bias for few tokens; not differentiable.

    Args:
        x: bf16 ``[..., K]``.
        weight: as `pack_for_cpu` made it.
        bias: ``[N]``.

    Returns:
        bf16 ``[..., N]``.
    """
    # In eager mode the dispatcher would cost as much as a small product.
    run = torch.ops.hf_hadacore.w4a16_decode_cpu if torch.compiler.is_compiling() else _decode
    return run(x, weight.tiles, weight.scales_zeros, bias, weight.group_size, weight.out_features)


def _decode(
    x: torch.Tensor,
    tiles: torch.Tensor,
    scales_zeros: torch.Tensor,
    bias: torch.Tensor | None,
    group_size: int,
    out_features: int,
) -> torch.Tensor:
    x2d = x.reshape(-1, x.shape[-1])
    pad_k = scales_zeros.shape[0] * group_size - x.shape[-1]
    if pad_k:
        x2d = F.pad(x2d, (0, pad_k))
    y = torch.ops.aten._weight_int4pack_mm_for_cpu(x2d.contiguous(), tiles, group_size, scales_zeros)
    if y.shape[1] != out_features:
        y = y[:, :out_features].contiguous()
    if bias is not None:
        y += bias
    return y.view(*x.shape[:-1], out_features)


torch.library.impl("hf_hadacore::w4a16_decode_cpu", "cpu", _decode)


@torch.library.register_fake("hf_hadacore::w4a16_decode_cpu")
def _decode_fake(
    x: torch.Tensor,
    tiles: torch.Tensor,
    scales_zeros: torch.Tensor,
    bias: torch.Tensor | None,
    group_size: int,
    out_features: int,
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


def dequantize_and_multiply(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    group_size: int,
) -> torch.Tensor:
    """y = x W^T + bias, a block of rows of W at a time.

    Products are in bf16 for bf16 x (the weights are rounded to bf16 first) where the CPU has instructions for
    them, and in fp32 otherwise: anything narrower is emulated, several times slower.

    Args:
        x: fp16, bf16 or fp32 ``[..., K]``.
        packed, scale, zero, bias, group_size: as in `w4a16_linear`.

    Returns:
        ``[..., N]`` in the dtype of x.
    """
    n, k = packed.shape[0], x.shape[-1]
    is_fast = x.dtype == torch.float64 or (x.dtype == torch.bfloat16 and _has_bf16_products())
    compute = x.dtype if is_fast else torch.float32
    inputs = x.to(compute)
    rows = max(1, _BLOCK_ELEMENTS // max(1, k))
    parts = [
        F.linear(
            inputs,
            _dequantize_rows(
                packed[i : i + rows],
                scale[i : i + rows],
                None if zero is None else zero[i : i + rows],
                group_size,
                compute,
            ),
            None if bias is None else bias[i : i + rows].to(compute),
        )
        for i in range(0, n, rows)
    ]
    y = torch.cat(parts, dim=-1) if len(parts) != 1 else parts[0]
    return y.to(x.dtype)


@cache
def _has_bf16_products() -> bool:
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _dequantize_rows(
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    group_size: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """`int4.dequantize`, several times faster: FBGEMM turns rows of nibbles into q * a + b.

    A unit is the longest run of k that no group boundary cuts. With a = 1 and b = -z, both exact in fp16, its
    result is the exact q - z.
    """
    n, k = packed.shape[0], packed.shape[1] * int4.NIBBLES_PER_WORD
    unit = math.gcd(int4.effective_group_size(k, group_size), k)
    if n == 0 or unit % int4.NIBBLES_PER_WORD or scale.dtype == torch.float64:
        return int4.dequantize(packed, scale, zero, group_size=group_size, dtype=dtype)
    per_group = int4.effective_group_size(k, group_size) // unit

    def per_unit(values: torch.Tensor) -> torch.Tensor:
        return values if per_group == 1 else values.repeat_interleave(per_group, dim=1)[:, : k // unit]

    coefficients = torch.empty((n, k // unit, 2), dtype=torch.float16)
    coefficients[..., 0] = 1
    coefficients[..., 1] = -int4.SYMMETRIC_ZERO if zero is None else -per_unit(zero).half()
    nibbles = packed.contiguous().view(torch.uint8).view(n * (k // unit), unit // 2)
    coded = torch.cat((nibbles, coefficients.view(torch.uint8).view(-1, 4)), dim=1)
    exact = torch.ops.quantized.embedding_bag_4bit_unpack(coded).view(n, k // unit, unit)
    return exact.mul_(per_unit(scale).float().unsqueeze(-1)).view(n, k).to(dtype)
