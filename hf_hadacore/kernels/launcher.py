"""Launches of Triton and Gluon kernels, and calls of ops, without the parts that take longer than a launch.

At a few tokens a kernel runs for microseconds. Triton's own way to a compiled kernel and torch's way to a
Python op take tens of them each, which is what eager decoding would then be bound by.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch

_compiled: dict[tuple[Any, ...], Any] = {}
# Every number of tokens makes keys of its own.
_MAX_KEYS = 1 << 14


def run(
    kernel: Any,
    tensors: Sequence[torch.Tensor | None],
    sizes: tuple[int | float, ...],
    constants: tuple[Any, ...],
    grid: tuple[int, int, int],
    *,
    num_warps: int,
    descriptors: tuple[Any, ...] = (),
    **options: Any,
) -> None:
    """Launch a kernel on the current device; with meta tensors it is only compiled.

    Args:
        kernel: whose parameters are the descriptors, tensors, sizes and constants, in this order.
        tensors: on the current device.
        sizes: run-time numbers.
        constants: values of the constexpr parameters.
        grid: numbers of programs.
        num_warps: of a program.
        descriptors: TMA descriptors, which depend on nothing but the constants and the first tensor's dtype.
        options: Triton's compilation options; for a kernel always the same ones in the same order.
    """
    kinds: list[torch.dtype | None] = []
    addresses, device = 0, -1
    for tensor in tensors:
        if tensor is None:
            kinds.append(None)
        elif tensor.is_meta:
            arguments = (*descriptors, *tensors, *sizes, *constants)
            kernel.warmup(*arguments, grid=grid, num_warps=num_warps, **options)
            return
        else:
            kinds.append(tensor.dtype)
            addresses |= tensor.data_ptr()
            device = tensor.get_device()
    compiled = key = None
    # Triton compiles for what it finds: multiples of 16, absent tensors. Unaligned tensors are left to it.
    if addresses % 16 == 0:
        key = (id(kernel), sizes, constants, num_warps, device, *options.values(), *kinds)
        compiled = _compiled.get(key)
    if compiled is None:
        arguments = (*descriptors, *tensors, *sizes, *constants)
        compiled = kernel[grid](*arguments, num_warps=num_warps, **options)
        if key is not None:
            if len(_compiled) >= _MAX_KEYS:
                _compiled.clear()
            _compiled[key] = compiled
        return
    compiled.run(
        *grid,
        torch._C._cuda_getCurrentRawStream(device),
        compiled.function,
        compiled.packed_metadata,
        # Triton's hooks, for its profiler.
        None,
        None,
        None,
        *descriptors,
        *tensors,
        *sizes,
        *constants,
    )


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Make a device the current one; nothing where it is already, which is cheaper."""
    return nullcontext() if device.index in (None, torch.cuda.current_device()) else torch.cuda.device(device)


@cache
def capability(index: int) -> tuple[int, int]:
    """Of a CUDA device by NVIDIA's count; (0, 0) for others."""
    return torch.cuda.get_device_capability(index) if torch.version.hip is None else (0, 0)


def pdl_options(**options: Any) -> dict[bool, dict[str, Any]]:
    """Options of `run`, by whether there is programmatic dependent launch.

    Triton's interpreter, and its launcher for older GPUs, do not know the option for it.
    """
    return {False: options, True: options | {"launch_pdl": True}}


@cache
def has_pdl(device: torch.device) -> bool:
    """Whether a kernel may start before the one before it has ended: programmatic dependent launch.

    Args:
        device: where it runs; the meta device stands for the current one, for which kernels are compiled.
    """
    if device.type == "meta" and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device) >= (9, 0)
    )


def power_of_2(n: int) -> int:
    """The smallest power of two that is not below n: Triton's own takes longer than a launch should."""
    return 1 << max(0, n - 1).bit_length()


def goes_straight(x: torch.Tensor) -> bool:
    """Whether a CUDA op's implementation may be called as it is, because nobody watches the dispatcher.

    That would be autograd, a compiler or tracer, a dispatch mode, or a transform such as `torch.vmap`.

    Args:
        x: the op's input.
    """
    return (
        not torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and x.is_cuda
        and type(x) is torch.Tensor
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.maybe_current_level() is None
        and not torch.jit.is_tracing()
    )
