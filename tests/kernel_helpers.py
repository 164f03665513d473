"""Random int4 problems and the measure that kernels are held to."""

import torch

from hf_hadacore import int4
from hf_hadacore.int4 import Int4Weight


def random_weight(
    n: int,
    k: int,
    group_size: int,
    symmetric: bool,
    dtype: torch.dtype,
    seed: int = 0,
    device: str = "cpu",
) -> Int4Weight:
    generator = torch.Generator(device).manual_seed(seed)
    groups = (n, int4.num_groups(k, group_size))
    q = torch.randint(0, 16, (n, k), dtype=torch.uint8, generator=generator, device=device)
    scale = torch.rand(groups, generator=generator, device=device) * 0.02 + 0.001
    zero = torch.randint(0, 16, groups, dtype=torch.uint8, generator=generator, device=device)
    return Int4Weight(int4.pack(q), scale.to(dtype), None if symmetric else zero, group_size)


def exact_product(
    x: torch.Tensor, weight: Int4Weight, perm: torch.Tensor | None = None, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """The product in float64, with the weights exactly as stored."""
    inputs = x.double() if perm is None else x.double().index_select(-1, perm)
    exact = inputs @ weight.dequantize(torch.float64).T
    return exact if bias is None else exact + bias.double()


def is_within_bounds(
    y: torch.Tensor,
    x: torch.Tensor,
    weight: Int4Weight,
    perm: torch.Tensor | None,
    bias: torch.Tensor | None,
    product_roundoff: float,
) -> bool:
    """Whether every element obeys the worst case of rounding; for results too small to have an average.

    The result is rounded once to its dtype, and each term x w (and the bias) carries a relative error of at
    most `product_roundoff`, on top of what K additions in fp32 cost.
    """
    exact = exact_product(x, weight, perm, bias)
    inputs = x.double().abs() if perm is None else x.double().abs().index_select(-1, perm)
    magnitude = inputs @ weight.dequantize(torch.float64).abs().T
    magnitude += 0 if bias is None else bias.double().abs()
    roundoff = torch.finfo(y.dtype).eps / 2
    per_term = product_roundoff + (x.shape[-1] + 4) * 2.0**-24
    # fp16 results near zero are rounded to a fixed step instead of a relative one.
    bound = (
        1.01 * (roundoff * exact.abs() + per_term * magnitude)
        + torch.finfo(y.dtype).smallest_normal * roundoff
    )
    return bool(((y.double() - exact).abs() <= bound).all())


def in_floors(y: torch.Tensor, exact: torch.Tensor) -> float:
    """The relative L2 error of y in multiples of the error of rounding the exact result once."""
    if exact.numel() == 0:
        return 0.0
    floor = (exact.to(y.dtype).double() - exact).norm()
    return float((y.double() - exact).norm() / floor)
