"""y = x W^T + bias with int4 weights in tile order: the op `hf_hadacore::w4a16_tiled` and how it is launched.

On Hopper the op runs one of two Gluon kernels, `w4a16_skinny` up to 16 tokens and `w4a16_wide` above.
Elsewhere it restores the order of `hf_hadacore.int4` and runs the reference: nothing prepares tiles there.
"""

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch

from .. import int4
from ..errors import FormatError
from . import w4a16_schedules as schedules
from .w4a16 import check_arguments as check_linear_arguments
from .w4a16 import linear_gradients, w4a16_linear_reference
from .w4a16_tiles import TILE_INPUTS, TILE_ROWS, from_tiles, is_tileable

_GROUPS_PER_TILE = {32: 4, 64: 2, 128: 1, -1: 0}
_DTYPES = (torch.float16, torch.bfloat16)
# Arrival counters of one stream: K is not split for products with more tiles of outputs than this.
_COUNTERS = 1 << 16

torch.library.define(
    "hf_hadacore::w4a16_tiled",
    "(Tensor x, Tensor tiles, Tensor scale, Tensor? zero, Tensor? input_perm, Tensor? bias, int group_size)"
    " -> Tensor",
)


def w4a16_tiled(
    x: torch.Tensor,
    tiles: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None = None,
    input_perm: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    group_size: int,
) -> torch.Tensor:
    """y = x[..., input_perm] W^T + bias, with W = (q - z) * scale stored as int4 tiles.

    Differentiable with respect to x and bias. On CUDA fp32 partial products are scaled and the result is
    rounded once; the same input gives the same bits.

    Args:
        x: fp16 or bf16 ``[..., K]``, any strides.
        tiles: int32 ``[N, K/8]`` as `w4a16_tiles.to_tiles` orders it; N a multiple of 64, K of 128.
        scale: fp16, bf16 or fp32 ``[N, ceil(K/g)]`` whose columns are contiguous: strides ``(1, s)``.
        zero: uint8 ``[N, ceil(K/g)]``, strided like `scale`; None means z = 8.
        input_perm: int32 ``[K]``; None reads x as it is.
        bias: ``[N]``.
        group_size: g: 32, 64, 128, or -1 for one group per row.

    Returns:
        ``[..., N]`` in the dtype of x.

    Raises:
        FormatError: a shape, dtype or stride does not fit.
    """
    return torch.ops.hf_hadacore.w4a16_tiled(x, tiles, scale, zero, input_perm, bias, group_size)


@cache
def _has_gluon() -> bool:
    try:
        from . import w4a16_wide  # noqa: F401
    except ImportError:
        return False
    return True


@cache
def _is_hopper(index: int) -> bool:
    return torch.cuda.get_device_capability(index)[0] == 9


def prefers_tiles(device: torch.device, out_features: int, in_features: int, group_size: int) -> bool:
    """Whether weights of this shape should be in tile order on a device.

    Args:
        device: of the weights.
        out_features, in_features: N and K.
        group_size: g, or -1.
    """
    return (
        device.type == "cuda"
        and torch.version.cuda is not None
        and is_tileable(out_features, in_features)
        and group_size in _GROUPS_PER_TILE
        and _is_hopper(device.index or 0)
        and _has_gluon()
    )


def check_arguments(
    x: torch.Tensor,
    tiles: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    input_perm: torch.Tensor | None,
    bias: torch.Tensor | None,
    group_size: int,
) -> None:
    """Check shapes, dtypes and strides.

    Raises:
        FormatError: naming the tensor, what was found and what is expected.
    """
    check_linear_arguments(x, tiles, scale, zero, input_perm, bias, group_size)
    n, k = tiles.shape[0], x.shape[-1]
    if not is_tileable(n, k):
        raise FormatError(
            f"tiles: expected multiples of {TILE_ROWS} outputs and {TILE_INPUTS} inputs, found {n}x{k}"
        )
    if group_size not in _GROUPS_PER_TILE:
        raise FormatError(f"tiles: expected a group size of {tuple(_GROUPS_PER_TILE)}, found {group_size}")
    for name, values in (("scale", scale), ("zero", zero)):
        if values is not None and values.stride(0) != 1:
            raise FormatError(f"{name}: expected contiguous columns, found strides {values.stride()}")
    if zero is not None and zero.shape[1] > 1 and zero.stride() != scale.stride():
        raise FormatError(f"zero: expected the strides of scale {scale.stride()}, found {zero.stride()}")


