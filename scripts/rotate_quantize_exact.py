"""What `rotate_quantize` is held to: float64, and how far 8-bit values may be from it."""

import torch

from hf_hadacore.hadamard_matrices import hadamard_matrix
from hf_hadacore.kernels.rotate_quantize import SMALLEST_MAXIMUM
from hf_hadacore.kernels.rotate_quantize_checks import LARGEST

# What fp32 sums may be off, relative to a token's largest magnitude.
SUMS = 2e-5
# The same where two bf16 terms of a value go into them.
TWO_TERMS = 1e-4
# Bits of the mantissa and exponent of the smallest normal number.
_FORMATS = {torch.float8_e4m3fn: (3, -6), torch.float8_e5m2: (2, -14)}


def nearest_bf16(x: torch.Tensor) -> torch.Tensor:
    """float64 rounded to bf16's 8 significant bits once: torch's own cast goes through fp32."""
    bits = x.view(torch.int64)
    bits = bits + (1 << 44) - 1 + (bits >> 45 & 1)
    return (bits >> 45 << 45).view(torch.float64)


def exact_rotation(
    x: torch.Tensor,
    rotate: bool = True,
    offset: torch.Tensor | None = None,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    sign: torch.Tensor | None = None,
) -> torch.Tensor:
    """What is quantized, in float64, but for what `rotate_quantize` promises to round where x is bf16."""
    d, is_bf16 = x.shape[-1], x.dtype == torch.bfloat16
    x = x.double()
    if cos is not None and sin is not None:
        rounded = nearest_bf16 if is_bf16 and cos.dtype == torch.bfloat16 else torch.Tensor.double
        low, high = x[..., : d // 2], x[..., d // 2 :]
        cos, sin = cos.double()[:, None], sin.double()[:, None]
        first = rounded(rounded(low * cos[..., : d // 2]) - high * sin[..., : d // 2])
        second = rounded(rounded(high * cos[..., -(d // 2) :]) + low * sin[..., -(d // 2) :])
        x = torch.cat((first, second), dim=-1)
    if offset is not None:
        x = x - offset.double()[..., None, :]
        # What is rounded to bf16 is fp32.
        x = nearest_bf16(x.float().double()) if is_bf16 and rotate else x
    if sign is not None:
        x = x * sign.double()
    return x @ hadamard_matrix(d).to(x).T * d**-0.5 if rotate else x


def worst_error(
    values: torch.Tensor,
    scale: torch.Tensor,
    exact: torch.Tensor,
    group: int,
    tolerance: float,
    norm: float = 1.0,
    power_of_2: bool = False,
) -> float:
    """How far the worst value or scale is off, where 1 is what rounding may cost.

    Args:
        values: 8-bit, of the shape of `exact`.
        scale: as `rotate_quantize` returns it.
        exact: float64 ``[..., S, D]``.
        group: tokens of a scale; 0 for all of a head.
        tolerance: of what is rounded, relative to the largest magnitude.
        norm: of the rotation, which decides what counts as zero.
        power_of_2: whether scales were rounded up to powers of two.
    """
    tokens = exact.shape[-2]
    if exact.numel() == 0:
        return 0.0
    size = group or tokens
    maxima = [part.abs().amax((-2, -1)) for part in exact.split(size, dim=-2)]
    expected = torch.stack(maxima, dim=-1).clamp(min=SMALLEST_MAXIMUM * norm) / LARGEST[values.dtype]
    scale = scale.double().reshape(expected.shape)
    if power_of_2:
        # Next to a power of two either that or the next one is right.
        is_right = (scale >= expected * (1 - tolerance)) & (scale < 2 * expected * (1 + tolerance))
        if not bool((is_right & (scale.frexp().mantissa == 0.5)).all()):
            return float("inf")
        expected = scale
    scale_error = ((scale - expected).abs() / expected).max() / tolerance
    quotient = exact / expected.repeat_interleave(size, -1)[..., :tokens, None]
    step = torch.ones_like(quotient)
    if values.dtype in _FORMATS:
        bits, smallest = _FORMATS[values.dtype]
        step = 2 ** (quotient.abs().clamp(min=2.0**smallest).log2().floor() - bits)
    error = (values.double() - quotient).abs() / (step / 2 + 2 * tolerance * LARGEST[values.dtype])
    # A NaN is worse than anything.
    return float(torch.cat([scale_error.reshape(1), error.max().reshape(1)]).nan_to_num(torch.inf).max())


def in_token_order(values: torch.Tensor) -> torch.Tensor:
    """Undo `interleave`: ``[..., S16]``."""
    return values.unflatten(-1, (values.shape[-1] // 16, 4, 2, 2)).transpose(-3, -2).flatten(-4)
