"""Compile Triton and Gluon kernels for GPUs that are not here."""

import re
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

_POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.float8_e4m3fn: "*fp8e4nv",
}


def compile_for(capability: int, kernel: Any, arguments: dict[str, Any], **options: int) -> dict[str, Any]:
    """The stages (``ttir`` ... ``ptx``) of a kernel for a compute capability such as 90.

    Args:
        capability: of the GPU.
        kernel: a `triton.jit` or `gluon.jit` function.
        arguments: every argument by name, in order. A dtype stands for a tensor (aligned to 16 bytes, as
            torch's are), "i32" and "i32:16" for sizes that are unknown or multiples of 16, any other string
            for a type of Triton's; anything else is a constant.
        options: num_warps and num_stages.
    """
    signature, constants, attributes = {}, {}, {}
    for position, (name, value) in enumerate(arguments.items()):
        if isinstance(value, torch.dtype):
            signature[name] = _POINTERS[value]
            attributes[(position,)] = [["tt.divisibility", 16]]
        elif isinstance(value, str):
            signature[name] = value.removesuffix(":16")
            if value.endswith(":16"):
                attributes[(position,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "constexpr"
            constants[(position,)] = value
    source_type = GluonASTSource if isinstance(kernel, GluonJITFunction) else ASTSource
    source = source_type(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm


class Resources(NamedTuple):
    """What a compiled kernel takes.

    Attributes:
        registers: of a thread.
        stack: bytes of local memory of a thread, which is where registers are spilled to.
    """

    registers: int
    stack: int


def resources(cubin: bytes, folder: Path) -> Resources:
    """What a kernel takes, as the assembler wrote it down.

    Args:
        cubin: a stage of `compile_for`.
        folder: for a temporary file.
    """
    file = folder / "kernel.cubin"
    file.write_bytes(cubin)
    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(file)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", printed)
    assert found is not None, printed
    return Resources(int(found[1]), int(found[2]) + int(found[3]))
