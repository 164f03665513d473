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


def in_floors(y: torch.Tensor, exact: torch.Tensor) -> float:
    """The relative L2 error of y in multiples of the error of rounding the exact result once."""
    if exact.numel() == 0:
        return 0.0
    floor = (exact.to(y.dtype).double() - exact).norm()
    return float((y.double() - exact).norm() / floor)
