"""Are the Hopper W4A16 kernels right on this GPU?

    python scripts/check_w4a16_tiled.py --json scripts/results/check_w4a16_tiled.json
    compute-sanitizer python scripts/check_w4a16_tiled.py --sanitize

Errors are relative L2 against a float64 product with the weights exactly as stored, in multiples of the error
that rounding the exact result once would have. Every output is filled with NaN before the kernel runs.
"""

import random
from functools import partial
from typing import Any, NamedTuple

import torch
import typer
from check_w4a16 import failures, in_floors, random_weight
from gpu_processes import process_pool
from gpu_report import JsonFile, SanitizeOnly, about_this_run, conclude, require_gpu

from hf_hadacore import int4
from hf_hadacore.int4 import Int4Weight
from hf_hadacore.kernels import w4a16_schedules as schedules
from hf_hadacore.kernels.w4a16_launch import launch
from hf_hadacore.kernels.w4a16_tiled import w4a16_tiled
from hf_hadacore.kernels.w4a16_tiles import to_tiles

VARIANTS = 63
CASES_OF_A_VARIANT = 8
REPEATS = 1000
TOKENS = (1, 2, 3, 5, 8, 9, 15, 16, 17, 31, 33, 64, 65, 100, 129, 300)


def as_tiles(weight: Int4Weight) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The tensors that the op takes."""
    zero = None if weight.zero is None else weight.zero.t().contiguous().t()
    return to_tiles(weight.packed), weight.scale.t().contiguous().t(), zero


class Variant(NamedTuple):
    """What kernels are compiled for; many cases share one, because compiling takes the time."""

    k: int
    group_size: int
    symmetric: bool
    dtype: torch.dtype
    has_bias: bool
    has_perm: bool
    schedule: schedules.Schedule


def random_variant(draw: random.Random) -> Variant:
    """With any schedule that can run, not only those that are fast."""
    k = 128 * draw.choice([1, 3, 8, 16, 33])
    tiles = -(-k // 128 // draw.choice([1, 2, 3, 8]))
    schedule: schedules.Schedule
    kind = draw.random()
    if kind < 0.4:
        block_m, (block_n, num_warps) = draw.choice([8, 16]), draw.choice([(64, 4), (128, 8), (128, 4)])
        stages = draw.randint(1, min(4, tiles))
        schedule = schedules.SkinnySchedule(block_m, block_n, tiles, stages, num_warps)
    elif kind < 0.6:
        schedule = schedules.PrefillSchedule(128, tiles, draw.choice([2, 4]))
    else:
        block_m, stages, slots = draw.choice(
            [(16, 2, 4), (32, 4, 4), (64, 3, 4), (64, 1, 2), (128, 1, 4), (128, 2, 3)]
        )
        schedule = schedules.WideSchedule(block_m, tiles, stages, slots)
    return Variant(
        k,
        draw.choice(int4.GROUP_SIZES),
        draw.random() < 0.5,
        draw.choice([torch.float16, torch.bfloat16]),
        draw.random() < 0.5,
        draw.random() < 0.3,
        schedule,
    )


def run_case(draw: random.Random, variant: Variant) -> tuple[float, dict[str, Any]]:
    """One random problem; its error in floors, and what it was."""
    k, group_size, symmetric, dtype, has_bias, has_perm, schedule = variant
    is_skinny = isinstance(schedule, schedules.SkinnySchedule)
    m = draw.choice([tokens for tokens in TOKENS if not is_skinny or tokens <= schedule.block_m])
    n = 64 * draw.randint(1, 20)
    weight = random_weight(n, k, group_size, symmetric, dtype)
    if draw.random() < 0.3:  # groups that count for nothing, and scales that differ by orders of magnitude
        weight.scale[torch.rand_like(weight.scale, dtype=torch.float32) < 0.2] = 0
        weight.scale[::3, ::2] *= 1e-3
    bias = torch.randn(n, device="cuda", dtype=dtype) if has_bias else None
    perm = torch.randperm(k, device="cuda").int() if has_perm else None
    layout = draw.choice(["contiguous", "offset", "strided", "transposed", "rows", "odd rows"])
    wide = torch.randn(2 * m + 1, 2 * k + 3, device="cuda").to(dtype)
    x = {
        "contiguous": wide[:m, :k].contiguous(),
        "offset": wide[1 : m + 1, 3 : k + 3],
        "strided": wide[: 2 * m : 2, : 2 * k : 2],
        "transposed": wide[:m, :k].T.contiguous().T,
        "rows": torch.randn(m, k + 64, device="cuda").to(dtype)[:, :k],
        "odd rows": torch.randn(m, k + 8, device="cuda").to(dtype)[:, :k],
    }[layout]
    if draw.random() < 0.2:
        x[:, draw.randrange(k)] *= 100  # an outlier channel
    inputs = x if perm is None else x[:, perm.long()]
    exact = inputs.double() @ weight.dequantize(torch.float64).T
    if bias is not None:
        exact += bias.double()
    out = torch.full((m, n), float("nan"), device="cuda", dtype=dtype)
    launch(x, *as_tiles(weight), perm, bias, group_size, out, schedule)
    what = {
        name: value if isinstance(value, bool | int) else repr(value)
        for name, value in variant._asdict().items()
    }
    return in_floors(out, exact), what | {"m": m, "n": n, "layout": layout}


def run_variant(number: int) -> list[tuple[float, dict[str, Any]]]:
    draw = random.Random(number)
    torch.manual_seed(number)
    variant = random_variant(draw)
    return [run_case(draw, variant) for _ in range(CASES_OF_A_VARIANT)]


def check_cases() -> dict[str, Any]:
    with process_pool() as pool:
        results = [case for cases in pool.map(run_variant, range(VARIANTS)) for case in cases]
    worst = max(results, key=lambda result: (result[0] != result[0], result[0]))
    return {
        "variants": VARIANTS,
        "cases": len(results),
        "worst_error_in_floors": round(worst[0], 4),
        "worst_case": worst[1],
    }


def check_repeats() -> dict[str, Any]:
    """The same products many times over, on shapes whose K is split, with others in between."""
    identical = True
    splits = {}
    for m in (8, 16, 64):
        n, k = 1024, 8192
        weight = random_weight(n, k, 128, False, torch.float16)
        tensors = as_tiles(weight)
        x = torch.randn(m, k, device="cuda", dtype=torch.float16)
        schedule = schedules.choose(m, n, k, "sm90", 132)
        splits[m] = -(-k // 128 // schedule.tiles)
        run = partial(w4a16_tiled, x, *tensors, group_size=128)
        first = run()
        identical &= all(torch.equal(run(), first) for _ in range(REPEATS))
    return {"repeats": REPEATS, "split_k_by_tokens": splits, "bit_identical": identical}


def check_bad_rows() -> bool:
    """inf and NaN stay in the rows that hold them; all-zero groups give zero."""
    for m in (3, 40, 1100):
        weight = random_weight(128, 256, 128, False, torch.bfloat16)
        tensors = as_tiles(weight)
        for value in (float("nan"), float("inf")):
            x = torch.ones(m, 256, device="cuda", dtype=torch.bfloat16)
            x[1, 5] = value
            y = w4a16_tiled(x, *tensors, group_size=128)
            good = [row for row in range(m) if row != 1]
            assert y[good].isfinite().all() and not y[1].isfinite().any(), (m, value)
        tensors[1].zero_()
        x = torch.randn(m, 256, device="cuda", dtype=torch.bfloat16)
        assert (w4a16_tiled(x, *tensors, group_size=128) == 0).all()
    return True


def check_beyond_int32() -> dict[str, float]:
    """Tensors with more than 2^31 elements: x, the result, the words of the weight (for both kernels)."""
    worst = {}

    def error(m: int, n: int, k: int, group_size: int) -> float:
        weight = random_weight(n, k, group_size, True, torch.float16)
        tensors = as_tiles(weight)
        x = torch.randn(m, k, device="cuda", dtype=torch.float16)
        y = w4a16_tiled(x, *tensors, group_size=group_size)
        tail = Int4Weight(weight.packed[-64:], weight.scale[-64:], None, group_size).dequantize(torch.float64)
        return in_floors(y[-70:, -64:], x[-70:].double() @ tail.T)

    worst["x"] = error((1 << 21) + 5, 64, 1024, 128)
    worst["result"] = error(1030, (1 << 21) + 64, 128, 32)
    worst["weight, few tokens"] = error(3, (1 << 17) + 64, 1 << 17, -1)
    worst["result, prefill"] = error(1030, (1 << 21) + 64, 256, 128)
    worst["weight, many tokens"] = error(70, (1 << 17) + 64, 1 << 17, 128)
    return {name: round(value, 4) for name, value in worst.items()}


def sanitize() -> None:
    """One small problem for the main variants of all kernels, for compute-sanitizer."""
    for dtype, kinds in (
        (torch.float16, ((128, False), (32, True))),
        (torch.bfloat16, ((64, True), (-1, False))),
    ):
        for group_size, symmetric in kinds:
            for m, schedule in (
                (3, schedules.SkinnySchedule(8, 64, 3, 2, 4)),
                (16, schedules.SkinnySchedule(16, 128, 5, 2, 8)),
                (13, schedules.WideSchedule(16, 3, 2, 4)),
                (33, schedules.WideSchedule(32, 3, 4, 4)),
                (70, schedules.WideSchedule(64, 5, 3, 4)),
                (130, schedules.PrefillSchedule(128, 3, 4)),
            ):
                n, k = 192, 640
                weight = random_weight(n, k, group_size, symmetric, dtype)
                x = torch.randn(m, k, device="cuda", dtype=dtype)
                bias = torch.randn(n, device="cuda", dtype=dtype)
                perm = torch.randperm(k, device="cuda").int() if m == 3 else None
                out = torch.full((m, n), float("nan"), device="cuda", dtype=dtype)
                launch(x, *as_tiles(weight), perm, bias, group_size, out, schedule)
                assert not out.isnan().any()
    torch.cuda.synchronize()
    print("sanitize: every variant ran")


def main(
    json_file: JsonFile = None,
    sanitize_only: SanitizeOnly = False,
) -> None:
    require_gpu(is_hopper=True)
    if sanitize_only:
        return sanitize()
    report: dict[str, Any] = {
        **about_this_run("python scripts/check_w4a16_tiled.py"),
        "random_shapes": check_cases(),
        "repeats": check_repeats(),
        "bad_rows_stay_alone": check_bad_rows(),
        "beyond_2_31_elements": check_beyond_int32(),
    }
    conclude(report, failures(report), json_file)


if __name__ == "__main__":
    typer.run(main)
