"""What a CUDA graph does, on the CPU: record the operations of a function and run them again.

Like a capture, recording leaves no trace in memory and freezes every number that Python computed; like a
replay, running again reads and writes the same tensors. What a capture does not allow (reading a value back
to the host, copying one from it) is an error here too.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    is_traceable_wrapper_subclass,
    is_traceable_wrapper_subclass_type,
)
from torch.utils._pytree import tree_map

_FORBIDDEN = ("_local_scalar_dense", "nonzero", "lift_fresh", "unique", "masked_select", "is_nonzero")


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, tuple, dict, Any]] = []
        self.made: set[int] = set()
        self.overwritten: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if any(is_traceable_wrapper_subclass_type(kind) for kind in types):
            # It (a DTensor) comes back with what it does to the tensor inside.
            return NotImplemented
        if any(word in func.__name__ for word in _FORBIDDEN):
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for tensor in value if isinstance(value, list) else (value,):
                    self._save(tensor)
        output = func(*args, **kwargs)
        if is_traceable_wrapper_subclass(output):
            # A handle of a tensor that a collective operation is still writing to.
            return output
        for tensor in output if isinstance(output, tuple | list) else (output,):
            if isinstance(tensor, torch.Tensor) and not any(
                isinstance(a, torch.Tensor) and _address(a) == _address(tensor) for a in args
            ):
                self.made.add(_address(tensor))
        self.operations.append((func, args, kwargs, output))
        return output

    def _save(self, tensor: torch.Tensor) -> None:
        address = _address(tensor)
        if address not in self.made and address not in self.overwritten:
            self.overwritten[address] = (tensor, tensor.clone())


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def record(function: Callable[[], Any], device: torch.device) -> tuple[Callable[[], None], Any]:
    """Stands in for `hf_hadacore.decoding.graph.CudaCapture.capture`."""
    recorder = _Recorder()
    with recorder:
        outputs = function()
    for tensor, before in recorder.overwritten.values():
        tensor.copy_(before)
    results = {name: value for name, value in outputs.items() if isinstance(value, torch.Tensor)}
    for tensor in results.values():
        tensor.fill_(float("nan"))  # nothing has been computed yet

    def replay() -> None:
        computed: dict[int, torch.Tensor] = {}

        def current(value: Any) -> Any:
            return computed.get(id(value), value) if isinstance(value, torch.Tensor) else value

        for func, args, kwargs, output in recorder.operations:
            again = func(*tree_map(current, args), **tree_map(current, kwargs))
            if func.namespace == "c10d":
                # What a CUDA stream would do, and `torch.distributed` does behind the operation.
                torch.distributed.Work.unbox(again[-1]).wait()
            old = output if isinstance(output, tuple | list) else (output,)
            new = again if isinstance(again, tuple | list) else (again,)
            for before, after in zip(old, new, strict=True):
                if isinstance(before, torch.Tensor):
                    computed[id(before)] = after
        for tensor in results.values():
            tensor.copy_(computed[id(tensor)])

    return replay, outputs


class CountedCaptures:
    """Stands in for `hf_hadacore.decoding.graph.CudaCapture`, and counts."""

    def __init__(self) -> None:
        self.captures = self.replays = 0

    @staticmethod
    def rehearse(function: Callable[[], Any]) -> tuple[Any, str | None]:
        return function(), None

    def capture(self, function: Callable[[], Any], device: torch.device) -> tuple[Callable[[], None], Any]:
        replay, output = record(function, device)
        self.captures += 1

        def counted() -> None:
            self.replays += 1
            replay()

        return counted, output
