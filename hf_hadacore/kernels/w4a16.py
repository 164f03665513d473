"""y = x W^T + bias with int4 weights and 16-bit activations (W4A16), as the op `hf_hadacore::w4a16_linear`.

The op runs on CUDA (the fused SplitK Triton kernel), on the CPU (see `w4a16_cpu`) and elsewhere through
`w4a16_linear_reference`, which says what it computes.
"""

import torch

from .. import int4
from ..errors import FormatError

torch.library.define(
    "hf_hadacore::w4a16_linear",
    "(Tensor x, Tensor packed, Tensor scale, Tensor? zero, Tensor? input_perm, Tensor? bias, int group_size)"
    " -> Tensor",
)


def w4a16_linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None = None,
    input_perm: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    group_size: int,
) -> torch.Tensor:
    """y = x[..., input_perm] W^T + bias, with W = (q - z) * scale stored as int4.

    Differentiable with respect to x and bias. The weight is never rounded to 16 bits on CUDA: scales are
    applied to fp32 partial products, and the result is rounded once.

    Args:
        x: fp16, bf16 or fp32 ``[..., K]``, any strides.
        packed: int32 ``[N, K/8]``.
        scale: floating point ``[N, ceil(K/g)]``.
        zero: uint8 ``[N, ceil(K/g)]``; None means z = 8.
        input_perm: int32 ``[K]``; None reads x as it is.
        bias: ``[N]``.
        group_size: g, or -1 for one group per row.

    Returns:
        ``[..., N]`` in the dtype of x.

    Raises:
        FormatError: a shape or dtype does not fit.
    """
    return torch.ops.hf_hadacore.w4a16_linear(x, packed, scale, zero, input_perm, bias, group_size)


def w4a16_linear_reference(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    input_perm: torch.Tensor | None,
    bias: torch.Tensor | None,
    group_size: int,
    compute_dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """The specification: the stored weight as it is, one product, one rounding to the dtype of x.

    Args:
        x, packed, scale, zero, input_perm, bias, group_size: as in `w4a16_linear`.
        compute_dtype: of the product.
    """
    weight = int4.dequantize(packed, scale, zero, group_size=group_size, dtype=compute_dtype)
    inputs = x.to(compute_dtype)
    if input_perm is not None:
        inputs = inputs.index_select(-1, input_perm)
    y = inputs @ weight.T
    if bias is not None:
        y = y + bias.to(compute_dtype)
    return y.to(x.dtype)


def check_arguments(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    input_perm: torch.Tensor | None,
    bias: torch.Tensor | None,
    group_size: int,
) -> None:
    """Check shapes and dtypes.

    Raises:
        FormatError: naming the tensor, what was found and what is expected.
    """
    int4.check(packed, scale, zero, group_size=group_size)
    if packed.dim() != 2:
        raise FormatError(f"weight: expected int32 [N, K/8], found shape {tuple(packed.shape)}")
    n, k = packed.shape[0], packed.shape[1] * int4.NIBBLES_PER_WORD
    if x.dim() == 0 or x.shape[-1] != k or not x.is_floating_point():
        raise FormatError(f"x: expected floating point [..., {k}], found {x.dtype} {tuple(x.shape)}")
    if bias is not None and tuple(bias.shape) != (n,):
        raise FormatError(f"bias: expected shape ({n},), found {tuple(bias.shape)}")
    if input_perm is not None and (tuple(input_perm.shape) != (k,) or input_perm.is_floating_point()):
        raise FormatError(
            f"input_perm: expected int32 ({k},), found {input_perm.dtype} {tuple(input_perm.shape)}"
        )


@torch.library.register_fake("hf_hadacore::w4a16_linear")
def _fake(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    input_perm: torch.Tensor | None,
    bias: torch.Tensor | None,
    group_size: int,
) -> torch.Tensor:
    check_arguments(x, packed, scale, zero, input_perm, bias, group_size)
    return x.new_empty((*x.shape[:-1], packed.shape[0]))


@torch.library.impl("hf_hadacore::w4a16_linear", "default")
def _anywhere(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    input_perm: torch.Tensor | None,
    bias: torch.Tensor | None,
    group_size: int,
) -> torch.Tensor:
    check_arguments(x, packed, scale, zero, input_perm, bias, group_size)
    return w4a16_linear_reference(x, packed, scale, zero, input_perm, bias, group_size)


@torch.library.impl("hf_hadacore::w4a16_linear", "cpu")
def _cpu(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    input_perm: torch.Tensor | None,
    bias: torch.Tensor | None,
    group_size: int,
) -> torch.Tensor:
    from .w4a16_cpu import dequantize_and_multiply

    check_arguments(x, packed, scale, zero, input_perm, bias, group_size)
    if input_perm is not None:
        x = x.index_select(-1, input_perm)
    return dequantize_and_multiply(x, packed, scale, zero, bias, group_size)


@torch.library.impl("hf_hadacore::w4a16_linear", "cuda")
def _cuda(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    input_perm: torch.Tensor | None,
    bias: torch.Tensor | None,
    group_size: int,
) -> torch.Tensor:
    from . import w4a16_triton

    check_arguments(x, packed, scale, zero, input_perm, bias, group_size)
    n, k = packed.shape[0], x.shape[-1]
    if not w4a16_triton.supports(x.dtype, k, group_size):
        return w4a16_linear_reference(x, packed, scale, zero, input_perm, bias, group_size)
    x2d = x.reshape(-1, k)
    schedule = w4a16_triton.choose_schedule(x2d.shape[0], n, k, group_size, x.device)
    out = torch.empty((x2d.shape[0], n), dtype=x.dtype, device=x.device)
    w4a16_triton.launch(x2d, packed, scale, zero, input_perm, bias, group_size, out, schedule)
    return out.view(*x.shape[:-1], n)


def _setup_context(ctx, inputs, output):
    _, packed, scale, zero, input_perm, bias, group_size = inputs
    ctx.save_for_backward(packed, scale, zero, input_perm)
    ctx.group_size = group_size
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx, grad):
    weight = ctx.saved_tensors if ctx.needs_input_grad[0] else None
    grad_x, grad_bias = linear_gradients(
        grad, weight, ctx.group_size, ctx.bias_dtype if ctx.needs_input_grad[5] else None
    )
    return grad_x, None, None, None, None, grad_bias, None


def linear_gradients(
    grad: torch.Tensor,
    weight: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None] | None,
    group_size: int,
    bias_dtype: torch.dtype | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Gradients of y = x[..., input_perm] W^T + bias with respect to x and bias.

    Args:
        grad: ``[..., N]``, with respect to y.
        weight: packed, scale, zero and input_perm as in `w4a16_linear`; None if x needs no gradient.
        group_size: g, or -1.
        bias_dtype: of the bias; None if it needs no gradient.
    """
    grad_x = grad_bias = None
    if weight is not None:
        packed, scale, zero, input_perm = weight
        grad_x = grad @ int4.dequantize(packed, scale, zero, group_size=group_size, dtype=grad.dtype)
        if input_perm is not None:
            grad_x = torch.empty_like(grad_x).index_copy_(-1, input_perm.long(), grad_x)
    if bias_dtype is not None:
        grad_bias = grad.flatten(0, -2).sum(0).to(bias_dtype)
    return grad_x, grad_bias


torch.library.register_autograd("hf_hadacore::w4a16_linear", _backward, setup_context=_setup_context)
