"""Finding out what a module computes by running it with stand-ins for its weights and submodules.

Class names say little (a subclass may scale its residual, a new version may rotate otherwise); a result does.
Stand-ins are small or cheap and live on the CPU; the model's weights are not touched, and may be on meta.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

PROBE = "hadacore_probe"


class Random:
    """Seeded normal values that leave torch's global generator alone.

    Args:
        dtype: of the values.
    """

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        self.dtype = dtype
        self._generator = torch.Generator("cpu").manual_seed(0)

    def __call__(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self._generator, device="cpu").to(self.dtype)


class Projection(nn.Module):
    """Stands for a linear layer, without a product: output j is input j modulo K, times a random factor."""

    def __init__(self, outputs: int, random: Random):
        super().__init__()
        self.factors = random(outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        places = torch.arange(self.factors.shape[0], device="cpu") % x.shape[-1]
        return x[..., places] * self.factors


class ProbedConfig:
    """A model's config, but for the name of the attention function, which is `PROBE`."""

    _attn_implementation = PROBE

    def __init__(self, config: Any):
        self._config = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


@contextmanager
def registered(functions: Any, function: Callable[..., Any]) -> Iterator[None]:
    """Have a function under the name of `PROBE` among transformers' attention functions."""
    functions[PROBE] = function
    try:
        yield
    finally:
        del functions[PROBE]


def stand_in(module: nn.Module, **parts: Any) -> nn.Module:
    """A shallow copy in eval mode with some children, parameters, buffers or plain attributes replaced."""
    clone = copy.copy(module)
    clone._modules, clone._parameters = dict(module._modules), dict(module._parameters)
    clone._buffers = dict(module._buffers)
    for name in ("forward", "_old_forward", "_hf_hook"):
        clone.__dict__.pop(name, None)
    clone.training = False
    for name, part in parts.items():
        for known in (clone._parameters, clone._modules, clone._buffers, clone.__dict__):
            if name in known or known is clone.__dict__:
                known[name] = part
                break
    return clone


def run_own_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The module's own forward; None if it does not take such arguments at all."""
    try:
        with torch.no_grad():
            return type(module).forward(module, *args, **kwargs)
    except Exception:
        # Any module may come along here, and fail in any way on what it was not made for.
        return None
