"""Masks for one new token, and what attention is held to."""

import torch

MASKS = ("none", "tail", "padding", "window", "holes", "bias", "one key", "nothing")


def make_mask(
    kind: str, batch: int, length: int, dtype: torch.dtype, generator: torch.Generator
) -> torch.Tensor | None:
    """Additive ``[B or 1, 1, 1, L]`` on the generator's device, or None."""
    device = generator.device
    if kind == "none":
        return None
    position = torch.arange(length, device=device)
    mask = torch.zeros(batch, 1, 1, length, device=device)
    if kind == "tail":
        mask[..., position > length // 2] = -torch.inf
    elif kind == "padding":
        for row in range(batch):
            mask[row, ..., position < (row + 1) * length // (batch + 1)] = -torch.inf
    elif kind == "window":
        mask[..., (position < length // 3) | (position > length // 2)] = -torch.inf
    elif kind == "holes":
        hidden = torch.rand(length, generator=generator, device=device) < 0.6
        hidden[length // 2] = False
        mask[..., hidden] = -torch.inf
    elif kind == "bias":
        mask = torch.randn(1, 1, 1, length, generator=generator, device=device)
        mask[..., : length // 4] = torch.finfo(dtype).min
    elif kind == "one key":
        mask[..., position != length - 1] = -torch.inf
    else:
        # Of the first sequence.
        mask[0] = -torch.inf
    return mask.to(dtype)


def exact_attention(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """``[B, 1, Hq, D]`` in float64; 0 where everything is masked."""
    batch, heads, _, d = q.shape
    grouped = q.double().reshape(batch, keys.shape[1], -1, d)
    logits = grouped @ keys.double().transpose(2, 3) * scale
    if mask is not None:
        logits = logits + mask.double()
    return (logits.softmax(-1).nan_to_num(0.0) @ values.double()).reshape(batch, 1, heads, d)
