"""The mean of each sequence's keys, as an op of one kernel launch that reads them once.

8-bit attention subtracts it from keys before it quantizes them (SageAttention, https://arxiv.org/abs/2410.02367).
On CUDA only the order of the fp32 additions differs from `key_mean_reference`.
"""

import torch

from ..errors import FormatError
from .launcher import goes_straight, on_device

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

torch.library.define("hf_hadacore::key_mean", "(Tensor key, Tensor? is_token) -> Tensor")


def key_mean(key: torch.Tensor, is_token: torch.Tensor | None = None) -> torch.Tensor:
    """The mean over tokens, added up in fp32.

    Not differentiable; `key_mean_reference` is. The same inputs on the same kind of device give the same
    bits.

    Args:
        key: fp16, bf16 or fp32 ``[B, H, S, D]``, any strides.
        is_token: boolean ``[B or 1, S]``, False for padding, which may hold anything; None if there is none.

    Returns:
        fp32 ``[B, H, D]``, contiguous. The mean of no tokens is 0.

    Raises:
        FormatError: a shape, dtype or device does not fit.
    """
    op = _cuda if goes_straight(key) else torch.ops.hf_hadacore.key_mean
    return op(key, is_token)


def key_mean_reference(key: torch.Tensor, is_token: torch.Tensor | None) -> torch.Tensor:
    """The specification, in plain torch.

    Args:
        key, is_token: as in `key_mean`.
    """
    if is_token is None:
        return key.sum(2, dtype=torch.float32) / max(key.shape[2], 1)
    total = key.masked_fill(~is_token[:, None, :, None], 0).sum(2, dtype=torch.float32)
    return total / is_token.sum(1).clamp(min=1)[:, None, None]


def _check(key: torch.Tensor, is_token: torch.Tensor | None) -> None:
    if key.dim() != 4 or key.dtype not in _DTYPES:
        raise FormatError(
            f"key: expected fp16, bf16 or fp32 [B, H, S, D], found {key.dtype} {tuple(key.shape)}"
        )
    batch, _, tokens, _ = key.shape
    if is_token is not None and (
        is_token.dtype != torch.bool
        or is_token.dim() != 2
        or is_token.shape[0] not in (1, batch)
        or is_token.shape[1] != tokens
        or is_token.device != key.device
    ):
        raise FormatError(
            f"is_token: expected boolean [{batch} or 1, {tokens}] on {key.device}, "
            f"found {is_token.dtype} {tuple(is_token.shape)} on {is_token.device}"
        )


def _empty_mean(key: torch.Tensor) -> torch.Tensor:
    batch, heads, _, d = key.shape
    return key.new_empty((batch, heads, d), dtype=torch.float32)


@torch.library.register_fake("hf_hadacore::key_mean")
def _fake(key, is_token):
    _check(key, is_token)
    return _empty_mean(key)


@torch.library.impl("hf_hadacore::key_mean", "default")
def _anywhere(key, is_token):
    _check(key, is_token)
    return key_mean_reference(key, is_token).contiguous()


def _cuda(key, is_token):
    from . import key_mean_triton

    _check(key, is_token)
    out = _empty_mean(key)
    if key.numel() == 0:
        return out.zero_()
    with on_device(key.device):
        key_mean_triton.key_mean(key, is_token, out)
    return out


torch.library.impl("hf_hadacore::key_mean", "cuda", _cuda)