@torch.library.register_fake("hf_hadacore::w4a16_tiled")
def _fake(
    x: torch.Tensor,
    tiles: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    input_perm: torch.Tensor | None,
    bias: torch.Tensor | None,
    group_size: int,
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], tiles.shape[0]))


def w4a16_tiled_reference(
    x: torch.Tensor,
    tiles: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    input_perm: torch.Tensor | None,
    bias: torch.Tensor | None,
    group_size: int,
) -> torch.Tensor:
    """The specification: see `w4a16_linear_reference`."""
    check_arguments(x, tiles, scale, zero, input_perm, bias, group_size)
    return w4a16_linear_reference(x, from_tiles(tiles), scale, zero, input_perm, bias, group_size)


torch.library.impl("hf_hadacore::w4a16_tiled", "default", w4a16_tiled_reference)


@torch.library.impl("hf_hadacore::w4a16_tiled", "cuda")
def _cuda(
    x: torch.Tensor,
    tiles: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    input_perm: torch.Tensor | None,
    bias: torch.Tensor | None,
    group_size: int,
) -> torch.Tensor:
    n, k = tiles.shape[0], x.shape[-1]
    if x.dtype not in _DTYPES or not prefers_tiles(x.device, n, k, group_size):
        return w4a16_tiled_reference(x, tiles, scale, zero, input_perm, bias, group_size)
    # Everything else was checked when the layer was prepared; checking it for every call would cost more
    # than the launch.
    if tiles.shape[1] * int4.NIBBLES_PER_WORD != k:
        check_arguments(x, tiles, scale, zero, input_perm, bias, group_size)
    out = torch.empty((*x.shape[:-1], n), dtype=x.dtype, device=x.device)
    m = out.numel() // n
    if m:
        processors = _processors(x.device.index)
        schedule = schedules.choose(m, n, k, "sm90", processors)
        with _on(x.device):
            launch(
                x.reshape(-1, k), tiles, scale, zero, input_perm, bias, group_size, out.view(-1, n), schedule
            )
    return out


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Make a device the current one; nothing where it is already, which is cheaper."""
    return nullcontext() if device.index == torch.cuda.current_device() else torch.cuda.device(device)


@cache
def _processors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def launch(
    x: torch.Tensor,
    tiles: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    input_perm: torch.Tensor | None,
    bias: torch.Tensor | None,
    group_size: int,
    out: torch.Tensor,
    schedule: schedules.Schedule,
) -> None:
    """Run one of the kernels.

    Args:
        x: fp16 or bf16 ``[M, K]``, any strides, M > 0.
        tiles, scale, zero, input_perm, bias, group_size: as in `w4a16_tiled`.
        out: ``[M, N]`` contiguous, in the dtype of x; every element is written.
        schedule: how the product is cut; a `SkinnySchedule` takes at most its `block_m` tokens.
    """
    (m, k), n = x.shape, out.shape[1]
    if -(-n // 64) * -(-m // schedule.block_m) > _COUNTERS:
        schedule = schedule._replace(tiles=k // TILE_INPUTS)
    groups = _GROUPS_PER_TILE[group_size]
    k_tiles = k // TILE_INPUTS
    split_k = -(-k_tiles // schedule.tiles)
    is_skinny = isinstance(schedule, schedules.SkinnySchedule)
    if input_perm is not None and not is_skinny:
        x, input_perm = x.index_select(1, input_perm), None
    # Both kernels copy x in aligned pieces of 16 bytes.
    s_xm = x.stride(0) if m > 1 else k
    if x.stride(1) != 1 or s_xm % 16 or x.data_ptr() % 16:
        x, s_xm = x.clone(memory_format=torch.contiguous_format), k
    partials = arrived = out
    if split_k > 1:
        partials = torch.empty((split_k, m, n), dtype=torch.float32, device=x.device)
        arrived = _arrival_counters(x.device)
    tensors = (tiles, scale, zero)
    ends = (bias, out, partials, arrived)
    s_group = scale.stride(1) if scale.shape[1] > 1 else n
    arguments: tuple[Any, ...]
    constants: tuple[int, ...]
    if isinstance(schedule, schedules.SkinnySchedule):
        grid = (-(-n // schedule.block_n), split_k, 1)
        arguments = (x, *tensors, input_perm, *ends, m, n, k_tiles, s_xm, s_group)
        constants = (
            schedule.block_m,
            schedule.block_n,
            schedule.tiles,
            split_k,
            schedule.stages,
            groups,
        )
        _run("skinny", arguments, constants, grid, schedule.num_warps)
    else:
        n_tiles, m_tiles = -(-n // 128), -(-m // schedule.block_m)
        grid = (n_tiles * m_tiles, split_k, 1)
        descriptor = _describe(x, s_xm, schedule.block_m, 64 if groups == 4 else 128)
        arguments = (descriptor, *tensors, *ends, m, n, k_tiles, n_tiles, m_tiles, schedule.tiles, s_group)
        constants = (schedule.block_m, split_k, schedule.stages, schedule.slots, groups)
        _run("wide", arguments, constants, grid, 4)


@cache
def _kernel(name: str) -> Any:
    if name == "skinny":
        from .w4a16_skinny import skinny_kernel

        return skinny_kernel
    from .w4a16_wide import wide_kernel

    return wide_kernel


def _describe(x: torch.Tensor, s_xm: int, block_m: int, swizzle: int) -> Any:
    """The TMA descriptor of x, whose rows are s_xm elements apart."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    return TensorDescriptor(x, list(x.shape), [s_xm, 1], [block_m, TILE_INPUTS], _shared_layout(swizzle))


