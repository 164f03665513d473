"""The pointwise kernels without a GPU: interpreted for their results, compiled for what they become."""

from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from interpreted import run_interpreted
from offline import compile_for

from hf_hadacore.kernels import gated_activation_triton, rms_norm_triton, rope_triton


def test_interpreted():
    assert "interpreted norms, activations and 5 rotations" in run_interpreted("interpret_pointwise.py")


def norm_arguments(dtype: torch.dtype, n: int, has_residual: bool) -> dict[str, Any]:
    return dict(
        p_x=dtype,
        p_residual=dtype if has_residual else None,
        p_weight=dtype,
        p_out=dtype,
        p_sum=dtype if has_residual else None,
        rows="i32",
        inner=1,
        s_outer="i32:16",
        s_inner="i32:16",
        eps="fp32",
        N=n,
        ROWS=max(1, 1024 // n),
        BLOCK=n,
        OFFSET=0.0,
        ROUND_FIRST=True,
    )


def activation_arguments(dtype: torch.dtype) -> dict[str, Any]:
    strides = dict(s_gate="i32:16", s_up="i32:16")
    return dict(
        p_gate=dtype, p_up=dtype, p_out=dtype, N="i32:16", blocks="i32", **strides, IS_GELU=True, BLOCK=1024
    )


def rope_arguments(dtype: torch.dtype, has_norm: bool, has_cache: bool) -> dict[str, Any]:
    return dict(
        p_q=dtype,
        p_k=dtype,
        p_v=dtype if has_cache else None,
        p_cos=dtype,
        p_sin=dtype,
        p_q_weight=dtype if has_norm else None,
        p_k_weight=dtype if has_norm else None,
        p_q_out=dtype,
        p_keys=dtype,
        p_values=dtype if has_cache else None,
        p_position="*i64:16" if has_cache else None,
        tokens="i32",
        capacity="i32:16",
        s_qb="i32:16",
        s_qt="i32:16",
        s_kb="i32:16",
        s_kt="i32:16",
        s_vb="i32:16",
        s_vt="i32:16",
        s_cb="i32:16",
        eps="fp32",
        Q_HEADS=32,
        KV_HEADS=8,
        D=128,
        Q_BLOCK=32,
        KV_BLOCK=8,
        D_BLOCK=64,
        OFFSET=0.0,
        ROUND_FIRST=True,
    )


VARIANTS = {
    "norm": (rms_norm_triton._rms_norm_kernel, lambda dtype: norm_arguments(dtype, 4096, False), 8),
    "norm of heads": (rms_norm_triton._rms_norm_kernel, lambda dtype: norm_arguments(dtype, 128, False), 4),
    "add and norm": (rms_norm_triton._rms_norm_kernel, lambda dtype: norm_arguments(dtype, 8192, True), 16),
    "activation": (gated_activation_triton._gated_activation_kernel, activation_arguments, 4),
    "rope": (rope_triton._rope_kernel, lambda dtype: rope_arguments(dtype, False, False), 8),
    "norm and rope": (rope_triton._rope_kernel, lambda dtype: rope_arguments(dtype, True, False), 8),
    "cache": (rope_triton._rope_kernel, lambda dtype: rope_arguments(dtype, False, True), 8),
    "norm and cache": (rope_triton._rope_kernel, lambda dtype: rope_arguments(dtype, True, True), 8),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("variant", VARIANTS)
def test_compiles_to_wide_accesses_after_the_wait(variant, capability, dtype):
    kernel, arguments, num_warps = VARIANTS[variant]
    has_pdl = capability >= 90
    options = {"launch_pdl": True} if has_pdl else {}
    ptx = compile_for(
        capability, kernel, arguments(dtype) | {"PDL": has_pdl}, num_warps=num_warps, **options
    )["ptx"]
    assert ".local" not in ptx
    assert "ld.global.v4" in ptx and "st.global.v4" in ptx
    accesses = [ptx.find(name) for name in ("ld.global", "st.global", "ld.shared", "st.shared")]
    if has_pdl:
        launch, wait = (ptx.find(f"griddepcontrol.{name}") for name in ("launch_dependents", "wait"))
        assert 0 < launch < wait
        assert all(position == -1 or wait < position for position in accesses)
        # Not inside a branch that some programs do not take.
        assert "bra" not in ptx[:wait]
    else:
        assert "griddepcontrol" not in ptx and "prefetch" not in ptx


@pytest.mark.parametrize("capability", [80, 90])
def test_fp32_compiles(capability):
    has_pdl = capability >= 90
    for kernel, arguments, num_warps in VARIANTS.values():
        asm = compile_for(
            capability, kernel, arguments(torch.float32) | {"PDL": has_pdl}, num_warps=num_warps
        )
        assert ".local" not in asm["ptx"]
