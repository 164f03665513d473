"""act(gate) * up of a gated MLP, as an op of one kernel launch.

On CUDA SiLU is rounded where eager code rounds it and differs from it by fp32 roundings inside the
activation. GELU (tanh) is computed as g * sigmoid(2u), which does not cancel for negative g as 1 + tanh(u)
does: closer to the exact value than eager code.
"""

import torch
import torch.nn.functional as F

from ..errors import FormatError
from .launcher import goes_straight, on_device

ACTIVATIONS = ("silu", "gelu_tanh")

torch.library.define("hf_hadacore::gated_activation", "(Tensor gate, Tensor up, str activation) -> Tensor")


def gated_activation(gate: torch.Tensor, up: torch.Tensor, activation: str = "silu") -> torch.Tensor:
    """act(gate) * up; the activation is rounded to the dtype of gate before it is multiplied.

    Not differentiable; `gated_activation_reference` is.

    Args:
        gate: fp16, bf16 or fp32 ``[..., I]``; the halves of one ``[..., 2I]`` tensor are read in place.
        up: of the same shape and dtype.
        activation: "silu" or "gelu_tanh".

    Returns:
        ``[..., I]`` in the dtype of gate, contiguous.

    Raises:
        FormatError: gate and up differ, or there is no such activation.
    """
    op = _cuda if goes_straight(gate) else torch.ops.hf_hadacore.gated_activation
    return op(gate, up, activation)


def gated_activation_reference(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """The specification, in plain torch.

    Args:
        gate, up, activation: as in `gated_activation`.
    """
    act = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")
    return act * up


def _check(gate: torch.Tensor, up: torch.Tensor, activation: str) -> None:
    if up.shape != gate.shape or up.dtype != gate.dtype or gate.dim() == 0:
        raise FormatError(
            f"up: expected {gate.dtype} {tuple(gate.shape)} like gate, found {up.dtype} {tuple(up.shape)}"
        )
    if activation not in ACTIVATIONS:
        raise FormatError(f"activation: expected one of {ACTIVATIONS}, found {activation!r}")


@torch.library.register_fake("hf_hadacore::gated_activation")
def _fake(gate, up, activation):
    _check(gate, up, activation)
    return gate.new_empty(gate.shape)


@torch.library.impl("hf_hadacore::gated_activation", "default")
def _anywhere(gate, up, activation):
    _check(gate, up, activation)
    return gated_activation_reference(gate, up, activation).contiguous()


def _cuda(gate, up, activation):
    from . import gated_activation_triton

    _check(gate, up, activation)
    out = gate.new_empty(gate.shape)
    with on_device(gate.device):
        gated_activation_triton.launch(gate, up, activation == "gelu_tanh", out)
    return out


torch.library.impl("hf_hadacore::gated_activation", "cuda", _cuda)
