"""Int4 models on several GPUs: the same logits as on one, and how fast they decode.

    python scripts/check_multi_gpu.py --part logits --json scripts/results/multi_gpu_logits.json
    python scripts/check_multi_gpu.py --part speed --shape llama-70b --json scripts/results/multi_gpu_70b.json
    python scripts/check_multi_gpu.py --part speed --shape llama-8b --json scripts/results/multi_gpu_8b.json

logits: a model of a few layers, random, saved in bf16 and in int4, is loaded on one GPU, by tensor
parallelism on all of them, and by device_map="auto". The distance of int4's tensor-parallel logits from those
of one GPU must be that of bf16's own, and tokens whose margin is above bf16's largest difference the same.

speed: an int4 checkpoint whose files are holes, which read as zeros and take no room, is loaded by
`from_pretrained` on one GPU and by tensor parallelism, filled with random weights where it lies, and timed in
`generate` with CUDA graphs, with bf16 attention and with 8-bit attention. The share that collectives take of
a step is read from a profile of one replay; waiting for the other ranks is part of it. With --one-shot ranks
are timed again with `hf_hadacore.parallel.one_shot`, which is then what the logits are made with, too. With
--auto one process with all GPUs, as device_map="auto" makes it, is timed behind them: its layers follow each
other from GPU to GPU, which no single CUDA graph captures.

Without a GPU the logits of a tiny model are checked with gloo.
"""

import gc
import itertools
import tempfile
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import transformers
import typer
from benchmark_generate import captured_graph, fill_randomly, llama_8b, meta_model, rewind
from benchmark_generate import measure as measure_generate
from gpu_report import JsonFile, about_this_run, write_report
from rank_processes import run_ranks
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig
from transformers.distributed import DistributedConfig

from hf_hadacore import HadaCoreCache, HadaCoreConfig
from hf_hadacore.decoding.generation import enable_cuda_graphs
from hf_hadacore.offline.shard_writer import plan_shards
from hf_hadacore.parallel.one_shot import use_one_shot_all_reduce
from hf_hadacore.quantizer import HadaCoreHfQuantizer

ATTENTION = {"bf16": "sdpa", "8-bit": "hadacore-int8-fp8"}
FORMS = ("bf16", "int4")
# How the names of their kernels begin.
COLLECTIVES = ("nccl", "one_shot")
# Tokens that are read in one pass, and one by one behind them.
PROMPT, STEPS = 96, 16
# Both distances are of random roundings; the chance that they differ by more is small.
MAX_RATIO = 1.25


class Part(StrEnum):
    LOGITS = "logits"
    SPEED = "speed"


def llama_70b(layers: int) -> LlamaConfig:
    return LlamaConfig(
        **llama_8b(layers).to_diff_dict()
        | {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64}
    )


def tiny(layers: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=256,
        intermediate_size=512,
        num_attention_heads=8,
        num_key_value_heads=4,
        num_hidden_layers=layers,
        vocab_size=512,
        tie_word_embeddings=False,
    )


SHAPES = {"llama-8b": llama_8b, "llama-70b": llama_70b, "tiny": tiny}
# With fewer, device_map="auto" puts an int4 model on one GPU.
LOGITS_LAYERS = 8
LAYERS = {"llama-8b": 32, "llama-70b": 80, "tiny": 2}


def device_name() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def load(folder: Path, attention: str, place: str) -> Any:
    """A model of a checkpoint.

    Args:
        folder: of the checkpoint.
        attention: one of `ATTENTION`.
        place: "one" device, "auto" over all, or "ranks" of this process group.
    """
    where: dict[str, Any] = {"device_map": {"": device_name()}}
    if place == "auto":
        where = {"device_map": "auto"}
    elif place == "ranks":
        where = {"distributed_config": DistributedConfig(tp_size=dist.get_world_size())}
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, attn_implementation=ATTENTION[attention], **where
    ).eval()


