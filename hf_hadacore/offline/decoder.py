"""The decoder layers of a model that lies on the meta device, run one at a time on calibration tokens.

What a layer is called with besides the hidden states (position embeddings, the mask of its kind of attention)
is made by the model's own forward pass. It runs once for every batch, with layers that do nothing but note
their arguments; after that only the layer at work needs weights.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import QuantizationError, UnsupportedError

_BATCH_TOKENS = 8192  # enough to fill a GPU, and small beside the hidden states of all samples


class Stop(Exception):
    """Ends a forward pass in whose rest nobody is interested."""


class LayerCall(NamedTuple):
    """What a decoder layer is called with after its hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Decoder:
    """The text decoder of a model.

    Args:
        model: any that transformers' `get_decoder` finds a stack of layers in; may be on the meta device.

    Attributes:
        model: the whole model.
        name: of the stack of layers, e.g. "model.layers".
        layers: the layers by their full names.

    Raises:
        UnsupportedError: the model has no such stack, or an encoder before it.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        bodies: list[Any] = [m for m in model.get_decoder().modules() if isinstance(m, PreTrainedModel)]
        self._body: Any = next((body for body in bodies if _stacks(body)), None)
        if self._body is None or model.config.is_encoder_decoder:
            raise UnsupportedError(
                f'{type(model).__name__}: method="gptq" calibrates models that are one stack of decoder '
                'layers; use method="rtn" for this one'
            )
        stacks = _stacks(self._body)
        stack = max(stacks, key=lambda name: sum(p.numel() for p in stacks[name].parameters()))
        self._body_name = next(name for name, module in model.named_modules() if module is self._body)
        self.name = f"{self._body_name}.{stack}".lstrip(".")
        self.layers = {f"{self.name}.{name}": layer for name, layer in stacks[stack].named_children()}

    def outer_names(self) -> list[str]:
        """What checkpoints hold of the decoder besides its layers: embedding, norms."""
        prefix = f"{self._body_name}." if self._body_name else ""
        return [
            prefix + name
            for name in self._body.state_dict()
            if not (prefix + name).startswith(f"{self.name}.")
        ]

    def materialize_buffers(self, device: torch.device) -> None:
        """Make the buffers that no checkpoint holds, such as frequencies of position embeddings.

        Args:
            device: where they are to be.
        """
        _materialize_buffers(self._body, self._body, device)

    @torch.no_grad()
    def first_inputs(self, tokens: torch.Tensor, device: torch.device, dtype: torch.dtype) -> "Activations":
        """The embedded tokens and the calls of every layer.

        Args:
            tokens: int64 ``[samples, length]``.
            device: where the embedding lies and the layers will run.
            dtype: in which they will.
        """
        states: list[torch.Tensor] = []
        calls: list[list[LayerCall]] = []
        width = self._body.get_input_embeddings().embedding_dim
        place = _place_for(tokens.numel() * width * dtype.itemsize, device)
        for batch in tokens.split(max(1, _BATCH_TOKENS // tokens.shape[1])):
            with self._noting_calls() as noted, suppress(Stop):
                self._body(input_ids=batch.to(device), use_cache=False)
            states.append(noted[0][0].to(place, dtype, copy=True))
            calls.append([call for _, call in noted])
        return Activations(states, calls, device)

    @contextmanager
    def _noting_calls(self) -> Iterator[list[tuple[torch.Tensor, LayerCall]]]:
        """Layers hand on what they are given, and the last one ends the pass."""
        noted: list[tuple[torch.Tensor, LayerCall]] = []

        def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
            hidden_states, *rest = (*args,) if args else (kwargs.pop("hidden_states"),)
            noted.append((hidden_states, LayerCall(tuple(rest), kwargs)))
            if len(noted) == len(self.layers):
                raise Stop
            return hidden_states

        with ExitStack() as stack:
            for layer in self.layers.values():
                # The instance's own attribute comes before the method of its class.
                layer.forward = forward
                stack.callback(delattr, layer, "forward")
            yield noted


class Activations:
    """The hidden states of all calibration tokens on their way through the layers.

    Args:
        states: of each batch, ``[B, L, H]``, on any device.
        calls: of each batch and layer.
        device: where layers run.

    Attributes:
        layers_passed: layers that have made the hidden states what they are.
    """

    def __init__(self, states: list[torch.Tensor], calls: list[list[LayerCall]], device: torch.device):
        self._states = states
        self._calls = calls
        self.layers_passed = 0
        self.device = device

    def run(self, layer: nn.Module, *, batches: int | None = None) -> None:
        """Run the layer that comes next for what its hooks see, which may raise `Stop` to end a batch.

        Args:
            layer: with weights on `device`.
            batches: only the first so many.
        """
        for batch in range(len(self._states))[:batches]:
            with suppress(Stop):
                self._output(layer, batch)

    def advance(self, layer: nn.Module, name: str) -> None:
        """Replace the hidden states by what the layer that comes next makes of them.

        Args:
            layer: with weights on `device`.
            name: how the error calls the layer.

        Raises:
            QuantizationError: they are not finite.
        """
        finite = torch.ones((), dtype=torch.bool, device=self.device)
        for batch, states in enumerate(self._states):
            output = self._output(layer, batch)
            finite &= output.isfinite().all()
            states.copy_(output)
        if not finite:
            raise QuantizationError(f"{name}: its outputs for the calibration tokens hold NaN or infinity")
        self.layers_passed += 1

    def _output(self, layer: nn.Module, batch: int) -> torch.Tensor:
        call = self._calls[batch][self.layers_passed]
        output = layer(self._states[batch].to(self.device), *call.args, **call.kwargs)
        return output[0] if isinstance(output, tuple) else output


@contextmanager
def before_forward(
    modules: Mapping[str, nn.Module], see: Callable[[str, tuple[Any, ...]], None]
) -> Iterator[None]:
    """Call a function with the name and the positional arguments of every module that is about to run."""
    with ExitStack() as stack:
        for name, module in modules.items():
            hook = module.register_forward_pre_hook(lambda _, args, name=name: see(name, args))
            stack.callback(hook.remove)
        yield


def _stacks(body: nn.Module) -> dict[str, nn.ModuleList]:
    return {name: child for name, child in body.named_children() if isinstance(child, nn.ModuleList)}


def _place_for(nbytes: int, device: torch.device) -> torch.device:
    """Where hidden states lie between layers: on the device, unless they would take half of what is free."""
    if device.type == "cuda" and nbytes > torch.cuda.mem_get_info(device)[0] // 2:
        return torch.device("cpu")
    return device


def _materialize_buffers(module: nn.Module, owner: PreTrainedModel, device: torch.device) -> None:
    """As `from_pretrained` does: `_init_weights` of the model that a module belongs to fills them."""
    owner = module if isinstance(module, PreTrainedModel) else owner
    for child in module.children():
        _materialize_buffers(child, owner, device)
    not_saved = {
        name: buffer
        for name, buffer in module._buffers.items()
        if buffer is not None and name in module._non_persistent_buffers_set
    }
    for name, buffer in not_saved.items():
        module._buffers[name] = torch.empty_like(buffer, device=device)
    if not_saved:
        owner._init_weights(module)
