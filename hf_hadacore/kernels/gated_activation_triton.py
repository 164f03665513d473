"""Triton kernel of `gated_activation`; see `pointwise_parts` for when it reads what."""

import torch
import triton
import triton.language as tl

from .launcher import has_pdl, run
from .pointwise_parts import OPTIONS, as_rows


@triton.jit(do_not_specialize=["blocks"])
def _gated_activation_kernel(
    p_gate,
    p_up,
    p_out,
    N,
    blocks,
    s_gate,
    s_up,
    IS_GELU: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """out = act(gate) * up; rows of gate and up lie s_gate and s_up apart, out is contiguous."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    i_row = tl.program_id(0).to(tl.int64) // blocks
    o_n = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    m = o_n < N
    b_gate = tl.load(p_gate + i_row * s_gate + o_n, mask=m, other=0.0).to(tl.float32)
    b_up = tl.load(p_up + i_row * s_up + o_n, mask=m, other=0.0).to(tl.float32)
    # Both are gate * sigmoid(...): 0.5 (1 + tanh u) = sigmoid(2u), with 2u = 2 sqrt(2/pi) (g + 0.044715 g^3).
    b_logit = b_gate
    if IS_GELU:
        b_logit = 1.5957691216057308 * (b_gate + 0.044715 * b_gate * b_gate * b_gate)
    b_act = (b_gate / (1.0 + tl.exp(-b_logit))).to(p_out.dtype.element_ty).to(tl.float32)
    tl.store(p_out + i_row * N + o_n, (b_act * b_up).to(p_out.dtype.element_ty), mask=m)


def launch(gate: torch.Tensor, up: torch.Tensor, is_gelu: bool, out: torch.Tensor) -> None:
    """Run the kernel of `hf_hadacore::gated_activation`.

    Args:
        gate, up: ``[..., N]``, each with its own strides.
        is_gelu: GELU (tanh) instead of SiLU.
        out: contiguous, of the same shape.
    """
    if out.numel() == 0:
        return
    n = out.shape[-1]
    gate, inner, s_gate, _ = as_rows(gate)
    if inner != 1:
        gate, s_gate = gate.contiguous(), n
    up, inner, s_up, _ = as_rows(up)
    if inner != 1:
        up, s_up = up.contiguous(), n
    block = 1024
    blocks = -(-n // block)
    pdl = has_pdl(out.device)
    run(
        _gated_activation_kernel,
        (gate, up, out),
        (n, blocks, s_gate, s_up),
        (is_gelu, block, pdl),
        (out.numel() // n * blocks, 1, 1),
        num_warps=4,
        **OPTIONS[pdl],
    )
