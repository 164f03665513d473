"""How fast int4 models decode on one GPU and on several: the speed part of `check_multi_gpu.py`."""

import gc
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from benchmark_generate import captured_graph, fill_randomly, meta_model, rewind
from benchmark_generate import measure as measure_generate
from multi_gpu_models import ATTENTION, load
from rank_processes import run_ranks
from transformers import LlamaConfig

from hf_hadacore import HadaCoreConfig
from hf_hadacore.decoding.generation import enable_cuda_graphs
from hf_hadacore.offline.shard_writer import plan_shards
from hf_hadacore.parallel.one_shot import use_one_shot_all_reduce
from hf_hadacore.quantizer import HadaCoreHfQuantizer

# How the names of their kernels begin.
COLLECTIVES = ("nccl", "one_shot")


def write_hollow_checkpoint(folder: Path, config: LlamaConfig) -> int:
    """An int4 checkpoint of zeros, whose files are holes.

    Returns:
        Its size in bytes, as files say it.
    """
    quantization = HadaCoreConfig()
    model = meta_model(config, HadaCoreHfQuantizer(quantization, pre_quantized=True))
    plan = plan_shards(model.state_dict(), max_shard_size="4GB", total_parameters=0)
    for file, header in plan.headers.items():
        with open(folder / file, "wb") as stream:
            stream.write(header)
            stream.truncate(plan.sizes[file])
    if plan.shard_index is not None:
        (folder / "model.safetensors.index.json").write_text(plan.index_text())
    model.config.architectures = [type(model).__name__]
    model.config.dtype = torch.bfloat16
    model.config.quantization_config = quantization
    model.config.save_pretrained(folder)
    return plan.total_bytes


def measure_auto(folder: Path, batches: list[int], new_tokens: int) -> dict[str, Any]:
    """Times of `generate` of a model whose layers device_map="auto" has put on all GPUs.

    Its steps take tens of times as long as a graph's, and a quarter as many say as much.
    """
    transformers.logging.disable_progress_bar()
    model = load(folder, "bf16", "auto")
    with torch.no_grad():
        fill_randomly(model)
    results: dict[str, Any] = {"memory_gib": most_memory_gib()}
    for attention, implementation in ATTENTION.items():
        model.set_attn_implementation(implementation)
        for batch in batches:
            row = measure_generate(model, batch, max(2, new_tokens // 4), graphs=False, profile=False)
            row["peak_memory_gib"] = most_memory_gib(peak=True)
            results[f"{attention} batch {batch}"] = row
            print(f"auto {attention} batch {batch}: {row}", flush=True)
    return results


def most_memory_gib(peak: bool = False) -> float:
    """Of the GPU that holds the most for this process."""
    read = torch.cuda.max_memory_allocated if peak else torch.cuda.memory_allocated
    return round(max(map(read, range(torch.cuda.device_count()))) / 2**30, 2)


def measure_speed(folder: Path, batches: list[int], new_tokens: int, with_one_shot: bool) -> dict[str, Any]:
    """Times of `generate` on the ranks of this process group, by attention and batch."""
    transformers.logging.disable_progress_bar()
    ranks = dist.get_world_size()
    model = load(folder, "bf16", "ranks" if ranks > 1 else "one")
    with torch.no_grad():
        fill_randomly(model)
    results: dict[str, Any] = {"memory_gib": most_memory_gib()}
    for reduce in ("", "one-shot ") if with_one_shot and ranks > 1 else ("",):
        if reduce and not use_one_shot_all_reduce(model):
            break
        for attention, implementation in ATTENTION.items():
            model.set_attn_implementation(implementation)
            enable_cuda_graphs(model)
            gc.collect()
            for batch in batches:
                row: dict[str, Any] = measure_generate(model, batch, new_tokens, graphs=True, profile=False)
                row["collectives_share"] = round(collectives_share(model), 4)
                case = f"{reduce}{attention} batch {batch}"
                results[case] = row
                if dist.get_rank() == 0:
                    print(f"tp {ranks} {case}: {row}", flush=True)
    return results


def collectives_share(model: Any) -> float:
    """Of the time of the kernels of one replayed step."""
    graph = captured_graph(model)
    rewind(model, 1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        graph._replay()
        torch.cuda.synchronize()
    spent = {
        event.key: event.self_device_time_total
        for event in profiler.key_averages()
        if event.device_type == torch.autograd.DeviceType.CUDA
    }
    return sum(time for key, time in spent.items() if key.startswith(COLLECTIVES)) / sum(spent.values())


def check_speed(
    config: LlamaConfig, counts: list[int], sizes: list[int], new_tokens: int, with_one_shot: bool, auto: bool
) -> Iterator[dict[str, Any]]:
    """What is known of the speed after each place, beside the first; a run that is stopped keeps it."""
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        total = write_hollow_checkpoint(folder, config)
        places: dict[str, tuple[Any, ...]] = {
            f"tp {ranks}": (measure_speed, ranks, folder, sizes, new_tokens, with_one_shot)
            for ranks in counts
        }
        if auto:
            places["auto"] = (measure_auto, 1, folder, sizes, new_tokens)
        for place, job in places.items():
            results[place] = run_ranks(*job)
            yield {"checkpoint_bytes": total, "results": with_speedups(results)}


def with_speedups(results: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """How much faster each place is than the first, written into its rows."""
    first, base = next(iter(results.items()))
    for result in results.values():
        for case, row in result.items():
            if isinstance(row, dict):
                ratio = row["tokens_per_second"] / base[case.removeprefix("one-shot ")]["tokens_per_second"]
                row[f"speedup_over_{first.replace(' ', '_')}"] = round(ratio, 3)
    return results


def print_speed(results: dict[str, dict[str, Any]]) -> None:
    for ranks, result in results.items():
        print(f"{ranks}: {result['memory_gib']} GiB per GPU")
        for case, row in result.items():
            if isinstance(row, dict):
                shown = ("tokens_per_second", "replay_ms", "collectives_share", "time_to_first_token_ms")
                speedup = next(value for key, value in row.items() if key.startswith("speedup"))
                print(f"  {case}: {speedup:.2f}x", {key: row[key] for key in shown if key in row})
