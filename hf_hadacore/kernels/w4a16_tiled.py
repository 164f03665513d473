"""y = x W^T + bias with int4 weights in tile order, as the op `hf_hadacore::w4a16_tiled`.

On Hopper the op runs one of two Gluon kernels, `w4a16_skinny` up to 16 tokens and `w4a16_wide` above.
Elsewhere it restores the order of `hf_hadacore.int4` and runs the reference: nothing prepares tiles there.
"""

from functools import cache

import torch

from .. import int4
from ..errors import FormatError
from . import w4a16_schedules as schedules
from .launcher import goes_straight, on_device
from .w4a16 import check_arguments as check_linear_arguments
from .w4a16 import linear_gradients, w4a16_linear_reference
from .w4a16_launch import GROUPS_PER_TILE, launch, processors_of
from .w4a16_tiles import TILE_INPUTS, TILE_ROWS, from_tiles, is_tileable

_DTYPES = (torch.float16, torch.bfloat16)

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
    rounded once; the same input gives the same bits. For many tokens a scale below 2^-64 counts as 2^-64.

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
    op = _cuda if goes_straight(x) else torch.ops.hf_hadacore.w4a16_tiled
    return op(x, tiles, scale, zero, input_perm, bias, group_size)


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
        and group_size in GROUPS_PER_TILE
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
    if group_size not in GROUPS_PER_TILE:
        raise FormatError(f"tiles: expected a group size of {tuple(GROUPS_PER_TILE)}, found {group_size}")
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
    out = x.new_empty((*x.shape[:-1], n))
    m = out.numel() // n
    if m:
        is_plain = GROUPS_PER_TILE[group_size] < 2
        schedule = schedules.choose(m, n, k, "sm90", processors_of(x.device.index), is_plain)
        with on_device(x.device):
            launch(x, tiles, scale, zero, input_perm, bias, group_size, out, schedule)
    return out


torch.library.impl("hf_hadacore::w4a16_tiled", "cuda", _cuda)


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
