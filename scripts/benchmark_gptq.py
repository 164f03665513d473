"""Time and peak memory of GPTQ on a checkpoint with the layers of an 8B model.

    python scripts/benchmark_gptq.py --json scripts/results/gptq.json

A random bf16 checkpoint with the dimensions of Llama-3-8B and a few decoder layers is written and quantized
by `quantize_checkpoint`, with random tokens. The time of a model of 32 layers is scaled from the mean of the
layers measured but for the first, which warms up; all else counts as measured. What the time goes to is
measured in a second run, where the parts of the work wait for the device before and after.
"""

import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from benchmark_offline_memory import VOCABULARY, make_checkpoint, peak_memory
from gpu_report import about_this_run, write_report

from hf_hadacore import HadaCoreConfig
from hf_hadacore.offline import layer_solver
from hf_hadacore.offline.calibrated import CalibratedSource
from hf_hadacore.offline.checkpoint import quantize_checkpoint
from hf_hadacore.offline.decoder import Activations
from hf_hadacore.offline.shard_writer import ShardWriter
from hf_hadacore.solvers import coordinate_descent, gptq

LAYERS_OF_8B = 32
# Parts of the work on one layer. GPTQ itself is called by solve_weight, which does little else. What follows
# a colon is a part of what precedes it; the rest of GPTQ are products of matrices.
PARTS: dict[str, tuple[Any, str]] = {
    "read the layer": (CalibratedSource, "_load_layer"),
    "forward passes and Hessians": (Activations, "run"),
    "next hidden states": (Activations, "advance"),
    "GPTQ": (layer_solver, "solve_weight"),
    "GPTQ: factorization": (gptq, "factorize"),
    "GPTQ: scales": (gptq, "fit_groups"),
    "GPTQ: columns": (gptq, "round_columns"),
    "GPTQ: coordinate descent": (gptq, "descend"),
    "GPTQ: coordinate descent: columns": (coordinate_descent, "descend_columns"),
    "GPTQ: output error": (gptq, "output_error"),
    "errors for the report": (layer_solver, "record_weight"),
    "write": (ShardWriter, "write"),
}


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


@contextmanager
def timed(owner: Any, name: str, seconds: list[float], device: str) -> Iterator[None]:
    """Note how long every call of a function takes, the device's work included."""
    function: Callable[..., Any] = getattr(owner, name)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        synchronize(device)
        start = time.perf_counter()
        result = function(*args, **kwargs)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
        return result

    setattr(owner, name, wrapper)
    try:
        yield
    finally:
        setattr(owner, name, function)


def run(src: Path, config: HadaCoreConfig, tokens: torch.Tensor, device: str, parts: Any) -> dict[str, Any]:
    """Quantize once.

    Args:
        src: the checkpoint.
        config: the options.
        tokens: of calibration.
        device: "cpu" or "cuda".
        parts: functions to time besides the units, as in `PARTS`.
    """
    units: list[float] = []
    part_seconds: dict[str, list[float]] = {name: [] for name in parts}
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory(dir=src.parent) as folder, ExitStack() as stack:
        stack.enter_context(timed(CalibratedSource, "realise", units, device))
        for name, (owner, function) in parts.items():
            stack.enter_context(timed(owner, function, part_seconds[name], device))
        start = time.perf_counter()
        report = quantize_checkpoint(
            src, Path(folder) / "dst", config, calibration=tokens, device=device, progress=False
        )
        total = time.perf_counter() - start
    layers = len({record["name"].split(".")[2] for record in report["layers"]})
    return {
        "total_s": round(total, 2),
        "layers_s": [round(seconds, 3) for seconds in units[-layers:]],
        "parts_s_per_layer": {
            name: round(sum(seconds) / layers, 3) for name, seconds in part_seconds.items()
        },
        "device_peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2) if device == "cuda" else None,
        "host_peak_gb": round(peak_memory() / 1e9, 2),
        "output_error": round(
            sum(record["output_error"] for record in report["layers"]) / len(report["layers"]), 6
        ),
    }


def main(
    layers: Annotated[int, typer.Option(min=2, help="Decoder layers of the checkpoint.")] = 4,
    samples: int = 128,
    sequence_length: int = 2048,
    group_size: int = 128,
    act_order: Annotated[list[str] | None, typer.Option(help="none, static or permuted; repeatable.")] = None,
    device: str = "cuda",
    scratch: Annotated[Path | None, typer.Option(help="Where the checkpoint is made and removed.")] = None,
    json: Annotated[Path | None, typer.Option(help="JSON to write.")] = None,
) -> None:
    """Measure, print a table, and write the result."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCABULARY, (samples, sequence_length), generator=generator)
    runs = []
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        src = Path(folder) / "src"
        make_checkpoint(src, layers, device)
        orders: list[str | bool] = [False if name == "none" else name for name in act_order or ("static",)]
        for order, parts in itertools.product(orders, ({}, PARTS)):
            config = HadaCoreConfig(method="gptq", act_order=order, group_size=group_size)
            measured = run(src, config, tokens, device, parts)
            per_layer = sum(measured["layers_s"][1:]) / (layers - 1)
            outside = measured["total_s"] - sum(measured["layers_s"])
            measured["model_of_32_layers_s"] = round(outside + LAYERS_OF_8B * per_layer, 1)
            runs.append({"act_order": order, "with_parts": bool(parts), **measured})
    options = f"--layers {layers} --samples {samples} --sequence-length {sequence_length}"
    result = {
        **about_this_run(f"python scripts/benchmark_gptq.py {options}", "transformers"),
        "shapes": f"Llama-3-8B in bf16, random weights and tokens, {layers} of {LAYERS_OF_8B} decoder layers",
        "scaled": "model_of_32_layers_s: outside of layers as measured + 32 x the mean layer but the first",
        "samples": samples,
        "sequence_length": sequence_length,
        "group_size": group_size,
        "runs": runs,
    }
    write_report(result, json)
    for measured in runs:
        if measured["with_parts"]:
            parts = ", ".join(f"{name} {s:.2f}" for name, s in measured["parts_s_per_layer"].items())
            typer.echo(f"  per layer, s: {parts}")
        else:
            typer.echo(
                f"act_order={measured['act_order']}: layers {measured['layers_s']} s, 32 layers scaled: "
                f"{measured['model_of_32_layers_s']} s; peak {measured['device_peak_gb']} GB on the device, "
                f"{measured['host_peak_gb']} GB on the host; output error {measured['output_error']}"
            )


if __name__ == "__main__":
    typer.run(main)
