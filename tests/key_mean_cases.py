"""Keys as attention gets them, and what their means are held to."""

import torch

LAYOUTS = ("heads first", "tokens first", "fused", "every second", "same for all")


def random_key(shape: tuple[int, ...], dtype: torch.dtype, layout: str, device: str = "cpu") -> torch.Tensor:
    """``[B, H, S, D]`` with channels that lie off zero, as those of keys do."""
    batch, heads, tokens, d = shape
    offset = 5 * torch.randn(d, device=device)

    def keys(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, d, device=device)

    if layout == "heads first":
        return (keys(batch, heads, tokens) + offset).to(dtype)
    if layout == "tokens first":
        return (keys(batch, tokens, heads) + offset).to(dtype).transpose(1, 2)
    if layout == "fused":
        return (keys(batch, tokens, 3 * heads) + offset).to(dtype)[:, :, heads : 2 * heads].transpose(1, 2)
    if layout == "every second":
        return (keys(batch, heads, tokens) + offset).to(dtype).repeat_interleave(2, -1)[..., ::2]
    return (keys(1, 1, tokens) + offset).to(dtype).expand(shape)


def random_tokens(batch: int, tokens: int, device: str = "cpu") -> torch.Tensor:
    """Boolean ``[batch, tokens]``; the last of several sequences has no token at all."""
    is_token = torch.rand(batch, tokens, device=device) < 0.7
    if batch > 1:
        is_token[-1] = False
    return is_token


def exact_mean(key: torch.Tensor, is_token: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """In float64: the means, and those of magnitudes."""
    kept = key.double()
    count = torch.tensor(max(key.shape[2], 1), device=key.device)
    if is_token is not None:
        kept = kept.masked_fill(~is_token[:, None, :, None], 0)
        count = is_token.sum(1).clamp(min=1)[:, None, None]
    return kept.sum(2) / count, kept.abs().sum(2) / count


def in_bounds(mean: torch.Tensor, key: torch.Tensor, is_token: torch.Tensor | None) -> float:
    """The worst error, in multiples of what fp32 sums in several parts may have.

    S numbers that are added one after the other may be off by S roundings of the sum of their magnitudes; in
    a tree, and with a sum for each of about sqrt(S) parts, it is at most about 2 sqrt(S), plus the division.
    """
    exact, magnitude = exact_mean(key, is_token)
    roundings = 2 * key.shape[2] ** 0.5 + 2
    bound = roundings * 2.0**-24 * magnitude + torch.finfo(torch.float32).tiny
    return float(((mean.double() - exact).abs() / bound).nan_to_num(nan=torch.inf).max())
