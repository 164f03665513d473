"""Round to nearest on a searched grid.

Textbook rounding spreads the 16 levels of a group from its smallest to its largest weight. One outlier then
coarsens the grid for all others. Here every group tries a list of narrower (clipped) grids, keeps the one
with the smallest weighted squared error, and lets least squares improve its scale: for fixed integers
c = q - z the scale that minimizes sum h (w - s c)^2 is s = sum(h w c) / sum(h c c). All groups move
together; nothing loops over them.

h is (|w| + rms of the group)^2. That it grows with the weight is the idea of llama.cpp's quantizers
(|w| + rms, or w^2): what training made large matters, and a plain squared error clips it for the sake of
the many small ones, which on SmolLM2 was worse than no search at all.
"""

import torch

from .. import int4
from ..errors import QuantizationError
from ..int4 import Int4Weight

# Fractions of the min-max range that are tried. Without importance the optimum lies in 0.8...1.05; where a
# few inputs are far more important than others it can be much lower.
_RANGES = tuple(1.05 - 0.05 * step for step in range(13))
_REFINEMENTS = 2
# Elements that are searched at a time: temporaries of 8 MB in fp32, which stay in a CPU's cache.
_BLOCK_ELEMENTS = 1 << 21


def quantize_weight(
    weight: torch.Tensor,
    *,
    group_size: int,
    symmetric: bool,
    scale_dtype: torch.dtype | None = None,
    importance: torch.Tensor | None = None,
    search: bool = True,
    name: str = "weight",
) -> Int4Weight:
    """Quantize a weight to int4, group by group.

    Args:
        weight: fp32, fp16 or bf16 ``[..., N, K]``; K a multiple of 8.
        group_size: g, or -1 for one group per row.
        symmetric: fix z at 8 and store no zeros; scales may then be negative, so that the heavier tail gets
            the level -8.
        scale_dtype: of the scales; default that of the weight. Integers are chosen for the rounded scale.
        importance: fp32 ``[K]``, not negative: how much a squared error in this input counts, e.g. E[x^2];
            multiplies the weighting by magnitude.
        search: False takes the min-max grid.
        name: how errors call the weight.

    Returns:
        The int4 weight on the weight's device. A group of zeros has scale 1.

    Raises:
        QuantizationError: the weight holds NaN or infinite values, or none of its K inputs fits the format.
    """
    if not int4.is_packable(weight.shape[-1]):
        raise QuantizationError(
            f"{name}: int4 rows need a multiple of 8 inputs, found shape {tuple(weight.shape)}"
        )
    rows = weight.reshape(-1, weight.shape[-1])
    block = max(1, _BLOCK_ELEMENTS // rows.shape[1])
    parts = [
        _quantize_rows(
            rows[i : i + block], group_size, symmetric, scale_dtype or weight.dtype, importance, search, name
        )
        for i in range(0, max(1, rows.shape[0]), block)
    ]
    lead = weight.shape[:-1]
    packed, scale, zero = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return Int4Weight(
        packed.view(*lead, -1)
        if packed.numel()
        else packed.view(*lead, weight.shape[-1] // int4.NIBBLES_PER_WORD),
        scale.view(*lead, scale.shape[-1]),
        None if symmetric else zero.view(*lead, zero.shape[-1]),
        group_size,
    )


def quantization_error(weight: torch.Tensor, quantized: Int4Weight) -> float:
    """Relative L2 distance of a quantized weight from the original.

    Args:
        weight: ``[..., N, K]``.
        quantized: its int4 form.
    """
    norm = weight.double().norm()
    error = (quantized.dequantize(torch.float64) - weight.double()).norm()
    return float(error / norm) if norm else float(error)


def _quantize_rows(
    rows: torch.Tensor,
    group_size: int,
    symmetric: bool,
    scale_dtype: torch.dtype,
    importance: torch.Tensor | None,
    search: bool,
    name: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    values = rows.float()
    finite = values.isfinite()
    if not finite.all():
        raise QuantizationError(f"{name}: {int((~finite).sum())} weights are NaN or infinite")
    scale, zero = fit_groups(
        values,
        group_size=group_size,
        symmetric=symmetric,
        scale_dtype=scale_dtype,
        importance=importance,
        search=search,
    )
    # Not `int4.quantize`: integers must come from the very expression that the search has judged.
    groups = _in_groups(values, group_size)
    q = _round_groups(groups, scale, zero).add_(zero.unsqueeze(-1)).flatten(-2)[:, : rows.shape[1]]
    return int4.pack(q.to(torch.uint8)), scale.to(scale_dtype), zero.to(torch.uint8)


def fit_groups(
    values: torch.Tensor,
    *,
    group_size: int,
    symmetric: bool,
    scale_dtype: torch.dtype,
    importance: torch.Tensor | None = None,
    by_magnitude: bool = True,
    search: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The grid of every group.

    Args:
        values: fp32 ``[R, K]``, finite.
        scale_dtype: to which scales are rounded.
        by_magnitude: False weights squared errors by importance alone.
        group_size, symmetric, importance, search: as in `quantize_weight`.

    Returns:
        Scale (as it will be stored) and zero, both fp32 ``[R, ceil(K/g)]``.
    """
    groups = _in_groups(values, group_size)
    if by_magnitude:
        h = (groups.abs() + groups.square().mean(-1, keepdim=True).sqrt()).square_()
    else:
        h = torch.ones_like(groups)
    if importance is not None:
        h *= _in_groups(importance.to(values.device, torch.float32)[None], group_size)
    return _fit(groups, h, symmetric, scale_dtype, search)


def storable_scale(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The scale as it will be stored, in fp32: rounded to dtype, finite, and 1 where it would vanish."""
    largest = torch.finfo(dtype).max
    stored = scale.clamp(-largest, largest).to(dtype).float()
    return torch.where(stored == 0, 1, stored)


def round_to_grid(values: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """The integers c = q - z nearest to w / s that the grid has; all fp32, broadcast together."""
    return torch.clamp((values / scale).round_(), -zero, int4.MAX_Q - zero)


def _in_groups(values: torch.Tensor, group_size: int) -> torch.Tensor:
    """``[R, G, g]`` from ``[R, K]``; zeros fill up a short last group."""
    k = values.shape[1]
    size = int4.effective_group_size(k, group_size)
    pad = int4.num_groups(k, group_size) * size - k
    return torch.nn.functional.pad(values, (0, pad)).unflatten(-1, (-1, size))


def _fit(
    groups: torch.Tensor, h: torch.Tensor, symmetric: bool, dtype: torch.dtype, search: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale (rounded to dtype) and zero, fp32 ``[R, G]``, for groups and h ``[R, G, g]``."""
    low = groups.amin(-1).clamp_(max=0)
    high = groups.amax(-1).clamp_(min=0)
    if symmetric:
        scale = torch.maximum(high, -low) / 7.5
        zero = torch.full_like(scale, int4.SYMMETRIC_ZERO)
    else:
        scale = (high - low) / int4.MAX_Q
        zero = _zero_for(low, scale)
    scale = storable_scale(scale, dtype)
    if not search:
        return scale, zero

    best = _Best(groups, h, dtype, scale, zero)
    middle = (low + high) / 2
    for fraction in _RANGES:
        if symmetric:
            clipped = torch.maximum(high, -low) * (fraction / 7.5)
            best.consider(clipped, zero)
            best.consider(-clipped, zero)
        else:
            clipped = (high - low) * (fraction / int4.MAX_Q)
            exact = int4.MAX_Q / 2 - middle / clipped.clamp_min(torch.finfo(torch.float32).tiny)
            best.consider(clipped, exact.floor().clamp_(0, int4.MAX_Q))
            best.consider(clipped, exact.ceil().clamp_(0, int4.MAX_Q))
    for _ in range(_REFINEMENTS):
        best.refine()
    return best.scale, best.zero


def _zero_for(low: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (-low / torch.where(scale == 0, 1, scale)).round_().clamp_(0, int4.MAX_Q)


def _round_groups(groups: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    return round_to_grid(groups, scale.unsqueeze(-1), zero.unsqueeze(-1))


class _Best:
    """The best scale and zero of each group so far."""

    def __init__(
        self,
        groups: torch.Tensor,
        h: torch.Tensor,
        dtype: torch.dtype,
        scale: torch.Tensor,
        zero: torch.Tensor,
    ):
        self.groups, self.h, self.dtype = groups, h, dtype
        self.scale, self.zero = scale, zero
        self.error = self._error(scale, zero)

    def _error(self, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        error = _round_groups(self.groups, scale, zero).mul_(scale.unsqueeze(-1)).sub_(self.groups)
        return error.square_().mul_(self.h).sum(-1)

    def consider(self, scale: torch.Tensor, zero: torch.Tensor) -> None:
        """Take a candidate where it is better."""
        scale = storable_scale(scale, self.dtype)
        error = self._error(scale, zero)
        better = error < self.error
        self.error = torch.where(better, error, self.error)
        self.scale = torch.where(better, scale, self.scale)
        self.zero = torch.where(better, zero, self.zero)

    def refine(self) -> None:
        """Consider the least-squares scale for the integers of the best grid."""
        c = _round_groups(self.groups, self.scale, self.zero)
        weighted = c * self.h
        denominator = (weighted * c).sum(-1)
        scale = (weighted * self.groups).sum(-1) / torch.where(denominator == 0, 1, denominator)
        self.consider(torch.where(scale == 0, self.scale, scale), self.zero)
