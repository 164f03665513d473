"""Hadamard rotation and 8-bit quantization as one op: what 8-bit attention reads, and 8-bit activations.

`rotate_quantize_reference` says what is computed. On CUDA the fp32 sums of the rotation have another order, a
product and the sum it goes into may be rounded once, and what an fp32 x, or RoPE or an offset of an fp16 x,
put into the rotation keeps 16 significant bits (two bf16 terms): a value can land on the other side of a tie.
"""

import torch
import torch.nn.functional as F

from ..errors import FormatError
from ..hadamard_matrices import hadamard_factors
from .hadamard import hadamard_transform
from .launcher import goes_straight, on_device

LARGEST = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0, torch.int8: 127.0}
SCALES = ("token", "block", "head")
BLOCK_SIZES = (16, 32, 64, 128)
# The least that counts as the largest magnitude (before normalization), so that its reciprocal is finite.
SMALLEST_MAXIMUM = 2.0**-100
# Rows of transposed values start at multiples of 16 bytes, which is what TMA reads.
_ROW_BYTES = 16

_FRONT = "Tensor? offset, Tensor? cos, Tensor? sin, Tensor? sign"

torch.library.define(
    "hf_hadacore::rotate_quantize",
    f"(Tensor x, ScalarType dtype, str scale, int block_size, bool rotate, bool transpose, {_FRONT})"
    " -> (Tensor, Tensor)",
)
torch.library.define(
    "hf_hadacore::rotate_quantize_into_cache",
    f"(Tensor x, Tensor(a!) values, Tensor(b!) scale, Tensor position, bool rotate, bool transpose, {_FRONT})"
    " -> ()",
)


