"""Compile Triton kernels for GPUs that are not here."""

from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

_POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.uint8: "*u8",
}


def compile_for(capability: int, kernel: Any, arguments: dict[str, Any], **options: int) -> dict[str, Any]:
    """The stages (``ttir`` ... ``ptx``) of a kernel for a compute capability such as 90.

    Args:
        capability: of the GPU.
        kernel: a `triton.jit` function.
        arguments: every argument by name, in order. A dtype stands for a tensor (aligned to 16 bytes, as
            torch's are), "i32" and "i32:16" for sizes that are unknown or multiples of 16; anything else
            is a constant.
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
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm
