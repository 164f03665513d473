"""The tables about the Hadamard transform and quantization behind it, each a block of the function's name."""

import math
import statistics
from typing import Any

from figures import FiguresError, block, read_results, source, table

_BUTTERFLY = "fast_hadamard_transform"


def _by_size(result: dict[str, Any]) -> dict[tuple[int, str, int], dict[str, Any]]:
    """Rows of `benchmark_hadamard.py` by n, dtype and the exponent of the number of elements."""
    return {(row["n"], row["dtype"], round(math.log2(row["elements"]))): row for row in result["rows"]}


def _is_power_of_two(n: int) -> bool:
    return n & (n - 1) == 0


@block
def hadamard_speed() -> str:
    result, peers = read_results("hadamard"), read_results("hadamard_peers")
    cells = _by_size(result)
    sizes = sorted({n for n, _, _ in cells})
    exponents = sorted({exponent for _, dtype, exponent in cells if dtype == "bf16"})

    def share(n: int, exponent: int, dtype: str = "bf16", name: str = "ours") -> str:
        us = cells.get((n, dtype, exponent), {"us": {}})["us"]
        return f"{us['copy'] / us[name]:.2f}" if name in us else ""

    def hot(n: int) -> str:
        us = cells.get((n, "bf16", 20), {"hot_us": {}})["hot_us"]
        return f"{us['ours'] / us['copy']:.2f}" if "ours" in us else ""

    at_27, at_25 = (peers[f"share_of_copy_at_2_{count}_elements_bf16"] for count in (27, 25))
    powers = table(
        ["n, bf16", *(f"2^{exponent}" for exponent in exponents), "hot", "dense", *at_27],
        [
            [
                n,
                *(share(n, exponent) for exponent in exponents),
                hot(n),
                share(n, 25, name="dense"),
                *(f"{shares[str(n)]:.2f}" if str(n) in shares else "" for shares in at_27.values()),
            ]
            for n in sizes
            if _is_power_of_two(n)
        ],
    )
    others = table(
        ["n", "bf16", "fp16", "hot", *at_25],
        [
            [
                n,
                share(n, 25),
                share(n, 25, "fp16"),
                hot(n),
                *(f"{shares[str(n)]:.2f}" if str(n) in shares else "" for shares in at_25.values()),
            ]
            for n in sizes
            if not _is_power_of_two(n)
        ],
    )
    wide = ", ".join(f"{share(n, 25, 'fp32')} for {n}" for n in sizes if share(n, 25, "fp32"))
    cases = read_results("check_hadamard")["random_cases"]
    errors = ", ".join(
        f"{name.removeprefix('torch.')} {worst['error_in_floors']:.3f} floors"
        for name, worst in cases["worst"].items()
    )
    notes = (
        "Shares of the speed of a copy of the same tensors, from memory, by the number of elements (second "
        "table: 2^25); hot: times as long as a copy, 2^20 elements in the L2 cache; dense: a product with "
        f"the whole matrix, 2^25 elements. The last columns are figures of {peers['device']} of "
        f"{peers['date']}, at 2^27 and 2^25 elements. fp32 is computed by float64 products: {wide}. Largest "
        f"errors in {cases['cases']} random cases: {errors}. {source(result)}"
    )
    return f"{powers}\n\n{others}\n\n{notes}"


@block
def hadamard_over_butterfly() -> str:
    result = read_results("hadamard")
    compared = {key: row for key, row in _by_size(result).items() if _BUTTERFLY in row["us"]}
    rows = {(n, exponent): row for (n, dtype, exponent), row in compared.items() if dtype == "bf16"}
    if not rows:
        raise FiguresError(
            f"scripts/results/hadamard.json has no times of {_BUTTERFLY}: install it and rerun"
        )

    def gain(us: dict[str, float]) -> float:
        return us[_BUTTERFLY] / us["ours"]

    gains = {key: gain(row["us"]) for key, row in rows.items()}
    exponents = sorted({exponent for _, exponent in rows})

    def hot(n: int) -> str:
        us = rows.get((n, 20), {"hot_us": {}})["hot_us"]
        return f"{gain(us):.2f}x" if "ours" in us else ""

    cells = [
        [n, *(f"{gains[n, e]:.2f}x" if (n, e) in gains else "" for e in exponents), hot(n)]
        for n in sorted({n for n, _ in rows})
    ]
    header = ["n, bf16", *(f"2^{exponent}" for exponent in exponents), "2^20, in the L2 cache"]
    wide = ", ".join(
        f"{gain(row['us']):.3f}x for {n}" for (n, dtype, _), row in compared.items() if dtype == "fp32"
    )
    note = (
        f"From memory: {min(gains.values()):.2f}x to {max(gains.values()):.2f}x, in the median "
        f"{statistics.median(gains.values()):.2f}x. In fp32, which ours computes by float64 products: "
        f"{wide or 'not measured'}."
    )
    return f"{table(header, cells)}\n\n{note} {source(result)}"


@block
def rotate_quantize_speed() -> str:
    result, checked = read_results("rotate_quantize"), read_results("check_rotate_quantize")
    rows = [
        [row["work"], f"{row['us']:.1f} µs", f"{row['floor_us']:.1f} µs", f"{row['share_of_floor']:.0%}"]
        for row in result["times"]
        if row["tokens"] > 1
    ]
    single = ", ".join(f"{row['work']}: {row['us']:.1f} µs" for row in result["times"] if row["tokens"] == 1)
    header = ["32 q and 8 kv heads of 8192 tokens, 2^25 elements of activations", "time", "floor", "share"]
    cases = sum(checked[name]["cases"] for name in ("random_cases", "random_rows"))
    failed = sum(checked[name]["failed"] for name in ("random_cases", "random_rows"))
    note = f"{cases} random problems, value by value against float64: {failed or 'none'} beyond the rounding."
    return f"{table(header, rows)}\n\n{single}. {note} {source(result)}"