def forced(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """fp32 logits ``[B, PROMPT + STEPS, V]`` on the CPU: the prompt in one pass, then token by token."""
    is_8_bit = model.config._attn_implementation == ATTENTION["8-bit"]
    cache = HadaCoreCache(model.config) if is_8_bit else DynamicCache(config=model.config)
    pieces = [ids[:, :PROMPT], *ids[:, PROMPT:].split(1, dim=1)]
    with torch.no_grad():
        logits = [model(piece, past_key_values=cache).logits.float().cpu() for piece in pieces]
    return torch.cat(logits, 1)


def save_logits(root: Path, places: list[str], with_one_shot: bool = False) -> dict[str, list[str]]:
    """Load the checkpoints in some places and write their logits down.

    Args:
        root: holds the checkpoints; rank 0 writes there.
        places: see `load`.
        with_one_shot: whether ranks sum with `kernels.all_reduce`.

    Returns:
        The devices that the Parameters of each were on.
    """
    transformers.logging.disable_progress_bar()
    devices = {}
    for place in places:
        for form in FORMS:
            for attention in ATTENTION:
                model = load(root / form, attention, place)
                if with_one_shot:
                    use_one_shot_all_reduce(model)
                vocabulary = model.config.vocab_size
                ids = torch.randint(
                    vocabulary, (2, PROMPT + STEPS), generator=torch.Generator().manual_seed(1)
                )
                logits = forced(model, ids.to(model.device))
                devices[f"{form} {attention} {place}"] = sorted({str(p.device) for p in model.parameters()})
                if dist.get_rank() == 0:
                    save_file({"logits": logits.contiguous()}, logits_file(root, form, attention, place))
                del model
                gc.collect()
    return devices


def logits_file(root: Path, form: str, attention: str, place: str) -> Path:
    return root / f"{form}-{attention}-{place}.safetensors"


def save_and_run(root: Path, shape: str, layers: int) -> dict[str, list[str]]:
    """What one process does: make both checkpoints, and the logits of one device and of device_map="auto"."""
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    with torch.device(device_name()):
        model = AutoModelForCausalLM.from_config(SHAPES[shape](layers), dtype=torch.bfloat16)
    model.save_pretrained(root / "bf16")
    del model
    model = AutoModelForCausalLM.from_pretrained(
        root / "bf16", quantization_config=HadaCoreConfig(), device_map={"": device_name()}
    )
    model.save_pretrained(root / "int4")
    del model
    gc.collect()
    return save_logits(root, ["one", "auto"] if torch.cuda.device_count() > 1 else ["one"])


def compare(root: Path) -> list[dict[str, Any]]:
    """Rows of every form, attention and place but one device, whose logits the others are compared with.

    A token is clear if its margin over the second exceeds what dividing the bf16 model among ranks changes.
    """
    rows = []
    for attention in ATTENTION:
        margin_of_rounding = 0.0
        for place, form in itertools.product(("ranks", "auto"), FORMS):
            file = logits_file(root, form, attention, place)
            if not file.exists():
                continue
            got, one = (load_file(f)["logits"] for f in (file, logits_file(root, form, attention, "one")))
            largest = float((got - one).abs().max())
            if (place, form) == ("ranks", "bf16"):
                margin_of_rounding = largest
            top = one.topk(2).values
            is_clear = top[..., 0] - top[..., 1] > margin_of_rounding
            same = got.argmax(-1) == one.argmax(-1)
            rows.append(
                {
                    **{"form": form, "attention": attention, "place": place},
                    "relative_difference": float((got - one).norm() / one.norm()),
                    "largest_difference": largest,
                    "tokens": same.numel(),
                    "same_tokens": int(same.sum()),
                    "clear_tokens": int(is_clear.sum()),
                    "clear_tokens_that_differ": int((is_clear & ~same).sum()),
                }
            )
    return rows


def wrong_rows(rows: list[dict[str, Any]]) -> list[str]:
    """What does not hold of int4, beside bf16 divided among ranks with the same attention."""
    found = []
    bf16 = {row["attention"]: row for row in rows if (row["form"], row["place"]) == ("bf16", "ranks")}
    for row in rows:
        if row["form"] == "bf16":
            continue
        allowed = MAX_RATIO * bf16[row["attention"]]["relative_difference"]
        if not row["relative_difference"] <= allowed:
            found.append(
                f"{row['attention']} {row['place']}: {row['relative_difference']:.2e} > {allowed:.2e}"
            )
        if row["clear_tokens_that_differ"]:
            found.append(
                f"{row['attention']} {row['place']}: {row['clear_tokens_that_differ']} clear tokens differ"
            )
    return found


def check_logits(shape: str, layers: int, ranks: int, with_one_shot: bool) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        devices = run_ranks(save_and_run, 1, root, shape, layers)
        devices |= run_ranks(save_logits, ranks, root, ["ranks"], with_one_shot)
        rows = compare(root)
    return {"rows": rows, "devices": devices, "failed": wrong_rows(rows)}


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


def main(
    part: Annotated[list[Part] | None, typer.Option(help="What to do; default everything.")] = None,
    shape: Annotated[str | None, typer.Option(help=f"One of {', '.join(SHAPES)}.")] = None,
    layers: Annotated[
        int | None, typer.Option(help=f"Default {LOGITS_LAYERS} for logits, all for speed.")
    ] = None,
    tp: Annotated[
        str | None, typer.Option(help="Numbers of ranks for speed, or none (''); default 1 and all GPUs.")
    ] = None,
    batches: Annotated[str, typer.Option(help="Separated by commas.")] = "1,16",
    new_tokens: int = 64,
    one_shot: Annotated[bool, typer.Option(help="Try `hf_hadacore.parallel.one_shot`, too.")] = False,
    auto: Annotated[bool, typer.Option(help='Time device_map="auto" on all GPUs, too.')] = False,
    json_file: JsonFile = None,
) -> None:
    gpus = torch.cuda.device_count()
    shape = shape or ("llama-8b" if gpus else "tiny")
    parts = part or (list(Part) if gpus else [Part.LOGITS])
    ranks = gpus or 2
    tp = f"1,{ranks}" if tp is None else tp
    command = (
        f"python scripts/check_multi_gpu.py {' '.join(f'--part {name}' for name in parts)} --shape {shape}"
    )
    if layers is not None:
        command += f" --layers {layers}"
    if one_shot:
        command += " --one-shot"
    if auto:
        command += " --auto"
    if Part.SPEED in parts:
        command += f" --tp '{tp}' --batches {batches} --new-tokens {new_tokens}"
    report = {**about_this_run(command, "transformers"), "gpus": gpus, "shape": shape}
    if Part.LOGITS in parts:
        report["logits"] = check_logits(shape, layers or min(LOGITS_LAYERS, LAYERS[shape]), ranks, one_shot)
        write_report(report, json_file)
        for row in report["logits"]["rows"]:
            print(row)
    if Part.SPEED in parts:
        counts, sizes = ([int(word) for word in text.split(",") if word] for text in (tp, batches))
        config = SHAPES[shape](layers or LAYERS[shape])
        for report["speed"] in check_speed(config, counts, sizes, new_tokens, one_shot, auto):
            write_report(report, json_file)
        print_speed(report["speed"]["results"])
    failed = report.get("logits", {}).get("failed", [])
    print("\n".join(failed) or "all checks hold")
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    typer.run(main)
