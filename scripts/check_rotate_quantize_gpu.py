"""Is `rotate_quantize` right on this GPU?

    python scripts/check_rotate_quantize_gpu.py --json scripts/results/check_rotate_quantize.json
    compute-sanitizer python scripts/check_rotate_quantize_gpu.py --sanitize

Values are held to float64, one by one: none may be further off than the 8-bit rounding allows. All memory is
filled with NaN (int8: 127) before a kernel writes to it.
"""

import json
import multiprocessing
import os
import random
import traceback
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import product
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from gpu_report import about_this_run, write_report

from hf_hadacore.hadamard_matrices import hadamard_matrix
from hf_hadacore.kernels.rotate_quantize import SMALLEST_MAXIMUM, rotate_quantize, rotate_quantize_into_cache
from hf_hadacore.kernels.rotate_quantize_checks import BLOCK_SIZES, LARGEST

VARIANTS = 56
CASES_OF_A_VARIANT = 38
REPEATS = 1000
HEAD_SIZES = (64, 80, 96, 112, 128, 192, 256)
# What fp32 sums may be off, relative to a token's largest magnitude.
SUMS = 2e-5
# The same where two bf16 terms of a value go into them.
TWO_TERMS = 1e-4
# Bits of the mantissa and exponent of the smallest normal number.
_FORMATS = {torch.float8_e4m3fn: (3, -6), torch.float8_e5m2: (2, -14)}


def nearest_bf16(x: torch.Tensor) -> torch.Tensor:
    """float64 rounded to bf16's 8 significant bits once: torch's own cast goes through fp32."""
    bits = x.view(torch.int64)
    bits = bits + (1 << 44) - 1 + (bits >> 45 & 1)
    return (bits >> 45 << 45).view(torch.float64)


