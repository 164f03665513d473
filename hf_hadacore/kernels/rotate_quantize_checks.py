"""What `rotate_quantize` takes, and the errors that say what it does not."""

from functools import cache

import torch

from ..errors import FormatError
from ..hadamard_matrices import hadamard_factors

LARGEST = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0, torch.int8: 127.0}
SCALES = ("token", "block", "head")
BLOCK_SIZES = (16, 32, 64, 128)
# Rows of transposed values start at multiples of 16 bytes, which is what TMA reads; interleaved tokens stay
# among the 16 they belong to.
TOKENS_OF_A_ROW = 16


def whole_rows(tokens: int) -> int:
    """How many tokens a row of transposed values has room for."""
    return -(-tokens // TOKENS_OF_A_ROW) * TOKENS_OF_A_ROW


@cache
def bits_of(value: float) -> int:
    """Of an fp32 number, as an integer."""
    return int(torch.tensor(value, dtype=torch.float32).view(torch.int32))


def check(x, dtype, scale, block_size, rotate, transpose, interleave, offset, cos, sin, sign) -> None:
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32) or x.dim() == 0:
        raise FormatError(f"x: expected fp16, bf16 or fp32 [..., D], found {x.dtype} {tuple(x.shape)}")
    d = x.shape[-1]
    if d == 0 or d % 2:
        raise FormatError(f"x: expected an even last dimension, found {tuple(x.shape)}")
    if dtype not in LARGEST:
        raise FormatError(f"dtype: expected one of {', '.join(map(str, LARGEST))}, found {dtype}")
    if scale not in SCALES:
        raise FormatError(f"scale: expected one of {SCALES}, found {scale!r}")
    if scale == "block" and block_size not in BLOCK_SIZES:
        raise FormatError(f"block_size: expected one of {BLOCK_SIZES}, found {block_size}")
    if interleave and not transpose:
        raise FormatError("interleave: expected it together with transpose=True, found transpose=False")
    needs_heads = scale != "token" or transpose or offset is not None or cos is not None or sin is not None
    if needs_heads and x.dim() != 4:
        raise FormatError(
            'x: expected [B, H, S, D] where scale is not "token" or transpose, offset or cos are given, '
            f"found {tuple(x.shape)}"
        )
    if sign is not None and (not rotate or sign.shape != (d,)):
        raise FormatError(
            f"sign: expected [{d}] together with rotate=True, found {tuple(sign.shape)} and rotate={rotate}"
        )
    if needs_heads:
        _check_heads(x, offset, cos, sin)
    for name, tensor in {"offset": offset, "cos": cos, "sin": sin, "sign": sign}.items():
        if tensor is not None and tensor.device != x.device:
            raise FormatError(f"{name}: expected it on {x.device} like x, found {tensor.device}")
    if rotate:
        # A symbolic size of a traced graph has no hash.
        hadamard_factors(int(d))


def _check_heads(x, offset, cos, sin) -> None:
    batch, heads, tokens, d = x.shape
    if offset is not None and (
        offset.dtype != torch.float32
        or offset.shape[-2:] != (heads, d)
        or offset.shape[:-2] not in ((), (1,), (batch,))
    ):
        raise FormatError(
            f"offset: expected fp32 [{heads}, {d}] or [{batch} or 1, {heads}, {d}], "
            f"found {offset.dtype} {tuple(offset.shape)}"
        )
    angles = [angle for angle in (cos, sin) if angle is not None]
    if angles and (
        len(angles) != 2
        or cos.shape != sin.shape
        or cos.dtype != sin.dtype
        or cos.dtype not in (torch.float16, torch.bfloat16, torch.float32)
        or cos.dim() != 3
        or cos.shape[0] not in (1, batch)
        or cos.shape[1] != tokens
        or cos.shape[2] not in (d, d // 2)
    ):
        raise FormatError(
            f"cos, sin: expected both, fp16, bf16 or fp32 [{batch} or 1, {tokens}, {d} or {d // 2}] of one "
            "shape and dtype, found " + ", ".join(f"{angle.dtype} {tuple(angle.shape)}" for angle in angles)
        )


def check_cache(x, values, scale, position, transpose, interleave) -> None:
    if x.dim() != 4:
        raise FormatError(f"x: expected [B, H, S, D], found {tuple(x.shape)}")
    batch, heads, _, d = x.shape
    capacity = scale.shape[-1] if scale.dim() else 0
    columns = whole_rows(capacity) if interleave else capacity
    room = (batch, heads, d, columns) if transpose else (batch, heads, capacity, d)
    if (
        values.shape != room
        or scale.shape != (batch, heads, capacity)
        or scale.dtype != torch.float32
        or not values.is_contiguous()
        or not scale.is_contiguous()
        or position.dtype != torch.int64
        or position.numel() != 1
    ):
        layout = f"[{batch}, {heads}, {d}, capacity]" if transpose else f"[{batch}, {heads}, capacity, {d}]"
        layout += " (its capacity rounded up to a multiple of 16)" if interleave else ""
        raise FormatError(
            f"expected contiguous values {layout} and fp32 scale [{batch}, {heads}, capacity], and int64 "
            f"position [1]; found values {tuple(values.shape)}, scale {scale.dtype} {tuple(scale.shape)}, "
            f"position {position.dtype} {tuple(position.shape)}"
        )
    for name, tensor in {"values": values, "scale": scale, "position": position}.items():
        if tensor.device != x.device:
            raise FormatError(f"{name}: expected it on {x.device} like x, found {tensor.device}")
