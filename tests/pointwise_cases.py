"""Random inputs of the pointwise ops, and what their results are held to.

A result is held to transformers' eager formula (the op's reference): equal where no sum of squares is
involved, else within one unit in the last place, and against float64 not further off than the formula itself.
"""

import torch
import torch.nn.functional as F

# weight_offset, round_before_weight: Llama, Gemma, GPT-OSS
FORMULAS = [(0.0, True), (1.0, False), (0.0, False)]
EPS = 1e-5


def random(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def strided(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """As `random`, but a slice of a wider tensor, as the parts of a fused projection are."""
    return random((*shape[:-1], 2 * shape[-1] + 8), dtype, seed)[..., 8 : 8 + shape[-1]]


def exact_norm(x: torch.Tensor, weight: torch.Tensor, weight_offset: float) -> torch.Tensor:
    x = x.double()
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * (weight_offset + weight.double())


def exact_activation(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    gate = gate.double()
    act = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")
    return act * up.double()


def exact_rotation(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    weight: torch.Tensor | None = None,
    weight_offset: float = 0.0,
) -> torch.Tensor:
    """In float64, ``[B, T, heads, D]``."""
    x = x.double() if weight is None else exact_norm(x, weight, weight_offset)
    half = x.shape[-1] // 2
    rotated = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos.double().unsqueeze(2) + rotated * sin.double().unsqueeze(2)


def cos_sin(batch: int, tokens: int, d: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Of random angles, different in every place, so that no half can stand for the other."""
    angles = 7 * random((batch, tokens, d), torch.float32, seed=99)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def assert_within_one_ulp(y: torch.Tensor, eager: torch.Tensor) -> None:
    spacing = torch.finfo(y.dtype).eps * eager.double().abs() + torch.finfo(y.dtype).smallest_normal
    assert y.dtype == eager.dtype and y.shape == eager.shape
    assert ((y.double() - eager.double()).abs() <= spacing).all()


def assert_as_exact_as(y: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor) -> None:
    """For results with enough elements to have an average error."""
    if y.numel() >= 512:
        assert (y.double() - exact).norm() <= 1.02 * (eager.double() - exact).norm()
    else:
        assert y.isfinite().all()
