"""Runs the pointwise kernels under Triton's interpreter, started by test_pointwise_triton.py.

The interpreter's bf16 is wrong without a word, so everything here is fp16.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import torch
from pointwise_cases import (
    EPS,
    FORMULAS,
    assert_as_exact_as,
    assert_within_one_ulp,
    cos_sin,
    exact_activation,
    exact_norm,
    exact_rotation,
    random,
    strided,
)

from hf_hadacore.kernels import gated_activation_triton, rms_norm_triton, rope_triton
from hf_hadacore.kernels.gated_activation import ACTIVATIONS, gated_activation_reference
from hf_hadacore.kernels.rms_norm import rms_norm_reference
from hf_hadacore.kernels.rope import rope_reference

F16 = torch.float16


def poisoned(*shape: int) -> torch.Tensor:
    return torch.full(shape, float("nan"), dtype=F16)


def check_norm(x: torch.Tensor, has_residual: bool) -> None:
    n = x.shape[-1]
    residual = random(x.shape, F16, seed=2) if has_residual else None
    for offset, round_first in FORMULAS:
        weight = random((n,), F16, seed=1)
        out = poisoned(*x.shape)
        total = poisoned(*x.shape) if has_residual else None
        rms_norm_triton.launch(x, residual, weight, EPS, offset, round_first, out, total)
        normed = x if residual is None else x + residual
        if residual is not None:
            assert torch.equal(total, normed)
        eager = rms_norm_reference(normed, weight, EPS, offset, round_first)
        assert_within_one_ulp(out, eager)
        assert_as_exact_as(out, eager, exact_norm(normed, weight, offset))


def check_norms() -> None:
    for n in (1, 16, 57, 128, 1000, 2560):
        for rows in (1, 3, 9):
            check_norm(random((rows, n), F16), has_residual=rows != 3)
            check_norm(strided((rows, n), F16), has_residual=rows == 3)
    # Heads of a fused projection: rows at two strides, then at three, then not adjacent in a row.
    heads = random((3, 10, 64), F16)[:, 2:7]
    check_norm(heads, has_residual=False)
    check_norm(heads.transpose(0, 1), has_residual=True)
    check_norm(random((2, 3, 10, 64), F16)[:, :, 2:7].transpose(1, 2), has_residual=False)
    check_norm(random((4, 300), F16)[:, ::2], has_residual=True)
    check_norm(random((1, 1, 96), F16)[:, :, 32:], has_residual=False)
    check_norm(random((0, 64), F16), has_residual=False)
    large = torch.full((1, 4096), 200.0, dtype=F16)  # squares that fp16 cannot hold
    check_norm(large, has_residual=False)
    check_norm(large * 0, has_residual=False)


def check_activations() -> None:
    for rows, n in ((1, 8), (3, 1024), (2, 2055), (5, 100), (0, 64)):
        both = 4 * random((rows, 2 * n), F16)
        transposed = random((n, rows, 2), F16)
        cases = [both.chunk(2, dim=-1), (both[:, :n].contiguous(), both[:, n:]), transposed.permute(2, 1, 0)]
        for gate, up in cases:
            for activation in ACTIVATIONS:
                out = poisoned(rows, n)
                gated_activation_triton.launch(gate, up, activation == "gelu_tanh", out)
                eager = gated_activation_reference(gate, up, activation)
                exact = exact_activation(gate, up, activation)
                if activation == "silu":
                    assert_within_one_ulp(out, eager)
                else:
                    # Eager GELU cancels for negative inputs; two roundings of the exact value are the bound.
                    spacing = torch.finfo(F16).eps * exact.abs() + 2 * torch.finfo(F16).smallest_normal
                    assert ((out.double() - exact).abs() <= 1.01 * spacing).all()
                assert_as_exact_as(out, eager, exact)
    extreme = torch.tensor([[60000.0, -60000.0, 0.0, float("nan")]], dtype=F16)
    out = poisoned(1, 4)
    gated_activation_triton.launch(extreme, torch.ones_like(extreme), False, out)
    assert torch.equal(out.isnan(), extreme.isnan()) and out[0, 0] == 60000 and out[0, 1] == 0


def check_rope(batch: int, tokens: int, q_heads: int, kv_heads: int, d: int, case: int) -> None:
    width = (q_heads + 2 * kv_heads) * d
    fused = random((batch, tokens, width), F16, seed=case)
    q, k, v = (
        part.view(batch, tokens, -1, d) for part in fused.split([q_heads * d, kv_heads * d, kv_heads * d], -1)
    )
    if case % 3 == 2:
        q, k, v = (part.transpose(1, 2).contiguous().transpose(1, 2) for part in (q, k, v))
    cos, sin = cos_sin(1 if case % 2 else batch, tokens, d, F16)
    for offset, round_first in ((None, None), FORMULAS[case % len(FORMULAS)]):
        has_norm = offset is not None
        weights = (random((d,), F16, seed=5), random((d,), F16, seed=6)) if has_norm else (None, None)
        norm = (EPS, offset or 0.0, bool(round_first))
        eager_q = rope_reference(q, cos, sin, weights[0], *norm)
        eager_k = rope_reference(k, cos, sin, weights[1], *norm)

        q_out, k_out = poisoned(batch, tokens, q_heads, d), poisoned(batch, kv_heads, tokens, d)
        rope_triton.launch(q, k, None, cos, sin, *weights, *norm, q_out, k_out, None, None)
        pairs = ((q_out, eager_q, q, weights[0]), (k_out.transpose(1, 2), eager_k, k, weights[1]))
        for out, eager, x, weight in pairs:
            if has_norm:
                assert_as_exact_as(out, eager, exact_rotation(x, cos, sin, weight, norm[1]))
                # A norm that is off by one unit shifts both products; here none is larger than 16.
                assert ((out.double() - eager.double()).abs() <= 32 * torch.finfo(F16).eps).all()
            else:
                assert torch.equal(out, eager)

        start, capacity = 5, 5 + tokens + 2
        keys, values = poisoned(batch, kv_heads, capacity, d), poisoned(batch, kv_heads, capacity, d)
        position = torch.tensor(start)
        q_cached = poisoned(batch, tokens, q_heads, d)
        rope_triton.launch(q, k, v, cos, sin, *weights, *norm, q_cached, keys, values, position)
        assert torch.equal(q_cached, q_out)
        written = slice(start, start + tokens)
        assert torch.equal(keys[:, :, written], k_out)
        assert torch.equal(values[:, :, written], v.transpose(1, 2))
        for cache in (keys, values):
            assert cache[:, :, :start].isnan().all() and cache[:, :, start + tokens :].isnan().all()


def check_full_cache() -> None:
    q, k = random((1, 3, 2, 16), F16), random((1, 3, 1, 16), F16)
    cos, sin = cos_sin(1, 3, 16, F16)
    guarded = poisoned(1, 1, 6, 16)
    keys, values = guarded[:, :, :4], guarded[:, :, :4].clone()
    rope_triton.launch(
        q, k, k, cos, sin, None, None, 0.0, 0.0, True, poisoned(1, 3, 2, 16), keys, values, torch.tensor(3)
    )
    assert keys[:, :, 3].isfinite().all() and guarded[:, :, 4:].isnan().all()


ROPE_SHAPES = [(1, 1, 32, 8, 128), (1, 1, 14, 2, 64), (2, 3, 4, 4, 80), (3, 1, 3, 1, 2), (1, 7, 8, 1, 96)]

if __name__ == "__main__":
    check_norms()
    check_activations()
    for case, shape in enumerate(ROPE_SHAPES):
        check_rope(*shape, case=case)
    check_full_cache()
    print(f"interpreted norms, activations and {len(ROPE_SHAPES)} rotations")