@cache
def _shared_layout(swizzle: int) -> Any:
    from triton.experimental.gluon import language as gl

    return gl.NVMMASharedLayout(swizzle, 16, 2)


_compiled: dict[tuple[Any, ...], Any] = {}


def _run(
    name: str,
    arguments: tuple[Any, ...],
    constants: tuple[int, ...],
    grid: tuple[int, int, int],
    num_warps: int,
) -> None:
    """Launch a kernel; the second time without Triton's own look-up, which takes longer than everything else.

    The key holds whatever a compiled kernel may depend on: dtypes and absence of tensors, whether they are
    aligned to 16 bytes, and whether sizes are multiples of 16.
    """
    key = (
        name,
        constants,
        num_warps,
        torch.cuda.current_device(),
        *(
            (a.dtype, a.data_ptr() % 16 == 0)
            if isinstance(a, torch.Tensor)
            else a % 16 == 0 or (a == 1 and "1")
            if isinstance(a, int)
            else a is None or a.base.dtype
            for a in arguments
        ),
    )
    compiled = _compiled.get(key)
    if compiled is not None:
        compiled[grid](*arguments, *constants)
        return
    kernel = _kernel(name)
    _compiled[key] = kernel[grid](*arguments, *constants, num_warps=num_warps, launch_pdl=True)


_counters: dict[tuple[int, int], torch.Tensor] = {}


def _arrival_counters(device: torch.device) -> torch.Tensor:
    """Counters of the programs that share an output tile: zero between kernels, one set for each stream.

    Products on different streams must not share them. During a graph capture new ones belong to the graph.
    """
    key = (device.index or 0, torch.cuda.current_stream(device).cuda_stream)
    counters = _counters.get(key)
    if counters is None:
        counters = torch.zeros(_COUNTERS, dtype=torch.int32, device=device)
        if not torch.cuda.is_current_stream_capturing():
            _counters[key] = counters
    return counters


def _setup_context(ctx, inputs, output):
    _, tiles, scale, zero, input_perm, bias, group_size = inputs
    ctx.save_for_backward(tiles, scale, zero, input_perm)
    ctx.group_size = group_size
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx, grad):
    tiles, scale, zero, input_perm = ctx.saved_tensors
    weight = (from_tiles(tiles), scale, zero, input_perm) if ctx.needs_input_grad[0] else None
    grad_x, grad_bias = linear_gradients(
        grad, weight, ctx.group_size, ctx.bias_dtype if ctx.needs_input_grad[5] else None
    )
    return grad_x, None, None, None, None, grad_bias, None


torch.library.register_autograd("hf_hadacore::w4a16_tiled", _backward, setup_context=_setup_context)
