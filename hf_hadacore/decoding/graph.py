"""A decoding step as a CUDA graph: rehearsed, captured, replayed."""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers.utils.generic import ModelOutput

from ..attention.decode_attention import decode_attention
from ..attention.decode_cache import DecodeCache, DecodeLayer
from ..kernels.w4a16_launch import counters_of_graph, new_counters

# One per shape of the inputs, and per state of a sliding window; more than a `generate` loop goes through.
_MAX_GRAPHS = 4


class _Captured(NamedTuple):
    graph: torch.cuda.CUDAGraph
    # Kept as long as the graph.
    counters: torch.Tensor

    def replay(self) -> None:
        self.graph.replay()


class CudaCapture:
    """How a step becomes a graph; tests put something for the CPU in its place."""

    @staticmethod
    def rehearse(function: Callable[[], Any]) -> tuple[Any, str | None]:
        """Run a function as it is, and see whether it could be captured.

        A capture that fails is survived, but better not tried. Kernels are compiled and loaded here, which a
        capture does not allow either.

        Args:
            function: launches kernels.

        Returns:
            What the function returned, and what speaks against a capture.
        """
        mode = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                output = function()
            finally:
                torch.cuda.set_sync_debug_mode(mode)
        for warning in caught:
            if "synchronizing CUDA operation" in str(warning.message):
                return output, f"a step waits for the GPU, at {warning.filename}:{warning.lineno}"
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
        return output, None

    @staticmethod
    def capture(function: Callable[[], Any], device: torch.device) -> tuple[Callable[[], None], Any]:
        """Record the kernels that a function launches.

        Args:
            function: rehearsed before.
            device: on which it runs.

        Returns:
            A function that launches the kernels again on the same addresses, and what the function returned:
            tensors that each replay overwrites.
        """
        graph = torch.cuda.CUDAGraph()
        counters = new_counters(device)
        with torch.cuda.device(device):
            # A thread that reads a streamer's queue or loads data must not void the capture.
            context = torch.cuda.graph(
                graph, stream=torch.cuda.Stream(device), capture_error_mode="thread_local"
            )
            try:
                with context, counters_of_graph(counters):
                    output = function()
            except Exception:
                # torch leaves the random generator in its capturing state, in which sampling fails.
                generator = torch.cuda.default_generators[torch.cuda.current_device()]
                generator.graphsafe_set_state(generator.clone_state())
                raise
        return _Captured(graph, counters).replay, output


def run_step(model: Any, cache: DecodeCache, inputs: dict[str, Any]) -> ModelOutput:
    """One decoding step: the forward pass, and the position moved on.

    Args:
        model: whose forward pass it is.
        cache: in decoding.
        inputs: of the forward pass, without the cache.

    Returns:
        The model's output.
    """
    with decode_attention(model.config):
        output = model(past_key_values=cache, **inputs)
    cache.progress.advance()
    return output


class UnsupportedInput(Exception):
    """An argument of the forward pass that is neither a tensor nor a plain value."""


class Session:
    """Buffers and the graphs that were captured on them.

    Args:
        layers: with the key/value buffers.
        fingerprint: of the model.
    """

    def __init__(self, layers: list[DecodeLayer], fingerprint: tuple[Any, ...]):
        self.layers = layers
        self.fingerprint = fingerprint
        self._graphs: dict[tuple[Any, ...], DecodeGraph] = {}
        self._allocations = 0

    def graph(self, inputs: dict[str, Any]) -> "DecodeGraph":
        """The graph for inputs of this kind, new or used before.

        Args:
            inputs: of the forward pass, without the cache.

        Raises:
            UnsupportedInput: one of them cannot be read from a buffer.
        """
        progress = self.layers[0].progress
        if self._allocations != progress.allocations:
            self._graphs.clear()
            self._allocations = progress.allocations
        full = tuple(layer.is_full for layer in self.layers if layer.is_sliding)
        key = (full, *(_describe(name, value) for name, value in inputs.items()))
        if key not in self._graphs:
            if len(self._graphs) == _MAX_GRAPHS:
                del self._graphs[next(iter(self._graphs))]
            self._graphs[key] = DecodeGraph(inputs, self.layers[0].capacity)
        return self._graphs[key]


