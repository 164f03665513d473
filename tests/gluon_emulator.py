"""Runs Gluon kernels on CPU tensors, for what they compute: Triton's interpreter does not know Gluon.

Layouts say where elements lie, not what they are, so here they are ignored: that conversions between them
cost nothing is asserted by the kernels themselves when they are compiled. Memory is checked: nothing outside
a tensor is read or written, and nothing is written twice by one kernel.
"""

from types import FunctionType, SimpleNamespace
from typing import Any

import torch
from triton.runtime.jit import ConstexprFunction, JITFunction


class _Pointer:
    """Places in a tensor's memory, beginning at its first element."""

    def __init__(self, tensor: torch.Tensor, written: torch.Tensor, offsets: Any = 0):
        self.tensor, self.written, self.offsets = tensor, written, offsets
        self.dtype = SimpleNamespace(element_ty=tensor.dtype)

    def __add__(self, offsets: Any) -> "_Pointer":
        return _Pointer(self.tensor, self.written, self.offsets + offsets)

    @classmethod
    def to(cls, tensor: torch.Tensor) -> "_Pointer":
        last = sum(stride * (size - 1) for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
        flat = tensor.as_strided((last + 1,), (1,))
        return cls(flat, torch.zeros(last + 1, dtype=torch.bool))

    def places(self, mask: torch.Tensor | None) -> torch.Tensor:
        places = self.offsets if mask is None else self.offsets[torch.broadcast_to(mask, self.offsets.shape)]
        assert places.numel() == 0 or (0 <= places.min() and places.max() < len(self.tensor)), "out of bounds"
        return places


class _Language:
    """What the kernels use of `gluon.language`."""

    constexpr = object
    float32, bfloat16 = torch.float32, torch.bfloat16
    int16, int32, int64 = torch.int16, torch.int32, torch.int64
    static_range = range

    def __init__(self, num_warps: int, programs: int):
        self.num_warps = lambda: num_warps
        self.num_programs = lambda axis: torch.tensor(programs)
        self.allocate_shared_memory = _Shared
        self.program = 0

    def program_id(self, axis):
        return torch.tensor(self.program)

    def arange(self, start, end, layout):
        return torch.arange(start, end)

    def zeros(self, shape, dtype, layout):
        return torch.zeros(shape, dtype=dtype)

    def expand_dims(self, x, axis):
        return x.unsqueeze(axis)

    def reshape(self, x, shape):
        return x.reshape(shape)

    def split(self, x):
        return x.unbind(-1)

    def join(self, x, y):
        return torch.stack((x, y), dim=-1)

    def maximum(self, x, y):
        return torch.maximum(x, y)

    def max(self, x, axis):
        return x.amax(axis)

    def convert_layout(self, x, layout, assert_trivial=False):
        return x

    def load(self, pointer, mask=None, other=None):
        if mask is None:
            return pointer.tensor[pointer.places(None)]
        values = torch.full(pointer.offsets.shape, other, dtype=pointer.tensor.dtype)
        values[torch.broadcast_to(mask, values.shape)] = pointer.tensor[pointer.places(mask)]
        return values

    def store(self, pointer, values, mask):
        places = pointer.places(mask)
        assert values.dtype == pointer.tensor.dtype and values.shape == pointer.offsets.shape
        assert not pointer.written[places].any(), "written twice"
        pointer.written[places] = True
        pointer.tensor[places] = values[torch.broadcast_to(mask, values.shape)]

    def SliceLayout(self, dim, parent):
        return None

    def NVMMADistributedLayout(self, version, warps_per_cta, instr_shape):
        return None

    def BlockedLayout(self, size_per_thread, threads_per_warp, warps_per_cta, order):
        return None

    def SwizzledSharedLayout(self, vec, per_phase, max_phase, order):
        return None

    def NVMMASharedLayout(self, swizzle_byte_width, element_bitwidth, rank):
        return None

    def DotOperandLayout(self, operand_index, parent, k_width):
        return None


def _mma_v2(a, b, acc):
    assert a.dtype == b.dtype and acc.dtype == torch.float32
    return acc + a.float() @ b.float()


def _warpgroup_mma(a, b, acc, is_async):
    return _mma_v2(a.values, b.values, acc)


class _Shared:
    """Shared memory, unwritten."""

    def __init__(self, dtype, shape, layout):
        self.values = torch.full(shape, float("nan"), dtype=dtype)
        self.dtype, self.shape = dtype, shape

    def load(self, layout):
        return self.values.clone()

    def store(self, values):
        assert values.dtype == self.dtype and values.shape == self.values.shape
        self.values.copy_(values)

    def index(self, i):
        """A part that is the same memory."""
        part = _Shared(self.dtype, (), None)
        part.values = self.values[i]
        part.shape = part.values.shape
        return part


def _copy_to_shared(shared, pointer, mask=None):
    assert pointer.offsets.shape == shared.values.shape
    mask = torch.broadcast_to(torch.tensor(True) if mask is None else mask, shared.values.shape)
    shared.values[:] = 0
    shared.values[mask] = pointer.tensor[pointer.places(mask)]


def _range(*bounds):
    return (torch.tensor(i) for i in range(*bounds))


def _nothing(*_):
    pass


_REPLACEMENTS = {
    "mma_v2": _mma_v2,
    "warpgroup_mma": _warpgroup_mma,
    "warpgroup_mma_wait": lambda outstanding, deps: deps[0],
    "fence_async_shared": _nothing,
    "reinterpret": lambda x, dtype: x.view(dtype),
    "copy_to_shared": _copy_to_shared,
    "async_copy": SimpleNamespace(commit_group=_nothing, wait_group=_nothing),
    "barrier": _nothing,
}


def emulate(
    kernel: JITFunction,
    arguments: tuple[Any, ...],
    constants: tuple[Any, ...],
    programs: int,
    num_warps: int,
    **replacements: Any,
) -> None:
    """Run a kernel.

    Args:
        kernel: any number of modules may define what it calls.
        arguments: tensors and numbers, as for a launch.
        constants: values of the constexpr parameters after them.
        programs: of the grid.
        num_warps: of a program.
        replacements: functions by name that are no Gluon code.
    """
    language = _Language(num_warps, programs)
    scopes: dict[int, dict[str, Any]] = {}

    def emulated(value: Any) -> Any:
        if isinstance(value, ConstexprFunction):
            return value.fn
        if isinstance(value, JITFunction):
            return FunctionType(value.fn.__code__, scope_of(value.fn.__globals__), value.__name__)
        return value

    def scope_of(module: dict[str, Any]) -> dict[str, Any]:
        if id(module) not in scopes:
            scope = scopes[id(module)] = {}
            scope |= {name: emulated(value) for name, value in module.items()}
            scope |= {name: value for name, value in (_REPLACEMENTS | replacements).items() if name in module}
            scope |= {"gl": language, "range": _range}
        return scopes[id(module)]

    function = emulated(kernel)
    # A tensor that is passed twice is one memory.
    pointers = {id(a): _Pointer.to(a) for a in arguments if isinstance(a, torch.Tensor)}
    for language.program in range(programs):
        values = [torch.tensor(a) if isinstance(a, int) else pointers.get(id(a), a) for a in arguments]
        function(*values, *constants)
