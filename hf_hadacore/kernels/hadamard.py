"""The Hadamard transform of every row, as the op `hf_hadacore::hadamard_transform` and its in-place form.

H of size n is a Kronecker product of small matrices (see `hf_hadacore.hadamard_matrices`), so a row reshaped
to ``[f1, f2, ...]`` is transformed by a product with H_f1 along the first axis, H_f2 along the second, and so
on: few passes of matrix products instead of log2 n passes of additions (the idea of HadaCore,
arXiv:2412.08832). Everything between is wider than the input, and the result is rounded once.
"""

from functools import cache
from importlib.util import find_spec

import torch

from ..errors import FormatError
from ..hadamard_matrices import hadamard_factors
from .hadamard_products import transform_by_products
from .launcher import on_device

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_ARGUMENTS = "float? scale, Tensor? sign, int? block_size, bool transpose"

torch.library.define("hf_hadacore::hadamard_transform", f"(Tensor x, {_ARGUMENTS}) -> Tensor")
torch.library.define("hf_hadacore::hadamard_transform_", f"(Tensor(a!) x, {_ARGUMENTS}) -> ()")


def hadamard_transform(
    x: torch.Tensor,
    scale: float | None = None,
    *,
    inplace: bool = False,
    sign: torch.Tensor | None = None,
    block_size: int | None = None,
    transpose: bool = False,
) -> torch.Tensor:
    """y = scale * H (sign * x) for every row x, with one rounding, H being a Hadamard matrix of order n.

    Differentiable with respect to x. For 2^k it is Sylvester's matrix in natural order (the Walsh-Hadamard
    transform), which is its own transpose; `hadamard_matrices.hadamard_matrix` returns that of any order.

    Args:
        x: fp16, bf16 or fp32 ``[..., n]``, any strides.
        scale: n**-0.5 by default, which makes the transform a rotation.
        inplace: write the result to x, whose elements must not overlap in memory.
        sign: ``[n]`` of +1 and -1, of any dtype and on the device of x.
        block_size: transform blocks of this many elements, each by itself; it takes the place of n.
        transpose: y = sign * (scale * H^T x) instead: the inverse, at the default scale.

    Returns:
        ``[..., n]`` in the dtype of x: x itself if `inplace`, else contiguous.

    Raises:
        UnsupportedError: there is no Hadamard matrix of order n here; the message says of which there is.
        FormatError: a dtype, shape, device or stride does not fit.
    """
    if not inplace:
        return torch.ops.hf_hadacore.hadamard_transform(x, scale, sign, block_size, transpose)
    if x.requires_grad and torch.is_grad_enabled():
        return _InPlace.apply(x, scale, sign, block_size, transpose)
    torch.ops.hf_hadacore.hadamard_transform_(x, scale, sign, block_size, transpose)
    return x


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def _check(x: torch.Tensor, sign: torch.Tensor | None, block_size: int | None) -> tuple[int, ...]:
    if x.dtype not in _DTYPES or x.dim() == 0:
        raise FormatError(f"x: expected fp16, bf16 or fp32 [..., n], found {x.dtype} {tuple(x.shape)}")
    n = x.shape[-1]
    if sign is not None and (sign.shape != (n,) or sign.device != x.device):
        raise FormatError(
            f"sign: expected [{n}] on {x.device}, one for each element of a row, "
            f"found {tuple(sign.shape)} on {sign.device}"
        )
    if block_size is None:
        return hadamard_factors(int(n))
    factors = hadamard_factors(block_size)
    if n % block_size:
        raise FormatError(f"block_size: expected a divisor of the row length {n}, found {block_size}")
    return factors


def _check_overlap(x: torch.Tensor) -> None:
    """Raises unless every stride steps over all that the smaller strides reach."""
    reach = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1 and stride < reach and x.numel() > 0:
            raise FormatError(
                f"x: elements of shape {tuple(x.shape)} and strides {x.stride()} overlap in memory, so an "
                "in-place transform is undefined: use inplace=False, or a contiguous copy"
            )
        reach += stride * (size - 1)


