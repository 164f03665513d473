"""Is `rotate_quantize` right on this GPU?

    python scripts/check_rotate_quantize_gpu.py --json scripts/results/check_rotate_quantize.json
    compute-sanitizer python scripts/check_rotate_quantize_gpu.py --sanitize

Values are held to float64, one by one: none may be further off than the 8-bit rounding allows. All memory is
filled with NaN (int8: 127) before a kernel writes to it.
"""

import random
import traceback
from concurrent.futures import Future
from itertools import product
from typing import Any, NamedTuple

import torch
import typer
from check_hadamard_gpu import exact_transform
from gpu_processes import process_pool
from gpu_report import JsonFile, SanitizeOnly, about_this_run, conclude, require_gpu
from rotate_quantize_exact import SUMS, TWO_TERMS, exact_rotation, in_token_order, worst_error

from hf_hadacore.kernels.rotate_quantize import rotate_quantize, rotate_quantize_into_cache
from hf_hadacore.kernels.rotate_quantize_checks import BLOCK_SIZES, LARGEST

VARIANTS = 56
CASES_OF_A_VARIANT = 38
REPEATS = 1000
HEAD_SIZES = (64, 80, 96, 112, 128, 192, 256)
# Activations: rows that are longer than heads.
ROW_SIZES = (
    *(264, 384, 512, 1024, 2048, 3072, 4096, 4864, 5120, 6144, 8192, 8960, 10240, 11008, 13824, 14336),
    *(16384, 18944, 27648, 28672, 32768),
)
CASES_OF_A_ROW_SIZE = 12


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


def run_rows(n: int) -> tuple[float, str, int]:
    """The same for rows of n elements, which have a kernel of their own."""
    draw = random.Random(n)
    torch.manual_seed(n)
    torch.use_deterministic_algorithms(True)
    # Few kernels for many cases.
    kinds = [
        (x_dtype, draw.choice(list(LARGEST)), draw.random() < 0.5, draw.random() < 0.3)
        for x_dtype in (torch.bfloat16, torch.float16, torch.float32)
    ]
    worst, worst_case = -1.0, ""
    for case in range(CASES_OF_A_ROW_SIZE):
        x_dtype, dtype, power_of_2, has_sign = kinds[case % len(kinds)]
        what = f"case {case} of rows of {n}, {x_dtype}, {dtype}, power_of_2 {power_of_2}, sign {has_sign}"
        rows, layout = (
            draw.choice([1, 2, 3, 65, 257]),
            draw.choice(["contiguous", "fused", "every second", "odd"]),
        )
        try:
            x = draw_x(draw, layout, (1, 1, rows, n), x_dtype)[0, 0]
            what += f", x {tuple(x.shape)} of strides {x.stride()}"
            sign = (torch.randint(0, 2, (n,), device="cuda") * 2 - 1).to(x_dtype) if has_sign else None
            values, scale = rotate_quantize(x, dtype=dtype, power_of_2=power_of_2, sign=sign)
            exact = exact_transform(x if sign is None else x * sign, n) * n**-0.5
            tolerance = TWO_TERMS if x_dtype == torch.float32 else SUMS
            error = worst_error(values, scale, exact, 1, tolerance, n**-0.5, power_of_2)
        except Exception:
            return float("inf"), f"{what}: {traceback.format_exc()}", case
        if error > worst:
            worst, worst_case = error, what
    return worst, worst_case, CASES_OF_A_ROW_SIZE


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


def sanitize() -> None:
    """A few small problems of every kind, for compute-sanitizer."""
    torch.use_deterministic_algorithms(True)
    variants = [random_variant(random.Random(number)) for number in range(16)] + NAMED_VARIANTS[-2:]
    for number, variant in enumerate(variants):
        draw = random.Random(number)
        torch.manual_seed(number)
        assert run_case(draw, variant, *draw_case(draw, variant)) <= 1
    for n in (1024, 5120):
        worst, what, _ = run_rows(n)
        assert worst <= 1, what
    torch.cuda.synchronize()
    print(f"sanitize: {len(variants)} variants and two sizes of rows ran")


def main(
    json_file: JsonFile = None,
    sanitize_only: SanitizeOnly = False,
) -> None:
    require_gpu()
    if sanitize_only:
        return sanitize()
    report: dict[str, Any] = about_this_run("python scripts/check_rotate_quantize_gpu.py")
    checks = {
        "nan_and_infinity_stay_visible": check_not_finite,
        "repeats_are_identical": check_repeats,
        "beyond_2_31_elements": check_beyond_int32,
    }
    with process_pool() as pool:
        futures: dict[str, Future[bool]] = {name: pool.submit(check) for name, check in checks.items()}
        # What takes longest to compile comes first.
        rows = pool.map(run_rows, ROW_SIZES[::-1])
        heads = pool.map(run_variant, range(VARIANTS + len(NAMED_VARIANTS)))
        report["random_cases"], report["random_rows"] = summary_of(list(heads)), summary_of(list(rows))
    failed = [name for name in ("random_cases", "random_rows") if report[name]["failed"]]
    for name, future in futures.items():
        error = future.exception()
        if error is not None:
            print(f"{name}: {error!r}")
        report[name] = error is None and future.result()
        if not report[name]:
            failed.append(name)
    conclude(report, failed, json_file)


if __name__ == "__main__":
    typer.run(main)