def rotate_quantize(
    x: torch.Tensor,
    *,
    dtype: torch.dtype = torch.float8_e4m3fn,
    scale: str = "token",
    block_size: int = 64,
    rotate: bool = True,
    transpose: bool = False,
    offset: torch.Tensor | None = None,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    sign: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """RoPE, then x - offset, then the Hadamard transform of the last dimension, then 8-bit quantization.

    With a scale per token the rotated x is ``values.float() * scale[..., None]``. Everything before the 8-bit
    rounding is computed in fp32, but for bf16 x: as in eager models RoPE with bf16 cos and sin is bf16 (x *
    cos is rounded, then the sum; eager models round rotate_half(x) * sin, too), and so is what enters the
    rotation after RoPE or an offset.
    A scale is the largest magnitude of its tokens, or 2^-100 / sqrt(D) if that is more, divided by the
    largest number of the dtype: zeros have a scale. NaN or infinity in x makes it NaN or infinite, so that
    every dequantized value that shares it is NaN or infinite too, from int8 as well.

    Not differentiable. On CUDA rows of more than 256 elements take several passes: `hadamard_transform`, then
    torch.

    Args:
        x: fp16, bf16 or fp32 ``[B, H, S, D]``, any strides, D even; ``[B, S, H, D].transpose(1, 2)`` is
            read where it lies. With a scale per token and no transpose, offset or cos, any ``[..., D]``.
        dtype: torch.float8_e4m3fn, torch.float8_e5m2 or torch.int8.
        scale: "token", "block" (of `block_size` tokens of a head) or "head". "head" reads x twice.
        block_size: 16, 32, 64 or 128.
        rotate: False only quantizes (V).
        transpose: give values as ``[B, H, D, S]``, tokens adjacent, as the product with V wants them; the
            rows lie a multiple of 16 bytes apart, with zeros between them.
        offset: fp32 ``[H, D]`` or ``[B or 1, H, D]``, subtracted from every token: K's mean.
        cos, sin: fp16, bf16 or fp32 ``[B or 1, S, D]`` of rotary embeddings as in Llama,
            ``x * cos + rotate_half(x) * sin``; or their first half, ``[B or 1, S, D/2]``, if the second is
            the same, which is faster.
        sign: ``[D]`` of +1 and -1, multiplied into what is rotated.

    Returns:
        ``(values, scale)``: values like x, or transposed; scale fp32 ``[..., S]``, ``[B, H, ceil(S /
        block_size)]`` or ``[B, H]``.

    Raises:
        FormatError: an argument does not fit.
        UnsupportedError: there is no Hadamard matrix of order D, or it is too large for this device.
    """
    op = _cuda if goes_straight(x) else torch.ops.hf_hadacore.rotate_quantize
    return op(x, dtype, scale, block_size, rotate, transpose, offset, cos, sin, sign)


def rotate_quantize_into_cache(
    x: torch.Tensor,
    values: torch.Tensor,
    scale: torch.Tensor,
    position: torch.Tensor,
    *,
    rotate: bool = True,
    transpose: bool = False,
    offset: torch.Tensor | None = None,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    sign: torch.Tensor | None = None,
) -> None:
    """`rotate_quantize` with a scale per token, into a static cache.

    The position is read on the device, so that a CUDA graph can be replayed. Tokens beyond the capacity are
    dropped on CUDA; the CPU raises IndexError.

    Args:
        x: ``[B, H, S, D]``.
        values: 8-bit ``[B, H, capacity, D]``, or ``[B, H, D, capacity]`` if `transpose`, contiguous.
        scale: fp32 ``[B, H, capacity]``, contiguous.
        position: int64, one element: where the first of the S tokens goes.
        rotate, transpose, offset, cos, sin, sign: as in `rotate_quantize`.

    Raises:
        FormatError, UnsupportedError: as `rotate_quantize` does.
    """
    op = _cache_cuda if goes_straight(x) else torch.ops.hf_hadacore.rotate_quantize_into_cache
    op(x, values, scale, position, rotate, transpose, offset, cos, sin, sign)


def rotate_quantize_reference(
    x: torch.Tensor,
    dtype: torch.dtype,
    scale: str,
    block_size: int,
    rotate: bool,
    transpose: bool,
    offset: torch.Tensor | None = None,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    sign: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The specification, in plain torch.

    Args:
        x, dtype, scale, block_size, rotate, transpose, offset, cos, sin, sign: as in `rotate_quantize`.
    """
    y = _rotated(x, rotate, offset, cos, sin, sign)
    maximum = y.abs().amax(-1)
    if scale == "block":
        blocks = -(-x.shape[2] // block_size)
        maximum = F.pad(maximum, (0, blocks * block_size - x.shape[2]))
        maximum = maximum.unflatten(-1, (blocks, block_size)).amax(-1)
    elif scale == "head":
        maximum = F.pad(maximum, (0, 1)).amax(-1)
    maximum = maximum.clamp(min=SMALLEST_MAXIMUM)
    scales = maximum * (_norm(x, rotate) / LARGEST[dtype])
    inverse = LARGEST[dtype] / maximum
    if scale == "block":
        inverse = inverse.repeat_interleave(block_size, -1)[..., : x.shape[2]]
    elif scale == "head":
        inverse = inverse.unsqueeze(-1)
    y = y * inverse.unsqueeze(-1)
    if dtype == torch.int8:
        y = y.round().nan_to_num(0.0)
    if transpose:
        y = F.pad(y.mT, (0, -x.shape[2] % _ROW_BYTES))
    values = y.to(dtype).contiguous()
    return values[..., : x.shape[2]] if transpose else values, scales


def _norm(x: torch.Tensor, rotate: bool) -> float:
    """What makes the matrix of +1 and -1 orthonormal."""
    return x.shape[-1] ** -0.5 if rotate else 1.0


def _rotated(x, rotate, offset, cos, sin, sign) -> torch.Tensor:
    """fp32, before normalization."""
    y = x.float()
    if cos is not None:
        rounded = torch.bfloat16 if x.dtype == cos.dtype == torch.bfloat16 else torch.float32
        first, second = y.chunk(2, dim=-1)
        repeats = (1, 1, 1, x.shape[-1] // cos.shape[-1])
        cos, sin = (angle.float().unsqueeze(1).repeat(repeats) for angle in (cos, sin))
        y = (y * cos).to(rounded).float() + torch.cat((-second, first), dim=-1) * sin
        y = y.to(rounded).float()
    if offset is not None:
        y = y - offset.unsqueeze(-2)
    if not rotate:
        return y
    if x.dtype == torch.bfloat16:
        y = y.bfloat16().float()
    return hadamard_transform(y, 1.0, sign=sign)


def _empty(x, dtype, scale, block_size, transpose) -> tuple[torch.Tensor, torch.Tensor]:
    """Uninitialized values and scales."""
    if transpose:
        batch, heads, tokens, d = x.shape
        pitch = -(-tokens // _ROW_BYTES) * _ROW_BYTES
        values = x.new_empty((batch, heads, d, pitch), dtype=dtype)[..., :tokens]
    else:
        values = x.new_empty(x.shape, dtype=dtype)
    if scale == "token":
        sizes = x.shape[:-1]
    elif scale == "head":
        sizes = x.shape[:2]
    else:
        sizes = (*x.shape[:2], -(-x.shape[2] // block_size))
    return values, x.new_empty(sizes, dtype=torch.float32)


def _check(x, dtype, scale, block_size, rotate, transpose, offset, cos, sin, sign) -> None:
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


def _check_cache(x, values, scale, position, transpose) -> None:
    if x.dim() != 4:
        raise FormatError(f"x: expected [B, H, S, D], found {tuple(x.shape)}")
    batch, heads, _, d = x.shape
    capacity = values.shape[-1 if transpose else -2] if values.dim() == 4 else 0
    room = (batch, heads, d, capacity) if transpose else (batch, heads, capacity, d)
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
        raise FormatError(
            f"expected contiguous values {layout} and fp32 scale [{batch}, {heads}, capacity], and int64 "
            f"position [1]; found values {tuple(values.shape)}, scale {scale.dtype} {tuple(scale.shape)}, "
            f"position {position.dtype} {tuple(position.shape)}"
        )
    for name, tensor in {"values": values, "scale": scale, "position": position}.items():
        if tensor.device != x.device:
            raise FormatError(f"{name}: expected it on {x.device} like x, found {tensor.device}")


@torch.library.register_fake("hf_hadacore::rotate_quantize")
def _fake(x, dtype, scale, block_size, rotate, transpose, offset, cos, sin, sign):
    _check(x, dtype, scale, block_size, rotate, transpose, offset, cos, sin, sign)
    return _empty(x, dtype, scale, block_size, transpose)


@torch.library.register_fake("hf_hadacore::rotate_quantize_into_cache")
def _cache_fake(x, values, scale, position, rotate, transpose, offset, cos, sin, sign):
    _check(x, values.dtype, "token", 0, rotate, transpose, offset, cos, sin, sign)
    _check_cache(x, values, scale, position, transpose)


@torch.library.impl("hf_hadacore::rotate_quantize", "default")
def _anywhere(x, dtype, scale, block_size, rotate, transpose, offset, cos, sin, sign):
    _check(x, dtype, scale, block_size, rotate, transpose, offset, cos, sin, sign)
    return rotate_quantize_reference(x, dtype, scale, block_size, rotate, transpose, offset, cos, sin, sign)


def _cache_anywhere(x, values, scale, position, rotate, transpose, offset, cos, sin, sign):
    _check(x, values.dtype, "token", 0, rotate, transpose, offset, cos, sin, sign)
    _check_cache(x, values, scale, position, transpose)
    new_values, new_scale = rotate_quantize_reference(
        x, values.dtype, "token", 0, rotate, transpose, offset, cos, sin, sign
    )
    positions = torch.arange(x.shape[2], device=x.device) + position
    # Not every index operation knows 8-bit floats.
    values.view(torch.int8).index_copy_(3 if transpose else 2, positions, new_values.view(torch.int8))
    scale.index_copy_(2, positions, new_scale)


torch.library.impl("hf_hadacore::rotate_quantize_into_cache", "default", _cache_anywhere)


def _has_kernel(x: torch.Tensor, dtype: torch.dtype) -> bool:
    from .rotate_quantize_triton import MAX_HEAD_SIZE

    # Casts to 8-bit floats came with sm_89.
    is_known = dtype == torch.int8 or torch.cuda.get_device_capability(x.device) >= (8, 9)
    return is_known and x.shape[-1] <= MAX_HEAD_SIZE


def _launch(x, values, scales, group, rotate, transpose, offset, cos, sin, sign, position=None) -> None:
    from . import rotate_quantize_triton

    if x.dim() != 4:
        x, values = (t.reshape(1, 1, -1, t.shape[-1]) for t in (x, values))
        scales = scales.reshape(1, 1, -1)
    if offset is not None:
        offset = offset.reshape(-1, *offset.shape[-2:]).contiguous()
    if cos is not None and (cos.stride() != sin.stride() or cos.stride(-1) != 1):
        cos, sin = cos.contiguous(), sin.contiguous()
    with on_device(x.device):
        rotate_quantize_triton.launch(
            x,
            values,
            scales,
            group=group,
            largest=LARGEST[values.dtype],
            smallest=SMALLEST_MAXIMUM,
            rotate=rotate,
            transpose=transpose,
            offset=offset,
            cos=cos,
            sin=sin,
            sign=sign if sign is None else sign.contiguous(),
            position=position,
        )


def _cuda(x, dtype, scale, block_size, rotate, transpose, offset, cos, sin, sign):
    _check(x, dtype, scale, block_size, rotate, transpose, offset, cos, sin, sign)
    if not _has_kernel(x, dtype):
        return rotate_quantize_reference(
            x, dtype, scale, block_size, rotate, transpose, offset, cos, sin, sign
        )
    values, scales = _empty(x, dtype, scale, block_size, transpose)
    if x.numel() == 0:
        # Only heads have a scale without any token.
        scales.fill_(SMALLEST_MAXIMUM * (_norm(x, rotate) / LARGEST[dtype]))
    else:
        group = {"token": 1, "block": block_size, "head": 0}[scale]
        _launch(x, values, scales, group, rotate, transpose, offset, cos, sin, sign)
    return values, scales


torch.library.impl("hf_hadacore::rotate_quantize", "cuda", _cuda)


def _cache_cuda(x, values, scale, position, rotate, transpose, offset, cos, sin, sign):
    if not _has_kernel(x, values.dtype):
        return _cache_anywhere(x, values, scale, position, rotate, transpose, offset, cos, sin, sign)
    _check(x, values.dtype, "token", 0, rotate, transpose, offset, cos, sin, sign)
    _check_cache(x, values, scale, position, transpose)
    if x.numel():
        _launch(x, values, scale, 1, rotate, transpose, offset, cos, sin, sign, position)


torch.library.impl("hf_hadacore::rotate_quantize_into_cache", "cuda", _cache_cuda)