def _rows(x: torch.Tensor, size: int) -> torch.Tensor | None:
    """x as ``[rows, size]`` where that needs no copy."""
    try:
        return x.view(-1, size)
    except RuntimeError:
        return None


def _write(transform, x, out, factors, scale, sign, block_size, transpose):
    """Fill out, which may be x, and can be viewed as rows."""
    n = x.shape[-1]
    size = block_size or n
    scale = size**-0.5 if scale is None else scale
    sign = None if sign is None else sign.to(x.dtype)
    before = None if transpose else sign
    if before is not None and size != n:  # signs differ from block to block
        x, before = torch.mul(x, before, out=out), None
    result = out.view(-1, size)
    rows = _rows(x, size)
    if rows is None:
        out.copy_(x)
        rows = result
    transform(rows, result, factors=factors, scale=scale, sign=before, transpose=transpose)
    if transpose and sign is not None:
        out.mul_(sign)


def _new(transform, x, scale, sign, block_size, transpose):
    factors = _check(x, sign, block_size)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _write(transform, x, out, factors, scale, sign, block_size, transpose)
    return out


def _in_place(transform, x, scale, sign, block_size, transpose):
    factors = _check(x, sign, block_size)
    _check_overlap(x)
    if _rows(x, block_size or x.shape[-1]) is not None:
        _write(transform, x, x, factors, scale, sign, block_size, transpose)
    else:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        _write(transform, x, out, factors, scale, sign, block_size, transpose)
        x.copy_(out)


@torch.library.impl("hf_hadacore::hadamard_transform", "default")
def _anywhere(x, *arguments):
    return _new(transform_by_products, x, *arguments)


@torch.library.impl("hf_hadacore::hadamard_transform_", "default")
def _anywhere_in_place(x, *arguments):
    _in_place(transform_by_products, x, *arguments)


def _launch(x, out, **options):
    from .hadamard_triton import launch

    with on_device(x.device):
        launch(x, out, **options)


def _cuda_transform():
    return _launch if _has_triton() else transform_by_products


@torch.library.impl("hf_hadacore::hadamard_transform", "cuda")
def _cuda(x, *arguments):
    return _new(_cuda_transform(), x, *arguments)


@torch.library.impl("hf_hadacore::hadamard_transform_", "cuda")
def _cuda_in_place(x, *arguments):
    _in_place(_cuda_transform(), x, *arguments)
    if not x.is_inference():
        torch.autograd.graph.increment_version(x)  # a kernel's writes are not seen by autograd


@torch.library.register_fake("hf_hadacore::hadamard_transform")
def _fake(x, scale, sign, block_size, transpose):
    _check(x, sign, block_size)
    return x.new_empty(x.shape)


@torch.library.register_fake("hf_hadacore::hadamard_transform_")
def _fake_in_place(x, scale, sign, block_size, transpose):
    _check(x, sign, block_size)


def _setup_context(ctx, inputs, output):
    _, ctx.scale, sign, ctx.block_size, ctx.transpose = inputs
    ctx.save_for_backward(sign)


def _backward(ctx, grad):
    (sign,) = ctx.saved_tensors
    grad_x = torch.ops.hf_hadacore.hadamard_transform(
        grad, ctx.scale, sign, ctx.block_size, not ctx.transpose
    )
    return grad_x, None, None, None, None


torch.library.register_autograd("hf_hadacore::hadamard_transform", _backward, setup_context=_setup_context)


class _InPlace(torch.autograd.Function):
    """The in-place op under autograd: `register_autograd` is not for ops that change their input."""

    @staticmethod
    def forward(x, *arguments):
        torch.ops.hf_hadacore.hadamard_transform_(x, *arguments)
        return x

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_dirty(inputs[0])
        _setup_context(ctx, inputs, output)

    backward = staticmethod(_backward)
