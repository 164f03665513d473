"""Peak memory of offline quantization on a checkpoint with the layers of an 8B model.

    python scripts/benchmark_offline_memory.py --layers 2 --layers 4

A random bf16 checkpoint with the dimensions of Llama-3-8B and the given number of decoder layers is written
shard by shard and quantized by `quantize_checkpoint` in a process of its own. Its peak resident memory, less
that of a process that only imports the package, has to stay below four times the largest layer (a decoder
layer, the embedding or the head, whichever is larger) plus one output shard. The number of layers must not
matter, which is why several are measured.
"""

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import save_file

from hf_hadacore import HadaCoreConfig, __version__
from hf_hadacore.integrity import INDEX_NAME, checkpoint_files, verify_files
from hf_hadacore.offline.checkpoint import quantize_checkpoint

RESULT = Path(__file__).parent / "results" / "offline_memory.json"
FACTOR = 4
MAX_SHARD_SIZE = 5_000_000_000

HIDDEN, INTERMEDIATE, VOCABULARY = 4096, 14336, 128256
HEADS, KEY_VALUE_HEADS = 32, 8
KEY_VALUE = HIDDEN // HEADS * KEY_VALUE_HEADS
LAYER_SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KEY_VALUE, HIDDEN),
    "self_attn.v_proj": (KEY_VALUE, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
    "input_layernorm": (HIDDEN,),
    "post_attention_layernorm": (HIDDEN,),
}
OUTER_SHAPES = {
    "model.embed_tokens": (VOCABULARY, HIDDEN),
    "model.norm": (HIDDEN,),
    "lm_head": (VOCABULARY, HIDDEN),
}


def make_checkpoint(folder: Path, layers: int, device: str = "cpu") -> None:
    """Write a random Llama checkpoint, one file per layer, holding one layer at a time.

    Args:
        folder: to be made.
        layers: decoder layers.
        device: where the numbers are drawn.
    """
    folder.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_VALUE_HEADS,
        "num_hidden_layers": layers,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    files = [{name: shape} for name, shape in OUTER_SHAPES.items()]
    for layer in range(layers):
        files.append({f"model.layers.{layer}.{name}": shape for name, shape in LAYER_SHAPES.items()})
    weight_map = {}
    generator = torch.Generator(device).manual_seed(0)
    for number, shapes in enumerate(files, 1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        tensors = {
            f"{name}.weight": torch.empty(shape, dtype=torch.bfloat16, device=device)
            .normal_(0, 0.02, generator=generator)
            .cpu()
            for name, shape in shapes.items()
        }
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def largest_layer(folder: Path) -> dict[str, Any]:
    """The decoder layer or outer module with most bytes."""
    sizes: dict[str, int] = {}
    for name, info in verify_files(checkpoint_files(folder)).items():
        parts = name.split(".")
        layer = ".".join(parts[:3]) if parts[1] == "layers" else name
        sizes[layer] = sizes.get(layer, 0) + info.nbytes
    name = max(sizes, key=lambda layer: sizes[layer])
    return {"name": name, "bytes": sizes[name], "decoder_layer_bytes": sizes["model.layers.0"]}


def peak_memory() -> int:
    """High-water mark of this process's resident memory, in bytes.

    Not `ru_maxrss`: that one survives exec and would count the parent's memory.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("the kernel does not report VmHWM")


def in_own_process(*arguments: object) -> dict[str, Any]:
    """Run this file's `worker` in a process of its own; returns what it measured."""
    command = [sys.executable, __file__, "worker", *map(str, arguments)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


def measure(folder: Path, layers: int, quantize_lm_head: bool, baseline: int) -> dict[str, Any]:
    """Make, quantize and measure one checkpoint."""
    src, dst = folder / "src", folder / "dst"
    make_checkpoint(src, layers)
    largest = largest_layer(src)
    measured = in_own_process(src, dst, *(["--quantize-lm-head"] if quantize_lm_head else []))
    shards = [file.stat().st_size for file in checkpoint_files(dst)]
    net = measured["peak_bytes"] - baseline
    limit = FACTOR * largest["bytes"] + max(shards)
    return {
        "layers": layers,
        "quantize_lm_head": quantize_lm_head,
        "source_bytes": sum(file.stat().st_size for file in checkpoint_files(src)),
        "quantized_bytes": sum(shards),
        "largest_layer": largest,
        "largest_shard_bytes": max(shards),
        "peak_bytes": measured["peak_bytes"],
        "peak_less_baseline_bytes": net,
        "peak_in_largest_layers": round(net / largest["bytes"], 3),
        "limit_bytes": limit,
        "within_limit": net < limit,
        "seconds": round(measured["seconds"], 1),
    }


app = typer.Typer(add_completion=False)


@app.callback(invoke_without_command=True)
def benchmark(
    context: typer.Context,
    layers: Annotated[list[int] | None, typer.Option(help="Decoder layers; repeatable.")] = None,
    scratch: Annotated[Path | None, typer.Option(help="Where the checkpoints are made and removed.")] = None,
    output: Annotated[Path, typer.Option(help="JSON to write.")] = RESULT,
) -> None:
    """Measure and write the result; exit code 1 if a run needs too much memory."""
    if context.invoked_subcommand is not None:
        return
    counts = layers or [2, 4]
    baseline = in_own_process()["peak_bytes"]
    runs = []
    # The head is the largest weight that can be quantized: once with it, too.
    for count, with_head in [*((count, False) for count in counts), (counts[0], True)]:
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            runs.append(measure(Path(folder), count, with_head, baseline))
        typer.echo(json.dumps(runs[-1], indent=2), err=True)
    options = [f"--layers {count}" for count in counts]
    result = {
        "command": " ".join(["python scripts/benchmark_offline_memory.py", *options]),
        "date": datetime.date.today().isoformat(),
        "device": f"cpu, {platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "versions": {
            "hf_hadacore": __version__,
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("torch", "transformers", "safetensors")},
        },
        "shapes": "Llama-3-8B in bf16, random weights",
        "max_shard_size": MAX_SHARD_SIZE,
        "baseline_peak_bytes": baseline,
        "baseline": "a process that imports hf_hadacore.offline.checkpoint and does nothing",
        "limit": f"{FACTOR} x largest layer + largest output shard",
        "runs": runs,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=2) + "\n")
    if not all(run["within_limit"] for run in runs):
        raise typer.Exit(1)


@app.command(hidden=True)
def worker(
    src: Annotated[Path | None, typer.Argument()] = None,
    dst: Annotated[Path | None, typer.Argument()] = None,
    quantize_lm_head: Annotated[bool, typer.Option("--quantize-lm-head")] = False,
) -> None:
    """Quantize (or, without arguments, do nothing) and print the peak memory of this process."""
    start = time.perf_counter()
    if src is not None and dst is not None:
        config = HadaCoreConfig(quantize_lm_head=quantize_lm_head)
        quantize_checkpoint(src, dst, config, max_shard_size=MAX_SHARD_SIZE, progress=False)
    typer.echo(json.dumps({"peak_bytes": peak_memory(), "seconds": time.perf_counter() - start}))


if __name__ == "__main__":
    app()
