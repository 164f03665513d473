"""Hadamard rotation and 8-bit quantization as one op: what 8-bit attention reads, and 8-bit activations.

`rotate_quantize_reference` says what is computed. On CUDA the fp32 sums of the rotation have another order, a
product and the sum it goes into may be rounded once, and what an fp32 x, or RoPE or an offset of an fp16 x,
put into the rotation keeps 16 significant bits (two bf16 terms): a value can land on the other side of a tie.
"""

import torch
import torch.nn.functional as F

from ..hadamard_matrices import hadamard_factors
from .hadamard import hadamard_transform
from .launcher import goes_straight, on_device
from .rotate_quantize_checks import LARGEST, TOKENS_OF_A_ROW, check, check_cache, whole_rows

# The least that counts as the largest magnitude (before normalization), so that its reciprocal is finite.
SMALLEST_MAXIMUM = 2.0**-100

_FORM = "bool rotate, bool transpose, bool interleave, bool power_of_2"
_FRONT = "Tensor? offset, Tensor? cos, Tensor? sin, Tensor? sign"

torch.library.define(
    "hf_hadacore::rotate_quantize",
    f"(Tensor x, ScalarType dtype, str scale, int block_size, {_FORM}, {_FRONT}) -> (Tensor, Tensor)",
)
torch.library.define(
    "hf_hadacore::rotate_quantize_into_cache",
    f"(Tensor x, Tensor(a!) values, Tensor(b!) scale, Tensor position, {_FORM}, {_FRONT}) -> ()",
)


