"""The int4 weight format: pack, unpack, dequantize, shapes.

A linear map with K inputs and N outputs is stored, with group size g, as

| tensor  | dtype, shape                     | meaning                                         |
|---------|----------------------------------|-------------------------------------------------|
| packed  | int32 ``[N, K/8]``               | eight consecutive k per word, lowest bits first |
| scale   | floating point ``[N, ceil(K/g)]``| w = (q - z) * scale                             |
| zero    | uint8 ``[N, ceil(K/g)]`` or None | z; None means z = 8 everywhere (symmetric)      |

``q`` is unsigned, 0...15. The last group is short when g does not divide K; g = -1 is
one group per row. Leading dimensions (the experts of a fused MoE layer) are allowed
everywhere. This module is the only one that knows what a nibble is, and the reference
that every kernel is tested against.
"""

from typing import NamedTuple

import torch

from .errors import FormatError

NIBBLES_PER_WORD = 8
MAX_Q = 15
SYMMETRIC_ZERO = 8
GROUP_SIZES = (-1, 32, 64, 128)


class Int4Weight(NamedTuple):
    """One quantized weight in the format of this module.

    Attributes:
        packed: int32 ``[..., N, K/8]``.
        scale: floating point ``[..., N, ceil(K/g)]``.
        zero: uint8 ``[..., N, ceil(K/g)]``, or None for a symmetric weight.
        group_size: g; -1 is one group per row.
    """

    packed: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    group_size: int

    @property
    def in_features(self) -> int:
        """K, the length of a row."""
        return self.packed.shape[-1] * NIBBLES_PER_WORD

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The weight ``[..., N, K]``; see `dequantize`."""
        return dequantize(self.packed, self.scale, self.zero, group_size=self.group_size, dtype=dtype)


def effective_group_size(in_features: int, group_size: int) -> int:
    """The number of inputs in a full group: ``group_size``, or K when it is -1 or above K."""
    return in_features if group_size == -1 else min(group_size, in_features)


def num_groups(in_features: int, group_size: int) -> int:
    """Groups per row, ``ceil(K/g)``; the last one is short when g does not divide K."""
    if in_features == 0:
        return 0
    return -(-in_features // effective_group_size(in_features, group_size))


def is_packable(in_features: int) -> bool:
    """Whether a row of this length fits the format (a whole number of int32 words)."""
    return in_features > 0 and in_features % NIBBLES_PER_WORD == 0


def pack(q: torch.Tensor) -> torch.Tensor:
    """Pack unsigned 4-bit integers, eight consecutive k per word, lowest bits first.

    Args:
        q: integer ``[..., K]`` with values 0...15; K a multiple of 8.

    Returns:
        int32 ``[..., K/8]``, contiguous.

    Raises:
        FormatError: K is not a multiple of 8 or q is not of an integer dtype.
    """
    if q.is_floating_point() or q.dtype == torch.bool:
        raise FormatError(f"pack needs an integer tensor of values 0...15, got {q.dtype}")
    if q.shape[-1] % NIBBLES_PER_WORD:
        raise FormatError(f"pack needs a last dimension that is a multiple of 8, got shape {tuple(q.shape)}")
    # Two nibbles a byte, then four bytes a little-endian word: the bytes *are* the words.
    q = q.to(torch.uint8)
    as_bytes = (q[..., 0::2] | q[..., 1::2] << 4).contiguous()
    # Flattened, because dimensions of one element may have any stride, which `view` refuses.
    words = as_bytes.view(-1).view(torch.int32)
    return words.view(*q.shape[:-1], q.shape[-1] // NIBBLES_PER_WORD)


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """Inverse of `pack`.

    Args:
        packed: int32 ``[..., K/8]``.

    Returns:
        uint8 ``[..., K]`` with values 0...15.

    Raises:
        FormatError: packed is not int32.
    """
    if packed.dtype != torch.int32:
        raise FormatError(f"packed int4 weights are int32, got {packed.dtype}")
    as_bytes = packed.contiguous().view(-1).view(torch.uint8)
    nibbles = torch.stack((as_bytes & 0xF, as_bytes >> 4), dim=-1)
    return nibbles.view(*packed.shape[:-1], packed.shape[-1] * NIBBLES_PER_WORD)


def expand_groups(per_group: torch.Tensor, in_features: int, group_size: int) -> torch.Tensor:
    """Repeat per-group values along k.

    Args:
        per_group: any dtype ``[..., ceil(K/g)]``.
        in_features: K.
        group_size: g, or -1.

    Returns:
        ``[..., K]``, the dtype of `per_group`.
    """
    size = effective_group_size(in_features, group_size)
    return per_group.repeat_interleave(size, dim=-1)[..., :in_features]


def quantize(
    weight: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    *,
    group_size: int,
) -> Int4Weight:
    """Round a weight to the nearest point of the grid that scale and zero define.

    How scale and zero are chosen is the business of `hf_hadacore.solvers`.

    Args:
        weight: floating point ``[..., N, K]``.
        scale: floating point ``[..., N, ceil(K/g)]``, not zero.
        zero: uint8 ``[..., N, ceil(K/g)]``, or None (z = 8).
        group_size: g, or -1.

    Returns:
        The packed weight; rounding is half to even, values beyond the grid saturate.
    """
    in_features = weight.shape[-1]
    scale_k = expand_groups(scale.float(), in_features, group_size)
    zero_k = SYMMETRIC_ZERO if zero is None else expand_groups(zero, in_features, group_size)
    q = torch.round(weight.float() / scale_k).add_(zero_k).clamp_(0, MAX_Q)
    return Int4Weight(pack(q.to(torch.uint8)), scale, zero, group_size)


def dequantize(
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None = None,
    *,
    group_size: int,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """w = (q - z) * scale.

    The product is exact in fp32 for fp16 and bf16 scales, so a result of dtype
    ``torch.float32`` is the stored weight itself; narrower dtypes round it once.

    Args:
        packed: int32 ``[..., N, K/8]``.
        scale: floating point ``[..., N, ceil(K/g)]``.
        zero: uint8 ``[..., N, ceil(K/g)]``, or None (z = 8).
        group_size: g, or -1.
        dtype: of the result; default the dtype of `scale`.

    Returns:
        ``[..., N, K]``.

    Raises:
        FormatError: a shape or dtype does not follow the format.
    """
    check(packed, scale, zero, group_size=group_size)
    in_features = packed.shape[-1] * NIBBLES_PER_WORD
    compute = torch.float64 if torch.float64 in (dtype, scale.dtype) else torch.float32
    zero_k = SYMMETRIC_ZERO if zero is None else expand_groups(zero, in_features, group_size).to(compute)
    scale_k = expand_groups(scale.to(compute), in_features, group_size)
    weight = unpack(packed).to(compute).sub_(zero_k).mul_(scale_k)
    return weight.to(scale.dtype if dtype is None else dtype)


def check(
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    *,
    group_size: int,
    name: str = "weight",
) -> None:
    """Check shapes and dtypes against the format (values are not read).

    Args:
        packed, scale, zero, group_size: as in `dequantize`.
        name: how the weight is called in the error.

    Raises:
        FormatError: naming the tensor, what was found and what would be right.
    """
    if group_size == 0 or group_size < -1:
        raise FormatError(f"{name}: group_size must be -1 or positive, got {group_size}")
    if packed.dtype != torch.int32 or packed.dim() < 2:
        raise FormatError(f"{name}: expected int32 [..., N, K/8], found {packed.dtype} {tuple(packed.shape)}")
    groups = num_groups(packed.shape[-1] * NIBBLES_PER_WORD, group_size)
    expected = (*packed.shape[:-1], groups)
    if not scale.is_floating_point() or tuple(scale.shape) != expected:
        raise FormatError(
            f"{name}_scale: expected a floating-point tensor of shape {expected} for {name} of shape "
            f"{tuple(packed.shape)} and group size {group_size}, found {scale.dtype} {tuple(scale.shape)}"
        )
    if zero is not None and (zero.dtype != torch.uint8 or tuple(zero.shape) != expected):
        raise FormatError(f"{name}_zero: expected uint8 {expected}, found {zero.dtype} {tuple(zero.shape)}")
