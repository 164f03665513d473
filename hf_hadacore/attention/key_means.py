"""The mean of an attention module's keys, where a checkpoint holds it.

8-bit attention subtracts a constant from its keys, which a softmax does not see: their mean. The keys that a
conversation begins with need not show it, if the first prompt is a token or two, and the first token's keys
are often like no others. Calibration reads many texts; the mean of all keys that it has seen, rotary
embeddings applied, lies beside the weights as `k_mean` ``[Hkv, D]``. Attention of other kinds ignores it.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ..errors import FormatError

K_MEAN = "k_mean"


def add_key_means(model: nn.Module, shape_of: Callable[[str], tuple[int, int] | None]) -> None:
    """Give attention modules empty Parameters for the means of their keys, in the default dtype.

    Args:
        model: on the meta device.
        shape_of: key/value heads and head size by a module's full name; None for modules that have none.
    """
    for name, module in model.named_modules():
        if (shape := shape_of(name)) is not None:
            module.register_parameter(
                K_MEAN, nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False)
            )


def remove_key_means(model: nn.Module) -> None:
    """Undo `add_key_means`."""
    for module in model.modules():
        module._parameters.pop(K_MEAN, None)


def key_mean_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The means that a model holds, by their full names."""
    return {name: p for name, p in model.named_parameters() if is_key_mean(name)}


def is_key_mean(name: str) -> bool:
    """Whether a tensor of this name is the mean of an attention module's keys."""
    return name.rpartition(".")[2] == K_MEAN


def stored_key_mean(module: nn.Module, shape: torch.Size) -> torch.Tensor | None:
    """The mean of the keys of an attention module that a checkpoint holds; this rank's heads of it.

    Args:
        module: attention.
        shape: of its keys, ``[B, Hkv, L, D]``.

    Returns:
        fp32 ``[1, Hkv, D]``, or None if there is none.

    Raises:
        FormatError: the keys have other heads.
    """
    parameter = module._parameters.get(K_MEAN)
    if parameter is None:
        return None
    mean = (parameter.to_local() if isinstance(parameter, DTensor) else parameter).detach()
    if mean.shape != (shape[1], shape[3]):
        raise FormatError(
            f"{K_MEAN} of {type(module).__name__}: expected {[shape[1], shape[3]]} as keys have it, found "
            f"{list(mean.shape)}; correct key_means in the checkpoint's config"
        )
    return mean.float()[None]
