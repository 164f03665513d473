"""Random problems for the kernels of 8-bit attention, and how far off each result is.

Every element is held to float64 on the same 8-bit inputs: none may be further off than rounding P and the
result, and what tensor cores drop from sums, allow. All elements of a variant together may have at most 1.05
of the relative L2 error that an emulation has, which rounds P as the kernels do, and computes the rest in
float64. Outputs are filled with NaN before a kernel writes them.
"""

import math
import random
import sys
import traceback
from pathlib import Path
from typing import Any, NamedTuple

import torch

from hf_hadacore.kernels import attention

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from attention_exact import E4M3, Exact, Problem, exact_attention, is_within_bounds, make_problem, masks

HEAD_DIMS = {"attention_hopper": (64, 128), "attention_triton": (64, 80, 96, 112, 128, 192, 256)}
CASES_OF_A_VARIANT = 6
# A sum in the tensor cores keeps some 14 bits of 8-bit products; several such sums follow each other.
PRODUCT_ROUNDOFF = 2.0**-11
MAX_RATIO = 1.05

Options = dict[str, Any]
_DEFAULTS: Options = dict(
    window=0, softcap=0.0, key_start=None, key_end=None, query_start=None, sinks=None, logit_offset=None
)


def run_kernel(kernel: str, problem: Problem, options: Options, dtype: torch.dtype) -> torch.Tensor:
    """What a kernel makes of a problem that fits it, in memory that was NaN before."""
    batch, heads, tokens, d = problem.query.shape
    out = torch.full((batch, tokens, heads, d), math.nan, dtype=dtype, device="cuda")
    module = attention._kernel(kernel)
    assert module is not None
    options = _DEFAULTS | options
    assert module.fits(*problem[:3], **options), f"{kernel} does not take {tuple(problem.query.shape)}"
    module.launch(*problem, out, **options)
    return out


class Variant(NamedTuple):
    """What a kernel is compiled for, or nearly so; several cases share one: compiling takes the time."""

    kernel: str
    d: int
    dtype: torch.dtype
    out_dtype: torch.dtype
    granularity: str
    tokens: str
    heads: tuple[int, int]
    is_causal: bool
    window: int
    softcap: float
    has_sinks: bool
    has_offset: bool
    mask: int


def random_variant(kernel: str, number: int) -> Variant:
    draw = random.Random(f"{kernel} {number}")
    sizes = HEAD_DIMS[kernel]
    return Variant(
        kernel,
        sizes[number % len(sizes)],
        draw.choice([E4M3, torch.int8]),
        draw.choice([torch.bfloat16, torch.float16]),
        draw.choice(["token", "block"]),
        "many" if kernel == "attention_hopper" else ("one", "some", "many")[number % 3],
        draw.choice([(4, 4), (4, 1), (8, 2), (6, 2), (5, 1)]),
        draw.random() < 0.7,
        draw.choice([0, 0, 1, 50, 200]),
        draw.choice([0.0, 0.0, 2.0, 50.0]),
        draw.random() < 0.3,
        draw.random() < 0.3,
        draw.randrange(5),
    )


def draw_case(draw: random.Random, variant: Variant) -> tuple[Problem, Options]:
    batch = draw.choice([1, 2, 3])
    choices = {"one": [1], "some": [2, 5, 16], "many": [33, 64, 128, 130, 257, 400, 640]}
    tokens = draw.choice(choices[variant.tokens])
    keys = max(1, tokens + draw.choice([0, 0, 1, 15, 127, 300, 1000]))
    heads, key_heads = variant.heads
    problem = make_problem(
        batch,
        heads,
        key_heads,
        tokens,
        keys,
        variant.d,
        dtype=variant.dtype,
        granularity=variant.granularity,
        value_mean=draw.choice([0.0, 1.0]),
        seed=draw.randrange(1 << 30),
        device="cuda",
    )
    options: Options = dict(
        scale=draw.choice([1.0, 1.0, 0.3, 3.0]) * variant.d**-0.5,
        is_causal=variant.is_causal,
        window=variant.window,
        softcap=variant.softcap,
    )
    options |= list(masks(batch, tokens, keys, "cuda"))[variant.mask]
    if variant.has_sinks:
        options["sinks"] = 3 * torch.randn(heads, device="cuda")
    if variant.has_offset:
        options["logit_offset"] = 2 * torch.randn(batch, heads, tokens, device="cuda")
    return problem, options


def squares(out: torch.Tensor, exact: Exact) -> torch.Tensor:
    """``[2]``: of the errors of a kernel and of the emulation."""
    emulated = exact.rounded.to(out.dtype).double() - exact.out
    return torch.stack(((out.double() - exact.out).square().sum(), emulated.square().sum()))


def run_variant(job: tuple[str, int]) -> dict[str, Any]:
    """How far off a variant is, and what is wrong with it."""
    variant = random_variant(*job)
    draw = random.Random(f"cases of {job}")
    total = torch.zeros(2, dtype=torch.float64, device="cuda")
    what = str(variant)
    try:
        for case in range(CASES_OF_A_VARIANT):
            problem, options = draw_case(draw, variant)
            what = f"case {case}, q {tuple(problem.query.shape)}, k {tuple(problem.key.shape)}, {variant}"
            out = run_kernel(variant.kernel, problem, options, variant.out_dtype)
            exact = exact_attention(problem, product_roundoff=PRODUCT_ROUNDOFF, **options)
            assert bool(out.isfinite().all()), "not finite"
            assert not out[(exact.bound == 0).all(-1)].any(), "queries that see nothing"
            assert is_within_bounds(out, exact), "an element is out of bounds"
            total += squares(out, exact)
        error, emulated = total.sqrt().tolist()
        ratio = error / emulated if emulated else 1.0
        assert ratio <= MAX_RATIO, f"{ratio} times the error of the emulation"
    except Exception:
        return {"job": job, "ratio": math.inf, "wrong": f"{what}: {traceback.format_exc(limit=3)}"}
    return {"job": job, "ratio": ratio, "wrong": ""}