def rotate_quantize(
    x: torch.Tensor,
    *,
    dtype: torch.dtype = torch.float8_e4m3fn,
    scale: str = "token",
    block_size: int = 64,
    rotate: bool = True,
    transpose: bool = False,
    interleave: bool = False,
    power_of_2: bool = False,
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
    largest number of the dtype, then with `power_of_2` rounded up to one: zeros have a scale. NaN or infinity
    in x makes it NaN or infinite, so that every dequantized value that shares it is NaN or infinite too, from
    int8 as well.

    Not differentiable. On CUDA everything is one pass for D up to 256, and for rotated rows with a scale per
    token up to 32768 (without transpose, offset and cos); the rest takes several passes of torch's.

    Args:
        x: fp16, bf16 or fp32 ``[B, H, S, D]``, any strides, D even; ``[B, S, H, D].transpose(1, 2)`` is
            read where it lies. With a scale per token and no transpose, offset or cos, any ``[..., D]``.
        dtype: torch.float8_e4m3fn, torch.float8_e5m2 or torch.int8.
        scale: "token", "block" (of `block_size` tokens of a head) or "head". "head" reads x twice.
        block_size: 16, 32, 64 or 128.
        rotate: False only quantizes (V).
        transpose: give values as ``[B, H, D, S]``, tokens adjacent, as the product with V wants them; the
            rows lie a multiple of 16 bytes apart, with zeros between them.
        interleave: with transpose, store the tokens of each 16 in the order of the operand of a tensor core's
            8-bit product: token 8e + 2t + p (e < 2, t < 4, p < 2) at place 4t + 2e + p.
        power_of_2: round scales up to powers of two: wherever one is applied, it rounds nothing.
        offset: fp32 ``[H, D]`` or ``[B or 1, H, D]``, subtracted from every token: K's mean.
        cos, sin: fp16, bf16 or fp32 ``[B or 1, S, D]`` of rotary embeddings as in Llama,
            ``x * cos + rotate_half(x) * sin``; or their first half, ``[B or 1, S, D/2]``, if the second is
            the same, which is faster.
        sign: ``[D]`` of +1 and -1, multiplied into what is rotated.

    Returns:
        ``(values, scale)``: values like x, or transposed, or interleaved and contiguous ``[B, H, D, S rounded
        up to a multiple of 16]``, zeros where there is no token; scale fp32 ``[..., S]``, ``[B, H, ceil(S /
        block_size)]`` or ``[B, H]``.

    Raises:
        FormatError: an argument does not fit.
        UnsupportedError: there is no Hadamard matrix of order D, or it is too large for this device.
    """
    op = _cuda if goes_straight(x) else torch.ops.hf_hadacore.rotate_quantize
    return op(x, dtype, scale, block_size, rotate, transpose, interleave, power_of_2, offset, cos, sin, sign)


def rotate_quantize_into_cache(
    x: torch.Tensor,
    values: torch.Tensor,
    scale: torch.Tensor,
    position: torch.Tensor,
    *,
    rotate: bool = True,
    transpose: bool = False,
    interleave: bool = False,
    power_of_2: bool = False,
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
        values: 8-bit ``[B, H, capacity, D]``, or ``[B, H, D, capacity]`` if `transpose`, contiguous. If
            `interleave`, this capacity is that of the scales rounded up to a multiple of 16.
        scale: fp32 ``[B, H, capacity]``, contiguous.
        position: int64, one element: where the first of the S tokens goes.
        rotate, transpose, interleave, power_of_2, offset, cos, sin, sign: as in `rotate_quantize`.

    Raises:
        FormatError, UnsupportedError: as `rotate_quantize` does.
    """
    op = _cache_cuda if goes_straight(x) else torch.ops.hf_hadacore.rotate_quantize_into_cache
    op(x, values, scale, position, rotate, transpose, interleave, power_of_2, offset, cos, sin, sign)


def rotate_quantize_reference(
    x: torch.Tensor,
    dtype: torch.dtype,
    scale: str,
    block_size: int,
    rotate: bool,
    transpose: bool,
    interleave: bool = False,
    power_of_2: bool = False,
    offset: torch.Tensor | None = None,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    sign: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The specification, in plain torch.

    Args:
        x, dtype, scale, block_size, rotate, transpose, interleave, power_of_2, offset, cos, sin, sign: as in
            `rotate_quantize`.
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
    if power_of_2:
        scales = _up_to_power_of_2(scales)
        inverse = _norm(x, rotate) / scales
    if scale == "block":
        inverse = inverse.repeat_interleave(block_size, -1)[..., : x.shape[2]]
    elif scale == "head":
        inverse = inverse.unsqueeze(-1)
    y = y * inverse.unsqueeze(-1)
    if dtype == torch.int8:
        y = y.round().nan_to_num(0.0)
    if transpose:
        y = F.pad(y.mT, (0, -x.shape[2] % TOKENS_OF_A_ROW))
    if interleave:
        y = y.unflatten(-1, (y.shape[-1] // TOKENS_OF_A_ROW, 2, 4, 2)).transpose(-3, -2).flatten(-4)
    values = y.to(dtype).contiguous()
    return values[..., : x.shape[2]] if transpose and not interleave else values, scales


def _up_to_power_of_2(scales: torch.Tensor) -> torch.Tensor:
    """fp32 powers of two, not below positive normal numbers; NaN and infinity stay."""
    bits = (scales.view(torch.int32) + 0x7FFFFF) & 0x7F800000
    return torch.where(scales.isfinite(), bits.view(torch.float32), scales)


def _places(tokens: torch.Tensor) -> torch.Tensor:
    """Where `interleave` puts tokens."""
    return tokens // 16 * 16 + tokens % 8 // 2 * 4 + tokens % 16 // 8 * 2 + tokens % 2


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


def _empty(x, dtype, scale, block_size, transpose, interleave) -> tuple[torch.Tensor, torch.Tensor]:
    """Uninitialized values and scales."""
    if transpose:
        batch, heads, tokens, d = x.shape
        values = x.new_empty((batch, heads, d, whole_rows(tokens)), dtype=dtype)
        values = values if interleave else values[..., :tokens]
    else:
        values = x.new_empty(x.shape, dtype=dtype)
    if scale == "token":
        sizes = x.shape[:-1]
    elif scale == "head":
        sizes = x.shape[:2]
    else:
        sizes = (*x.shape[:2], -(-x.shape[2] // block_size))
    return values, x.new_empty(sizes, dtype=torch.float32)


@torch.library.register_fake("hf_hadacore::rotate_quantize")
def _fake(x, dtype, scale, block_size, rotate, transpose, interleave, power_of_2, *front):
    check(x, dtype, scale, block_size, rotate, transpose, interleave, *front)
    return _empty(x, dtype, scale, block_size, transpose, interleave)


@torch.library.register_fake("hf_hadacore::rotate_quantize_into_cache")
def _cache_fake(x, values, scale, position, rotate, transpose, interleave, power_of_2, *front):
    check(x, values.dtype, "token", 0, rotate, transpose, interleave, *front)
    check_cache(x, values, scale, position, transpose, interleave)


@torch.library.impl("hf_hadacore::rotate_quantize", "default")
def _anywhere(x, dtype, scale, block_size, rotate, transpose, interleave, power_of_2, *front):
    check(x, dtype, scale, block_size, rotate, transpose, interleave, *front)
    return rotate_quantize_reference(
        x, dtype, scale, block_size, rotate, transpose, interleave, power_of_2, *front
    )


def _cache_anywhere(x, values, scale, position, rotate, transpose, interleave, power_of_2, *front):
    check(x, values.dtype, "token", 0, rotate, transpose, interleave, *front)
    check_cache(x, values, scale, position, transpose, interleave)
    new_values, new_scale = rotate_quantize_reference(
        x, values.dtype, "token", 0, rotate, transpose, False, power_of_2, *front
    )
    positions = torch.arange(x.shape[2], device=x.device) + position
    scale.index_copy_(2, positions, new_scale)
    # Not every index operation knows 8-bit floats.
    values.view(torch.int8).index_copy_(
        3 if transpose else 2, _places(positions) if interleave else positions, new_values.view(torch.int8)
    )


torch.library.impl("hf_hadacore::rotate_quantize_into_cache", "default", _cache_anywhere)


def _knows(x: torch.Tensor, dtype: torch.dtype) -> bool:
    # Casts to 8-bit floats came with sm_89.
    return dtype == torch.int8 or torch.cuda.get_device_capability(x.device) >= (8, 9)


def has_kernel(x: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether heads of x, on CUDA, go through Triton's kernel.

    Args:
        x: ``[..., D]``.
        dtype: of values.
    """
    from .rotate_quantize_triton import MAX_HEAD_SIZE

    return x.shape[-1] <= MAX_HEAD_SIZE and _knows(x, dtype)


def _has_rows_kernel(x: torch.Tensor, dtype: torch.dtype) -> bool:
    from .hadamard_triton import quantizes
    from .rotate_quantize_triton import MAX_HEAD_SIZE

    d = x.shape[-1]
    return d > MAX_HEAD_SIZE and _knows(x, dtype) and quantizes(x, hadamard_factors(d))


def _launch(
    x, values, scales, group, position, rotate, transpose, interleave, power_of_2, offset, cos, sin, sign
) -> None:
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
            interleave=interleave,
            power_of_2=power_of_2,
            offset=offset,
            cos=cos,
            sin=sin,
            sign=sign if sign is None else sign.contiguous(),
            position=position,
        )


def _launch_rows(x, dtype, power_of_2, sign):
    """Rows that are longer than heads are."""
    from .hadamard_triton import launch_quantized

    values, scales = _empty(x, dtype, "token", 0, False, False)
    with on_device(x.device):
        launch_quantized(
            x.reshape(-1, x.shape[-1]),
            values.view(-1, x.shape[-1]),
            scales.view(-1),
            factors=hadamard_factors(x.shape[-1]),
            largest=LARGEST[dtype],
            smallest=SMALLEST_MAXIMUM,
            power_of_2=power_of_2,
            sign=sign if sign is None else sign.to(x.dtype).contiguous(),
        )
    return values, scales


def _cuda(x, dtype, scale, block_size, rotate, transpose, interleave, power_of_2, offset, cos, sin, sign):
    front = (offset, cos, sin, sign)
    check(x, dtype, scale, block_size, rotate, transpose, interleave, *front)
    is_plain = scale == "token" and rotate and not transpose and offset is None and cos is None
    if is_plain and x.numel() and _has_rows_kernel(x, dtype):
        return _launch_rows(x, dtype, power_of_2, sign)
    # Only heads have a scale without any token.
    if not has_kernel(x, dtype) or x.numel() == 0:
        return rotate_quantize_reference(
            x, dtype, scale, block_size, rotate, transpose, interleave, power_of_2, *front
        )
    values, scales = _empty(x, dtype, scale, block_size, transpose, interleave)
    group = {"token": 1, "block": block_size, "head": 0}[scale]
    _launch(x, values, scales, group, None, rotate, transpose, interleave, power_of_2, *front)
    return values, scales


torch.library.impl("hf_hadacore::rotate_quantize", "cuda", _cuda)


def _cache_cuda(x, values, scale, position, rotate, transpose, interleave, power_of_2, *front):
    if not has_kernel(x, values.dtype):
        return _cache_anywhere(x, values, scale, position, rotate, transpose, interleave, power_of_2, *front)
    check(x, values.dtype, "token", 0, rotate, transpose, interleave, *front)
    check_cache(x, values, scale, position, transpose, interleave)
    if x.numel():
        _launch(x, values, scale, 1, position, rotate, transpose, interleave, power_of_2, *front)


torch.library.impl("hf_hadacore::rotate_quantize_into_cache", "cuda", _cache_cuda)
