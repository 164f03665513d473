"""The plots of README and docs, `docs/NAME.svg`. Each carries a hash of the results that it was made from."""

import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import figures

FOLDER = Path(__file__).parents[1] / "docs"

# By name: the results that a plot shows, and what draws them on axes.
PLOTS: dict[str, tuple[str, Callable[[Any, dict[str, Any]], None]]] = {}


def plot(
    results: str,
) -> Callable[[Callable[[Any, dict[str, Any]], None]], Callable[[Any, dict[str, Any]], None]]:
    """Make a function that draws results on axes the source of the plot of the function's name."""

    def register(function: Callable[[Any, dict[str, Any]], None]) -> Callable[[Any, dict[str, Any]], None]:
        PLOTS[function.__name__] = (results, function)
        return function

    return register


def _hash(name: str) -> str:
    figures.read_results(PLOTS[name][0])
    return hashlib.sha256((figures.RESULTS / f"{PLOTS[name][0]}.json").read_bytes()).hexdigest()


def is_current(name: str) -> bool:
    """Whether a plot was made from the results as they are."""
    file = FOLDER / f"{name}.svg"
    return file.is_file() and _hash(name) in file.read_text("utf-8")


def write_plot(name: str) -> None:
    """Draw a plot."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    results, draw = PLOTS[name]
    matplotlib.rcParams["svg.hashsalt"] = name
    figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
    draw(axes, figures.read_results(results))
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(FOLDER / f"{name}.svg", metadata={"Date": None, "Description": _hash(name)})
    plt.close(figure)


@plot("hadamard")
def hadamard(axes: Any, result: dict[str, Any]) -> None:
    """The speed of the Hadamard transform of 2^25 bf16 elements by size, of that of a copy."""
    shares = {
        row["n"]: row["us"]["copy"] / row["us"]["ours"]
        for row in result["rows"]
        if row["dtype"] == "bf16" and round(math.log2(row["elements"])) == 25
    }
    sizes = sorted(shares)
    colors = ["C3" if n & (n - 1) == 0 else "C1" for n in sizes]
    axes.bar(range(len(sizes)), [shares[n] for n in sizes], color=colors)
    axes.axhline(1, color="0.6", linewidth=1)
    axes.set_xticks(range(len(sizes)), [str(n) for n in sizes], fontsize=8, rotation=45)
    axes.set_xlabel("n (red: powers of two)")
    axes.set_ylabel("speed of a copy of the same tensors")


@plot("w4a16")
def w4a16(axes: Any, result: dict[str, Any]) -> None:
    """The share of the memory floor at few tokens, ours and every peer's, over the matrices."""
    tokens = (1, 16)
    shapes = list(dict.fromkeys((row["n"], row["k"]) for row in result["rows"]))
    cells = {(row["n"], row["k"], row["m"]): row for row in result["rows"]}
    kernels = {
        "ours_fp16": ("hf_hadacore", "C3"),
        "humming_fp16": ("Humming", "C0"),
        "tinygemm_bf16": ("tinygemm", "C2"),
        "cublas_bf16": ("cuBLAS, bf16 weights", "0.6"),
    }
    width = 0.8 / (len(kernels) * len(tokens))
    for i, (kernel, (label, color)) in enumerate(kernels.items()):
        for j, m in enumerate(tokens):
            shares = [
                cells[n, k, m]["floor_us"] / cells[n, k, m]["us"].get(kernel, float("inf")) for n, k in shapes
            ]
            places = [x + (i * len(tokens) + j) * width for x in range(len(shapes))]
            axes.bar(
                places, shares, width, color=color, alpha=1 if j == 0 else 0.5, label=f"{label}, M = {m}"
            )
    axes.set_xticks([x + 0.4 for x in range(len(shapes))], [f"{n}\nx{k}" for n, k in shapes], fontsize=8)
    axes.set_ylabel("share of the time that a copy\nof as many bytes takes")
    axes.legend(fontsize=7, ncols=2, frameon=False)


@plot("attention")
def attention(axes: Any, result: dict[str, Any]) -> None:
    """TFLOP/s of prefill with heads of 128, ours and the peers'; hatched: without quantizing."""
    rows = [row for row in result["prefill"] if row["d"] == 128]
    kernels = {
        "sdpa cudnn": ("SDPA, cuDNN, bf16", "0.6", False),
        "fa3 bf16": ("FlashAttention-3, bf16", "C0", False),
        "fp8 all": ("hf_hadacore, fp8", "C3", False),
        "int8-fp8 all": ("hf_hadacore, int8-fp8", "C1", False),
        "fa3 fp8 kernel": ("FlashAttention-3, fp8, without quantizing", "C0", True),
        "fp8 kernel": ("hf_hadacore, fp8, without quantizing", "C3", True),
        "int8-fp8 kernel": ("hf_hadacore, int8-fp8, without quantizing", "C1", True),
    }
    width = 0.85 / len(kernels)
    for i, (kernel, (label, color, is_alone)) in enumerate(kernels.items()):
        axes.bar(
            [x + width * (i - len(kernels) / 2 + 0.5) for x in range(len(rows))],
            [row["tflops"].get(kernel, 0) for row in rows],
            width,
            label=label,
            color="white" if is_alone else color,
            edgecolor=color,
            linewidth=1,
            hatch="////" if is_alone else None,
        )
    axes.set_xticks(
        range(len(rows)),
        [f"{'causal' if row['causal'] else 'full'}, {row['tokens']}" for row in rows],
        fontsize=8,
    )
    axes.set_ylabel("TFLOP/s, heads of 128")
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1))


@plot("tp")
def tensor_parallel(axes: Any, result: dict[str, Any]) -> None:
    """The speed-up of TP-aware MLPs over the naive way in CUDA graphs; the model of more ranks is hollow."""
    mlps = {"llama-70b": "C3", "granite-20b": "C0"}
    tokens = {1: "o", 16: "s"}
    measured = {(row["mlp"], row["m"], row["tp"]): row for row in result["mlps"] if row["tp"] > 1}
    modelled = {(row["mlp"], row["m"], row["tp"]): row["speedup"] for row in result["model"]["rows"]}
    ranks = sorted({tp for *_, tp in modelled})
    for mlp, color in mlps.items():
        for m, marker in tokens.items():
            for variant, label, line in (("aware", "NCCL", ":"), ("one-shot", "one-shot", "-")):
                points = [
                    (
                        tp,
                        measured[mlp, m, tp]["naive"]["graph_us"] / measured[mlp, m, tp][variant]["graph_us"],
                    )
                    for tp in ranks
                    if (mlp, m, tp) in measured
                ]
                name = f"{mlp}, {m} token{'s' * (m > 1)}, {label} all-reduce"
                axes.plot(*zip(*points, strict=True), line, marker=marker, color=color, label=name)
            beyond = [(tp, modelled[mlp, m, tp]) for tp in ranks if (mlp, m, tp) not in measured]
            axes.plot(*zip(*beyond, strict=True), marker, color=color, fillstyle="none")
    for mlp, ratio in result["paper_up_to"].items():
        axes.axhline(ratio, color=mlps[mlp], linewidth=0.8, linestyle="--")
        side = "bottom" if ratio == max(result["paper_up_to"].values()) else "top"
        label = f"the paper, {mlp}: up to {ratio}x"
        axes.annotate(label, (ranks[-1], ratio), ha="right", va=side, fontsize=7)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ranks, [str(n) for n in ranks])
    axes.set_xlabel("GPUs (hollow: a model with NCCL's all-reduce, not a measurement)")
    axes.set_ylabel("speed-up over the naive way")
    axes.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
