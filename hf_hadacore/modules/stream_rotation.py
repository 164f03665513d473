"""A residual stream that is rotated behind the embedding and turned back before the last norm.

Weights inside the decoder may want their residual stream rotated (R1 of `offline.weight_rotation`). An output
head that shares the embedding's tensor cannot be rotated with it, because only the head's side has the last
norm's gains. Such a pair stays as it is, and the stream itself is rotated: two Hadamard transforms in a
forward pass, in place of a second tensor of the embedding's size.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import ConfigError, UnsupportedError
from ..kernels.hadamard import hadamard_transform
from ..name_patterns import name_prefix

_SEED = 0


class StreamRotation(NamedTuple):
    """Where the rotated part of a residual stream begins and ends.

    Attributes:
        embedding: name of the module whose outputs are rotated.
        norm: name of the module whose inputs are rotated back.
        gain_offset: what the norm adds to its weight (1 for Gemma).
    """

    embedding: str
    norm: str
    gain_offset: float = 0.0


def rotation_signs(n: int) -> torch.Tensor:
    """The random signs of R1, int64 ``[n]`` on the CPU.

    A Hadamard matrix alone would gather what all channels have in common in its first row.

    Args:
        n: width of the residual stream.
    """
    generator = torch.Generator("cpu").manual_seed(_SEED)
    return torch.randint(2, (n,), generator=generator, device="cpu") * 2 - 1


def rotate_stream(model: PreTrainedModel, rotation: StreamRotation) -> None:
    """Let a model rotate its residual stream.

    Args:
        model: whose other weights are rotated; changed in place.
        rotation: where.

    Raises:
        ConfigError: the model has no such modules.
    """
    embedding, norm = _find(model, rotation.embedding), _find(model, rotation.norm)
    embedding.register_forward_hook(_Turn(embedding.weight, transpose=False).after)
    norm.register_forward_pre_hook(_Turn(norm.weight, transpose=True).before)


def is_rotation(hook: Any) -> bool:
    """Whether a forward hook is one of `rotate_stream`: it launches kernels and does nothing else."""
    return isinstance(getattr(hook, "__self__", None), _Turn)


def fold_stream_rotation(model: PreTrainedModel, rotation: StreamRotation) -> None:
    """Put the rotations of `rotate_stream` into embedding and head, which then have tensors of their own.

    Args:
        model: loaded, in full precision.
        rotation: what it was rotated with.

    Raises:
        UnsupportedError: the model has no head to put them into.
    """
    embedding, norm = _find(model, rotation.embedding), _find(model, rotation.norm)
    head: Any = model.get_output_embeddings()
    if head is None:
        raise UnsupportedError(
            f"{type(model).__name__} has no output head to fold the rotation of its hidden states into; "
            "dequantize the whole model, e.g. AutoModelForCausalLM"
        )
    for hooks in (embedding._forward_hooks, norm._forward_pre_hooks):
        for key in [key for key, hook in hooks.items() if is_rotation(hook)]:
            del hooks[key]
    gains = norm.weight.float() + rotation.gain_offset
    with torch.no_grad():
        head.weight = nn.Parameter(_turned(head.weight.float() * gains).to(head.weight.dtype))
        embedding.weight = nn.Parameter(_turned(embedding.weight.float()).to(embedding.weight.dtype))
        norm.weight.fill_(1 - rotation.gain_offset)
    model.all_tied_weights_keys = {}
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False


def _turned(rows: torch.Tensor) -> torch.Tensor:
    return hadamard_transform(rows, sign=rotation_signs(rows.shape[-1]).to(rows.device))


def _find(model: PreTrainedModel, name: str) -> Any:
    try:
        module = model.get_submodule(name.removeprefix(name_prefix(model)))
    except AttributeError:
        module = None
    if not isinstance(getattr(module, "weight", None), torch.Tensor):
        raise ConfigError(f"stream_rotation: {type(model).__name__} has no embedding or norm {name!r}")
    return module


class _Turn:
    """Rotates what comes out of a module, or goes into it.

    Args:
        weight: of the module; its rows are as long as those of the stream.
        transpose: the inverse rotation.
    """

    def __init__(self, weight: torch.Tensor, *, transpose: bool):
        signs = rotation_signs(weight.shape[-1])
        self._signs = signs if weight.is_meta else signs.to(weight)
        self._transform = partial(hadamard_transform, transpose=transpose)

    def after(self, _module: nn.Module, _args: Any, output: torch.Tensor) -> torch.Tensor:
        return self._turn(output)

    def before(self, _module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (self._turn(args[0]), *args[1:])

    def _turn(self, x: torch.Tensor) -> torch.Tensor:
        # float64, in which models are tried out, has no transform.
        y = x.float() if x.dtype == torch.float64 else x
        if (self._signs.device, self._signs.dtype) != (y.device, y.dtype):
            self._signs = self._signs.to(y)
        return self._transform(y, sign=self._signs).to(x.dtype)
