"""README's tables, from the committed results.

    python scripts/make_figures.py            # fill them in
    python scripts/make_figures.py --check    # fail if README does not say what the results say

A table stands between `<!-- figures:NAME -->` and `<!-- /figures:NAME -->`, and is what the function NAME
below returns. To add one, write a function with `@block` that reads its results with `read_results`, and put
the two comments into README.
"""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

README = Path(__file__).parents[1] / "README.md"
RESULTS = Path(__file__).parent / "results"

BLOCKS: dict[str, Callable[[], str]] = {}
_MARKERS = re.compile(r"(<!-- figures:(\w+) -->\n).*?(<!-- /figures:\2 -->)", re.DOTALL)


class FiguresError(Exception):
    """README and the functions here do not fit together, or results are missing."""


def block(function: Callable[[], str]) -> Callable[[], str]:
    """Make a function the source of README's block of the same name."""
    BLOCKS[function.__name__] = function
    return function


def read_results(name: str) -> dict[str, Any]:
    """The results that a benchmark wrote to `scripts/results/NAME.json`.

    Raises:
        FiguresError: there are none.
    """
    file = RESULTS / f"{name}.json"
    if not file.is_file():
        raise FiguresError(f"scripts/results/{file.name} is missing; run the benchmark that writes it")
    return json.loads(file.read_text("utf-8"))


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table: text in the first column, figures in the others."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def source(result: dict[str, Any]) -> str:
    """Where, when, with what and how figures were measured."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return f"{result['device']}; {versions}; {result['date']}: `{result['command']}`"


def fill(text: str) -> str:
    """The text with all its blocks written anew.

    Raises:
        FiguresError: a block has no function, a function no block, or a closing comment is missing.
    """
    found = [match[2] for match in _MARKERS.finditer(text)]
    opened = re.findall(r"<!-- figures:(\w+) -->", text)
    if found != opened:
        raise FiguresError(f"README: figures:{next(n for n in opened if n not in found)} is not closed")
    if set(found) != set(BLOCKS):
        raise FiguresError(
            f"README has blocks {sorted(found)}, scripts/make_figures.py functions {sorted(BLOCKS)}; "
            "they must be the same"
        )
    return _MARKERS.sub(lambda match: f"{match[1]}{BLOCKS[match[2]]()}\n{match[3]}", text)


def main(
    check: Annotated[bool, typer.Option("--check", help="Change nothing; fail if README is stale.")] = False,
) -> None:
    text = README.read_text("utf-8")
    try:
        new = fill(text)
    except FiguresError as error:
        raise SystemExit(f"error: {error}") from None
    if check and new != text:
        raise SystemExit("README.md is stale; run: make figures")
    if not check:
        README.write_text(new, "utf-8")


def _with_error(difference: dict[str, float]) -> str:
    return f"{difference['nll']:+.3f} ± {difference['standard_error']:.3f}"


@block
def quality() -> str:
    result = read_results("quality")
    parts = []
    for model in result["models"].values():
        rows: list[list[object]] = [["bf16", 16, f"{model['baseline_perplexity']:.2f}", "", ""]]
        for recipe in model["recipes"]:
            gain = recipe.get("gain_over_minmax")
            rows.append(
                [
                    recipe["recipe"],
                    f"{recipe['bits_per_weight']:.2f}",
                    f"{recipe['perplexity']:.2f}",
                    _with_error(recipe["over_baseline"]),
                    _with_error(gain) if gain else "",
                ]
            )
        title = f"{model['title']} ({model['origin']}; {model['tokens']:,} tokens)"
        header = [title, "bits per weight", "perplexity", "nats per token over bf16", "gain over min-max"]
        parts.append(table(header, rows))
        parts += [
            f"An int4 output head costs {_with_error(recipe['cost_of_int4_head'])} nats per token."
            for recipe in model["recipes"]
            if "cost_of_int4_head" in recipe
        ]
    return "\n\n".join([*parts, f"Mean ± standard error of paired windows. {source(result)}"])


@block
def cpu_speed() -> str:
    result = read_results("cpu_speed")
    names = {"decode": "decode, batch 1", "prefill": "prefill of"}
    rows = [
        [
            f"{model['model']}, {' '.join(names.get(part, part) for part in task.split('_'))}",
            *(f"{model['tokens_per_second'][kind][task]:.1f}" for kind in ("bf16", "int4")),
            f"{ratio:.2f}x",
        ]
        for model in result["models"]
        for task, ratio in model["int4_over_bf16"].items()
    ]
    header = [f"tokens per second, group {result['group_size']}", "bf16", "int4", "int4 / bf16"]
    return f"{table(header, rows)}\n\n{result['isa']}; {source(result)}"


@block
def gpu() -> str:
    portable, hopper = read_results("check_w4a16"), read_results("check_w4a16_tiled")
    rows = []
    for name, result in (("portable Triton kernel", portable), ("Hopper kernels", hopper)):
        random, repeats = result["random_shapes"], result["repeats"]
        worst = max(random["worst_error_in_floors"], *result["beyond_2_31_elements"].values())
        same = f"{repeats['repeats']}, {'the same bits' if repeats['bit_identical'] else 'DIFFERENT bits'}"
        rows.append([name, random["cases"], f"{worst:.2f} floors", same])
    model = read_results("check_model_gpu")
    memory = [f"{model['results'][kind]['memory_gib']} GiB in {kind}" for kind in ("bf16", "int4")]
    header = ["against float64", "random problems", "largest error", "repeats"]
    sources = "\n\n".join(source(result) for result in (portable, hopper))
    return f"{table(header, rows)}\n\n{sources}\n\n{model['model']}: {', '.join(memory)}. {source(model)}"


@block
def w4a16_speed() -> str:
    result = read_results("w4a16")
    cells = {(row["n"], row["k"], row["m"]): row for row in result["rows"]}
    shapes = list(dict.fromkeys((row["n"], row["k"]) for row in result["rows"]))
    tokens = sorted({row["m"] for row in result["rows"]})
    few, many = [m for m in tokens if m <= 64], [m for m in tokens if m > 64]
    skinny = table(
        ["few tokens: µs, share of the floor, times as fast as the best peer", *(f"M = {m}" for m in few)],
        [[f"{n}x{k}", *(_beside_peers(cells[n, k, m]) for m in few)] for n, k in shapes],
    )
    wide = table(
        ["many tokens: µs, times as fast as cuBLAS fp16", *(f"M = {m}" for m in many)],
        [[f"{n}x{k}", *(_beside_cublas(cells[n, k, m]) for m in many)] for n, k in shapes],
    )
    worst = max(row["error_in_floors"]["ours_fp16"] for row in result["rows"])
    peers = sorted({name for row in result["rows"] for name in row["us"] if name != "ours_fp16"})
    notes = (
        f"Copy bandwidth {result['copy_bandwidth_tb_per_s']} TB/s. Peers: {', '.join(peers)}. "
        f"Our largest error: {worst:.2f} floors. {source(result)}"
    )
    return f"{skinny}\n\n{wide}\n\n{notes}"


def _beside_peers(row: dict[str, Any]) -> str:
    ours = row["us"]["ours_fp16"]
    best = min(us for name, us in row["us"].items() if name != "ours_fp16")
    return f"{ours:.1f}, {row['floor_us'] / ours:.0%}, {best / ours:.2f}x"


def _beside_cublas(row: dict[str, Any]) -> str:
    ours = row["us"]["ours_fp16"]
    return f"{ours:.0f}, {row['us']['cublas_fp16'] / ours:.2f}x"


@block
def split_k() -> str:
    result = read_results("w4a16")
    gains = result["split_k_gain"]
    sizes = sorted({row["size"] for row in result["split_k"]})
    best = {
        size: [
            row["us_by_split_k"]["1"] / min(row["us_by_split_k"].values())
            for row in result["split_k"]
            if row["size"] == size
        ]
        for size in sizes
    }
    header = ["N = K", *map(str, sizes)]
    means = ["best split over none, mean of M = 1...16", *(f"{sum(r) / len(r):.2f}x" for r in best.values())]
    fixed = ", ".join(f"{k} programs {gain:+.0%}" for k, gain in gains.items() if k != "best")
    mean = f"Mean over all: best split {gains['best']:+.0%}; {fixed}."
    return f"{table(header, [means])}\n\n{mean} {source(result)}"


@block
def offline_memory() -> str:
    result = read_results("offline_memory")
    header = [result["shapes"], "checkpoint", "largest layer", "peak memory", "in largest layers", "time"]
    rows = [
        [
            f"{run['layers']} layers" + (", int4 head" if run["quantize_lm_head"] else ""),
            f"{run['source_bytes'] / 1e9:.2f} GB",
            f"{run['largest_layer']['bytes'] / 1e9:.2f} GB",
            f"{run['peak_bytes'] / 1e9:.2f} GB",
            f"{run['peak_in_largest_layers']:.2f}",
            f"{run['seconds']:.0f} s",
        ]
        for run in result["runs"]
    ]
    baseline = f"{result['baseline_peak_bytes'] / 1e9:.2f} GB"
    start = f"{baseline} of the peak are Python and torch; the multiple counts the rest."
    return f"{table(header, rows)}\n\n{start} {source(result)}"


if __name__ == "__main__":
    typer.run(main)
