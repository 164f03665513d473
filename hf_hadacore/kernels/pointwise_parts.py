"""What the kernels between a model's matrix products share: norms, gated activations, RoPE.

At a few tokens each of them takes as long as its launch, so each is one launch, and on GPUs that can (sm_90
and later) it is launched while the kernel before it still runs (programmatic dependent launch, PDL). Until
`gdc_wait` returns nothing is read or written; weights are only asked into the L2 cache, which is right
whatever is still being written. Every program waits, so that a kernel's end implies the end of all before it.

Intermediate values are rounded where transformers' eager code rounds them. Prefixes: p_ pointer, b_ values in
registers, o_ offsets, m_ mask, i_ index, s_ stride.
"""

import torch
import triton
import triton.language as tl

from .launcher import pdl_options

# A product and a sum contracted to one instruction would be rounded once where eager code rounds twice.
OPTIONS = pdl_options(enable_fp_fusion=False)


@triton.jit
def prefetch_lines(p_lines):
    """Ask for the cache lines of 128 bytes at some addresses to be brought to L2."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; // $0", "=r,l", [p_lines], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def prefetch(p_values, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Ask for SIZE 16-bit (or wider) values to be brought to L2; BLOCK >= SIZE is a power of two."""
    LINES: tl.constexpr = 1 if BLOCK < 64 else BLOCK // 64
    prefetch_lines(p_values + tl.minimum(tl.arange(0, LINES) * 64, SIZE - 1))


@triton.jit
def scale_normed(b_normed, b_weight, OFFSET: tl.constexpr, ROUND_FIRST: tl.constexpr, dtype: tl.constexpr):
    """The last step of an RMSNorm, from fp32 to the model's dtype."""
    if ROUND_FIRST:
        b_normed = b_normed.to(dtype).to(tl.float32)
    return (b_normed * (OFFSET + b_weight.to(tl.float32))).to(dtype)


def as_rows(x: torch.Tensor) -> tuple[torch.Tensor, int, int, int]:
    """``[..., N]`` as rows of N contiguous elements: x, inner, s_outer, s_inner.

    Row r lies at (r // inner) * s_outer + (r % inner) * s_inner.
    """
    if x.is_contiguous():
        return x, 1, x.shape[-1], 0
    dims: list[tuple[int, int]] = []
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if size == 1:
            continue
        if dims and dims[-1][1] == size * stride:
            dims[-1] = (dims[-1][0] * size, stride)
        else:
            dims.append((size, stride))
    if len(dims) > 2 or x.stride(-1) != 1:
        return x.contiguous(), 1, x.shape[-1], 0
    if len(dims) < 2:
        return x, 1, dims[0][1] if dims else 0, 0
    return x, dims[1][0], dims[0][1], dims[1][1]