def _describe(name: str, value: Any) -> tuple[Any, ...]:
    if isinstance(value, torch.Tensor):
        # A 2-D mask covers the tokens so far and is read from a buffer that covers the cache's capacity.
        shape = value.shape[:1] if name == "attention_mask" and value.dim() == 2 else value.shape
        return name, shape, value.dtype, value.device
    if isinstance(value, dict):
        return name, *(_describe(f"{name}.{key}", item) for key, item in value.items())
    if value is None or isinstance(value, bool | int | float | str):
        return name, value
    raise UnsupportedInput(f"{name} of type {type(value).__name__}")


class DecodeGraph:
    """A decoding step for inputs of one kind: run as it is the first time, then captured, then replayed.

    Args:
        inputs: of the forward pass, without the cache; tensors are read from buffers of this object.
        capacity: of the cache.

    Attributes:
        obstacle: why it cannot be captured; set by `run`.
    """

    obstacle: str | None = None

    def __init__(self, inputs: dict[str, Any], capacity: int):
        self._inputs: dict[str, Any] = {}
        for name, value in inputs.items():
            if isinstance(value, dict):
                self._inputs[name] = {key: _buffer(item) for key, item in value.items()}
            elif name == "attention_mask" and value is not None and value.dim() == 2:
                self._inputs[name] = value.new_zeros(value.shape[0], capacity)
            else:
                self._inputs[name] = _buffer(value)
        # What a first step prepares once, a second one has.
        self._rehearsals = 2
        self._replay: Callable[[], None] | None = None
        self._output_class: type[ModelOutput] = ModelOutput
        self._output: dict[str, torch.Tensor] = {}

    def run(
        self, model: Any, cache: DecodeCache, inputs: dict[str, Any], capture: type[CudaCapture]
    ) -> ModelOutput:
        """One step.

        Args:
            model: whose forward pass it is.
            cache: in decoding.
            inputs: of the kind that the graph was made for.
            capture: makes the graph.

        Returns:
            The model's output; its tensors are not touched by later steps.
        """
        self._copy_in(inputs)

        def forward() -> ModelOutput:
            return run_step(model, cache, self._inputs)

        if self._rehearsals > 0:
            output, obstacle = capture.rehearse(forward)
            self._rehearsals = self._rehearsals - 1 if obstacle is not None else 0
            if self._rehearsals == 0:
                self.obstacle = obstacle
            return output
        if self._replay is not None:
            for layer in cache.layers:
                layer.length += 1
        elif self.obstacle is None:
            self._capture(forward, cache, capture, model.device)
        if self._replay is None:
            return forward()
        self._replay()
        outputs = {name: value.clone() for name, value in self._output.items()}
        return self._output_class(past_key_values=cache, **outputs)

    def _capture(
        self,
        forward: Callable[[], ModelOutput],
        cache: DecodeCache,
        capture: type[CudaCapture],
        device: torch.device,
    ) -> None:
        lengths = [layer.length for layer in cache.layers]
        try:
            self._replay, output = capture.capture(forward, device)
        except Exception as error:
            self.obstacle = f"{type(error).__name__}: {error}".splitlines()[0]
            # Nothing was run, so nothing was written.
            for layer, length in zip(cache.layers, lengths, strict=True):
                layer.length = length
            return
        self._output_class = type(output)
        self._output = {name: value for name, value in output.items() if isinstance(value, torch.Tensor)}

    def _copy_in(self, inputs: dict[str, Any]) -> None:
        for name, value in inputs.items():
            buffer = self._inputs[name]
            if isinstance(value, torch.Tensor):
                if buffer.shape != value.shape:
                    buffer = buffer[:, : value.shape[1]]
                buffer.copy_(value)
            elif isinstance(value, dict):
                for key, item in value.items():
                    if isinstance(item, torch.Tensor):
                        buffer[key].copy_(item)


def _buffer(value: Any) -> Any:
    return torch.empty_like(value, memory_format=torch.contiguous_format) if torch.is_tensor(value) else value
