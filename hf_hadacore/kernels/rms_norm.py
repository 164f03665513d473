"""RMSNorm, alone or with the residual addition before it, as ops of one kernel launch each.

`rms_norm_reference` says what is computed: exactly the operations, and the roundings, of transformers' eager
code. On CUDA the only difference is the order in which the squares of a row are added in fp32.
"""

import torch

from ..errors import FormatError
from .launcher import goes_straight, on_device

torch.library.define(
    "hf_hadacore::rms_norm",
    "(Tensor x, Tensor weight, float eps, float weight_offset, bool round_before_weight) -> Tensor",
)
torch.library.define(
    "hf_hadacore::add_rms_norm",
    "(Tensor x, Tensor residual, Tensor weight, float eps, float weight_offset, bool round_before_weight)"
    " -> (Tensor, Tensor)",
)


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    weight_offset: float = 0.0,
    round_before_weight: bool = True,
) -> torch.Tensor:
    """y = x / sqrt(mean(x^2) + eps) * (weight_offset + weight), over the last dimension.

    Not differentiable; `rms_norm_reference` is.

    Args:
        x: fp16, bf16 or fp32 ``[..., N]``, any strides.
        weight: ``[N]``, of the dtype of x.
        eps: added to the mean square.
        weight_offset: 0 in most models, 1 in Gemma's.
        round_before_weight: round the normalized row to the dtype of x before it is multiplied by the weight,
            as Llama and its relatives do; False multiplies in fp32, as Gemma and GPT-OSS do.

    Returns:
        ``[..., N]`` in the dtype of x, contiguous.

    Raises:
        FormatError: the weight does not fit x.
    """
    op = _cuda if goes_straight(x) else torch.ops.hf_hadacore.rms_norm
    return op(x, weight, eps, weight_offset, round_before_weight)


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    weight_offset: float = 0.0,
    round_before_weight: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm of x + residual, and x + residual rounded to the dtype of x.

    Not differentiable.

    Args:
        x: as in `rms_norm`.
        residual: of the same shape and dtype.
        weight, eps, weight_offset, round_before_weight: as in `rms_norm`.

    Returns:
        ``(normed, sum)``, each like x and contiguous.

    Raises:
        FormatError: the weight or the residual does not fit x.
    """
    op = _add_cuda if goes_straight(x) else torch.ops.hf_hadacore.add_rms_norm
    return op(x, residual, weight, eps, weight_offset, round_before_weight)


def rms_norm_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    weight_offset: float,
    round_before_weight: bool,
    compute_dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """The specification of `rms_norm`, in plain torch.

    Args:
        x, weight, eps, weight_offset, round_before_weight: as in `rms_norm`.
        compute_dtype: of everything that is not rounded to the dtype of x.
    """
    wide = x.to(compute_dtype)
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if round_before_weight:
        normed = normed.to(x.dtype).to(compute_dtype)
    return (normed * (weight_offset + weight.to(compute_dtype))).to(x.dtype)


def _check(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None = None) -> None:
    if x.dim() == 0 or weight.dim() != 1 or weight.shape[0] != x.shape[-1] or weight.dtype != x.dtype:
        raise FormatError(
            f"weight: expected [N] in the dtype of x, which is {x.dtype} {tuple(x.shape)}, "
            f"found {weight.dtype} {tuple(weight.shape)}"
        )
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise FormatError(
            f"residual: expected {x.dtype} {tuple(x.shape)}, found {residual.dtype} {tuple(residual.shape)}"
        )


@torch.library.register_fake("hf_hadacore::rms_norm")
def _fake(x, weight, eps, weight_offset, round_before_weight):
    _check(x, weight)
    return x.new_empty(x.shape)


@torch.library.register_fake("hf_hadacore::add_rms_norm")
def _add_fake(x, residual, weight, eps, weight_offset, round_before_weight):
    _check(x, weight, residual)
    return x.new_empty(x.shape), x.new_empty(x.shape)


@torch.library.impl("hf_hadacore::rms_norm", "default")
def _anywhere(x, weight, eps, weight_offset, round_before_weight):
    _check(x, weight)
    return rms_norm_reference(x, weight, eps, weight_offset, round_before_weight).contiguous()


def _add_eager(x, residual, *norm):
    total = (x + residual).contiguous()
    return rms_norm_reference(total, *norm), total


@torch.library.impl("hf_hadacore::add_rms_norm", "default")
def _add_anywhere(x, residual, weight, eps, weight_offset, round_before_weight):
    _check(x, weight, residual)
    return _add_eager(x, residual, weight, eps, weight_offset, round_before_weight)


def _cuda(x, weight, eps, weight_offset, round_before_weight):
    from . import rms_norm_triton

    _check(x, weight)
    if x.shape[-1] > rms_norm_triton.MAX_SIZE:
        return rms_norm_reference(x, weight, eps, weight_offset, round_before_weight).contiguous()
    out = x.new_empty(x.shape)
    with on_device(x.device):
        rms_norm_triton.launch(x, None, weight, eps, weight_offset, round_before_weight, out, None)
    return out


torch.library.impl("hf_hadacore::rms_norm", "cuda", _cuda)


def _add_cuda(x, residual, weight, eps, weight_offset, round_before_weight):
    from . import rms_norm_triton

    _check(x, weight, residual)
    if x.shape[-1] > rms_norm_triton.MAX_SIZE:
        return _add_eager(x, residual, weight, eps, weight_offset, round_before_weight)
    out = x.new_empty(x.shape)
    total = out.new_empty(out.shape)
    with on_device(x.device):
        rms_norm_triton.launch(x, residual, weight, eps, weight_offset, round_before_weight, out, total)
    return out, total


torch.library.impl("hf_hadacore::add_rms_norm", "cuda", _add_cuda)