def exact_rotation(
    x: torch.Tensor,
    rotate: bool = True,
    offset: torch.Tensor | None = None,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    sign: torch.Tensor | None = None,
) -> torch.Tensor:
    """What is quantized, in float64, but for what `rotate_quantize` promises to round where x is bf16."""
    d, is_bf16 = x.shape[-1], x.dtype == torch.bfloat16
    x = x.double()
    if cos is not None and sin is not None:
        rounded = nearest_bf16 if is_bf16 and cos.dtype == torch.bfloat16 else torch.Tensor.double
        low, high = x[..., : d // 2], x[..., d // 2 :]
        cos, sin = cos.double()[:, None], sin.double()[:, None]
        first = rounded(rounded(low * cos[..., : d // 2]) - high * sin[..., : d // 2])
        second = rounded(rounded(high * cos[..., -(d // 2) :]) + low * sin[..., -(d // 2) :])
        x = torch.cat((first, second), dim=-1)
    if offset is not None:
        x = x - offset.double()[..., None, :]
        # What is rounded to bf16 is fp32.
        x = nearest_bf16(x.float().double()) if is_bf16 and rotate else x
    if sign is not None:
        x = x * sign.double()
    return x @ hadamard_matrix(d).to(x).T * d**-0.5 if rotate else x


def worst_error(
    values: torch.Tensor,
    scale: torch.Tensor,
    exact: torch.Tensor,
    group: int,
    tolerance: float,
    norm: float = 1.0,
    power_of_2: bool = False,
) -> float:
    """How far the worst value or scale is off, where 1 is what rounding may cost.

    Args:
        values: 8-bit, of the shape of `exact`.
        scale: as `rotate_quantize` returns it.
        exact: float64 ``[..., S, D]``.
        group: tokens of a scale; 0 for all of a head.
        tolerance: of what is rounded, relative to the largest magnitude.
        norm: of the rotation, which decides what counts as zero.
        power_of_2: whether scales were rounded up to powers of two.
    """
    tokens = exact.shape[-2]
    if exact.numel() == 0:
        return 0.0
    size = group or tokens
    maxima = [part.abs().amax((-2, -1)) for part in exact.split(size, dim=-2)]
    expected = torch.stack(maxima, dim=-1).clamp(min=SMALLEST_MAXIMUM * norm) / LARGEST[values.dtype]
    scale = scale.double().reshape(expected.shape)
    if power_of_2:
        # Next to a power of two either that or the next one is right.
        is_right = (scale >= expected * (1 - tolerance)) & (scale < 2 * expected * (1 + tolerance))
        if not bool((is_right & (scale.frexp().mantissa == 0.5)).all()):
            return float("inf")
        expected = scale
    scale_error = ((scale - expected).abs() / expected).max() / tolerance
    quotient = exact / expected.repeat_interleave(size, -1)[..., :tokens, None]
    step = torch.ones_like(quotient)
    if values.dtype in _FORMATS:
        bits, smallest = _FORMATS[values.dtype]
        step = 2 ** (quotient.abs().clamp(min=2.0**smallest).log2().floor() - bits)
    error = (values.double() - quotient).abs() / (step / 2 + 2 * tolerance * LARGEST[values.dtype])
    # A NaN is worse than anything.
    return float(torch.cat([scale_error.reshape(1), error.max().reshape(1)]).nan_to_num(torch.inf).max())


def in_token_order(values: torch.Tensor) -> torch.Tensor:
    """Undo `interleave`: ``[..., S16]``."""
    return values.unflatten(-1, (values.shape[-1] // 16, 4, 2, 2)).transpose(-3, -2).flatten(-4)


class Variant(NamedTuple):
    """What a kernel is compiled for; several cases share one, because compiling takes the time."""

    d: int
    x_dtype: torch.dtype
    dtype: torch.dtype
    scale: str
    block_size: int
    rotate: bool
    transpose: bool
    has_offset: bool
    rope: str
    has_sign: bool
    heads: int
    layout: str
    is_aligned: bool
    interleave: bool
    power_of_2: bool


def random_variant(draw: random.Random) -> Variant:
    rotate, transpose = draw.random() < 0.8, draw.random() < 0.4
    return Variant(
        draw.choice([*HEAD_SIZES, 128, 128, 64, 2, 16, 40]),
        draw.choice([torch.bfloat16, torch.bfloat16, torch.float16, torch.float32]),
        draw.choice(list(LARGEST)),
        draw.choice(["token", "token", "block", "head"]),
        draw.choice(BLOCK_SIZES),
        rotate,
        transpose,
        draw.random() < 0.3,
        draw.choice(["none", "none", "whole", "half"]),
        rotate and draw.random() < 0.2,
        draw.choice([1, 2, 3, 4, 8]),
        draw.choice(["contiguous", "tokens first", "tokens first", "fused", "every second", "odd"]),
        draw.random() < 0.7,
        transpose and draw.random() < 0.6,
        draw.random() < 0.3,
    )


_PLAIN = Variant(
    d=128,
    x_dtype=torch.bfloat16,
    dtype=torch.float8_e4m3fn,
    scale="token",
    block_size=128,
    rotate=True,
    transpose=False,
    has_offset=False,
    rope="none",
    has_sign=False,
    heads=8,
    layout="fused",
    is_aligned=True,
    interleave=False,
    power_of_2=False,
)
_VALUES = _PLAIN._replace(rotate=False, transpose=True, interleave=True, power_of_2=True)
NAMED_VARIANTS = [
    # What takes the most shared memory and registers.
    _PLAIN._replace(d=256, x_dtype=torch.float32, has_offset=True, rope="whole", has_sign=True),
    _PLAIN._replace(d=256, dtype=torch.int8, scale="block", has_offset=True, rope="whole", has_sign=True),
    _PLAIN._replace(dtype=torch.int8, scale="block", block_size=64, rope="half"),
    # V of a first prefill, and into a cache.
    _VALUES._replace(scale="block"),
    _VALUES._replace(is_aligned=False),
]


def draw_x(draw: random.Random, layout: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """``[B, H, S, D]`` in a layout that attention or a cache may hand over."""
    batch, heads, tokens, d = shape
    if layout == "contiguous":
        x = torch.randn(shape, device="cuda").to(dtype)
    elif layout == "tokens first":
        x = torch.randn(batch, tokens, heads, d, device="cuda").to(dtype).transpose(1, 2)
    elif layout == "fused":
        wide = torch.randn(batch, tokens, 3 * heads, d, device="cuda").to(dtype)
        x = wide[:, :, heads : 2 * heads].transpose(1, 2)
    elif layout == "every second":
        x = torch.randn(batch, heads, tokens, 2 * d, device="cuda").to(dtype)[..., ::2]
    else:
        x = torch.randn(batch, heads, tokens, d + 3, device="cuda").to(dtype)[..., 1 : d + 1]
    kind = draw.random()
    if kind < 0.2:
        x[..., draw.randrange(d)] *= 50  # an outlier channel
    elif kind < 0.3:
        x *= 1e-6
    elif kind < 0.4:
        x[:, :, draw.randrange(tokens)] = 0
    return x


def draw_case(draw: random.Random, variant: Variant) -> tuple[torch.Tensor, dict[str, Any]]:
    """x and the arguments of `exact_rotation`."""
    d, heads, batch = variant.d, variant.heads, draw.choice([1, 2, 3])
    tokens = draw.choice(
        [16, 64, 112, 512, 1008] if variant.is_aligned else [1, 2, 7, 63, 65, 100, 129, 1000]
    )
    x = draw_x(draw, variant.layout, (batch, heads, tokens, d), variant.x_dtype)
    offset = cos = sin = sign = None
    if variant.has_offset:
        shape = draw.choice([(heads, d), (1, heads, d), (batch, heads, d)])
        offset = torch.randn(shape, device="cuda")
    if variant.rope != "none":
        width = d if variant.rope == "whole" else d // 2
        angles = 9 * torch.randn(draw.choice([1, batch]), tokens, width, device="cuda")
        cos, sin = angles.cos().to(variant.x_dtype), angles.sin().to(variant.x_dtype)
    if variant.has_sign:
        sign = (torch.randint(0, 2, (d,), device="cuda") * 2 - 1).to(
            draw.choice([torch.int8, variant.x_dtype])
        )
    return x, dict(rotate=variant.rotate, offset=offset, cos=cos, sin=sin, sign=sign)


def tolerance_of(x: torch.Tensor, front: dict[str, Any]) -> float:
    has_front = front["offset"] is not None or front["cos"] is not None
    is_one_term = x.dtype == torch.bfloat16 or (x.dtype == torch.float16 and not has_front)
    return SUMS if is_one_term or not front["rotate"] else TWO_TERMS


def run_case(draw: random.Random, variant: Variant, x: torch.Tensor, front: dict[str, Any]) -> float:
    options: dict[str, Any] = dict(dtype=variant.dtype, scale=variant.scale, block_size=variant.block_size)
    form: dict[str, Any] = dict(
        transpose=variant.transpose, interleave=variant.interleave, power_of_2=variant.power_of_2
    )
    values, scale = rotate_quantize(x, **form, **options, **front)
    group = {"token": 1, "block": variant.block_size, "head": 0}[variant.scale]
    exact = exact_rotation(x, **front)
    if variant.interleave:
        assert values.is_contiguous() and values.shape[-1] % 16 == 0, "rows of interleaved values"
        values = in_token_order(values)
        assert not values[..., x.shape[2] :].view(torch.int8).any(), "zeros behind the last token"
        values = values[..., : x.shape[2]]
    shown = values.mT if variant.transpose else values
    norm = variant.d**-0.5 if variant.rotate else 1.0
    worst = worst_error(shown, scale, exact, group, tolerance_of(x, front), norm, variant.power_of_2)
    if variant.scale == "token":
        check_cache(draw, variant, x, shown, scale, front, form)
    return worst


def check_cache(
    draw: random.Random,
    variant: Variant,
    x: torch.Tensor,
    values: torch.Tensor,
    scale: torch.Tensor,
    front: dict[str, Any],
    form: dict[str, Any],
) -> None:
    """The same values ``[B, H, S, D]`` at their position in a cache, everything else as it was."""
    batch, heads, tokens, d = x.shape
    start = draw.choice([0, 5, 64])
    room = draw.choice([0, 0, 9, -1])
    capacity = max(start, start + tokens + room)
    if variant.is_aligned:
        capacity = -(-capacity // 16) * 16
    columns = -(-capacity // 16) * 16 if variant.interleave else capacity
    shape = (batch, heads, d, columns) if variant.transpose else (batch, heads, capacity, d)
    cache = torch.empty(shape, dtype=variant.dtype, device="cuda")
    before = cache.clone().view(torch.int8)
    scales = torch.empty(batch, heads, capacity, device="cuda")
    position = torch.tensor([start], device="cuda")
    rotate_quantize_into_cache(x, cache, scales, position, **form, **front)
    shown = cache.view(torch.int8)
    if variant.interleave:
        shown, before = in_token_order(shown), in_token_order(before)
    if variant.transpose:
        shown, before = shown.mT, before.mT
    written = min(tokens, capacity - start)
    new = values.view(torch.int8)[:, :, :written]
    assert torch.equal(shown[:, :, start : start + written], new), "cache and no cache"
    assert torch.equal(scales[:, :, start : start + written], scale[:, :, :written]), "scales in the cache"
    assert torch.equal(shown[:, :, :start], before[:, :, :start]), "written before the position"
    assert torch.equal(shown[:, :, start + written :], before[:, :, start + written :]), "written behind"
    assert bool(scales[:, :, :start].isnan().all()) and bool(scales[:, :, start + written :].isnan().all())


def run_variant(number: int) -> tuple[float, str, int]:
    """Worst error, the parameters of its case and what was wrong there, and how many cases ran."""
    draw = random.Random(number)
    torch.manual_seed(number)
    # Fills whatever is allocated.
    torch.use_deterministic_algorithms(True)
    variant = random_variant(draw) if number < VARIANTS else NAMED_VARIANTS[number - VARIANTS]
    worst, worst_case = -1.0, ""
    for case in range(CASES_OF_A_VARIANT):
        what = f"case {case} of variant {number}, {variant}"
        try:
            x, front = draw_case(draw, variant)
            what += f", x {tuple(x.shape)} of strides {x.stride()}"
            error = run_case(draw, variant, x, front)
        except Exception:
            return float("inf"), f"{what}: {traceback.format_exc()}", case
        if error > worst:
            worst, worst_case = error, what
    return worst, worst_case, CASES_OF_A_VARIANT


def summary_of(outcomes: list[tuple[float, str, int]]) -> dict[str, Any]:
    for worst, what, _ in outcomes:
        if worst > 1:
            print(f"error {worst}: {what}")
    worst, what, _ = max(outcomes)
    return {
        "variants": len(outcomes),
        "cases": sum(cases for _, _, cases in outcomes),
        "failed": sum(worst > 1 for worst, _, _ in outcomes),
        "worst_error": round(worst, 4),
        "worst_case": what,
    }


def check_not_finite() -> bool:
    """One NaN or infinity makes its token, block or head visibly wrong, and no other."""
    right = True
    for dtype, scale, bad in product(LARGEST, ("token", "block", "head"), (float("nan"), float("inf"))):
        x = torch.randn(1, 2, 128, 128, device="cuda", dtype=torch.bfloat16)
        x[0, 1, 70, 3] = bad
        values, scales = rotate_quantize(x, dtype=dtype, scale=scale, block_size=64)
        size = {"token": 1, "block": 64, "head": 128}[scale]
        per_token = scales.reshape(1, 2, -1).repeat_interleave(size, -1)
        dequantized = values.float() * per_token[..., None]
        wrong = ~dequantized.isfinite()
        expected = torch.zeros_like(wrong)
        expected[0, 1, 70 // size * size : (70 // size + 1) * size] = True
        # A finite token whose scale is infinite or NaN must not look finite either.
        right &= torch.equal(wrong, expected)
    return right


def check_repeats() -> bool:
    x = torch.randn(1, 8, 3000, 128, device="cuda", dtype=torch.bfloat16)
    # Looked at once: every look waits for the other processes on this GPU.
    differs = torch.zeros((), dtype=torch.bool, device="cuda")
    for scale in ("token", "block", "head"):
        first = rotate_quantize(x, scale=scale)
        for _ in range(REPEATS // 3):
            again = rotate_quantize(x, scale=scale)
            differs |= (first[0].view(torch.int8) != again[0].view(torch.int8)).any()
            differs |= (first[1] != again[1]).any()
    return not differs


def check_beyond_int32() -> bool:
    """A tensor of more than 2^31 elements, and its last tokens alone."""
    tokens = (1 << 21) + 5
    x = torch.randn(1, tokens, 8, 128, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    right = True
    for transpose in (False, True):
        values, scale = rotate_quantize(x, transpose=transpose)
        part, part_scale = rotate_quantize(x[:, 5:, -9:], transpose=transpose)
        last = values[:, 5:, :, -9:] if transpose else values[:, 5:, -9:]
        right &= torch.equal(last.view(torch.int8), part.view(torch.int8))
        right &= torch.equal(scale[:, 5:, -9:], part_scale)
        del values, scale
    return right


def pool_of_processes() -> ProcessPoolExecutor:
    """Compiling takes the time: several processes share the GPU."""
    return ProcessPoolExecutor(min(14, os.cpu_count() or 1), multiprocessing.get_context("spawn"))


def sanitize() -> None:
    """A few small problems of every kind, for compute-sanitizer."""
    torch.use_deterministic_algorithms(True)
    variants = [random_variant(random.Random(number)) for number in range(16)] + NAMED_VARIANTS[-2:]
    for number, variant in enumerate(variants):
        draw = random.Random(number)
        torch.manual_seed(number)
        assert run_case(draw, variant, *draw_case(draw, variant)) <= 1
    torch.cuda.synchronize()
    print(f"sanitize: {len(variants)} variants ran")


def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="Where to write the results.")] = None,
    sanitize_only: Annotated[
        bool, typer.Option("--sanitize", help="Small run for compute-sanitizer.")
    ] = False,
) -> None:
    if not torch.cuda.is_available():
        raise SystemExit("this check needs a CUDA device")
    if sanitize_only:
        return sanitize()
    report: dict[str, Any] = about_this_run("python scripts/check_rotate_quantize_gpu.py")
    checks = {
        "nan_and_infinity_stay_visible": check_not_finite,
        "repeats_are_identical": check_repeats,
        "beyond_2_31_elements": check_beyond_int32,
    }
    with pool_of_processes() as pool:
        futures: dict[str, Future[bool]] = {name: pool.submit(check) for name, check in checks.items()}
        report["random_cases"] = summary_of(
            list(pool.map(run_variant, range(VARIANTS + len(NAMED_VARIANTS))))
        )
    failed = ["random_cases"] if report["random_cases"]["failed"] else []
    for name, future in futures.items():
        error = future.exception()
        if error is not None:
            print(f"{name}: {error!r}")
        report[name] = error is None and future.result()
        if not report[name]:
            failed.append(name)
    report["failed"] = failed
    write_report(report, json_file)
    print(json.dumps(report, indent=1))
    if failed:
        raise SystemExit(f"failed: {failed}")
    print("all right")


if __name__ == "__main__":
    typer.run(main)
