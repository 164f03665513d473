"""Int4 models on several GPUs: the same logits as on one, and how fast they decode.

    python scripts/check_multi_gpu.py --part logits --json scripts/results/multi_gpu_logits.json
    python scripts/check_multi_gpu.py --part speed --shape llama-70b --json scripts/results/multi_gpu_70b.json
    python scripts/check_multi_gpu.py --part speed --shape llama-8b --json scripts/results/multi_gpu_8b.json

logits: a model of a few layers, random, saved in bf16 and in int4, is loaded on one GPU, by tensor
parallelism on all of them, and with its layers spread over them by a device_map ("auto" would leave so small
a model on one). The distance of int4's tensor-parallel logits from those of one GPU must be that of bf16's
own, and tokens whose margin is above bf16's largest difference the same.

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
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import transformers
import typer
from gpu_report import JsonFile, about_this_run, write_report
from multi_gpu_models import ATTENTION, LAYERS, SHAPES, device_name, load
from multi_gpu_speed import check_speed, print_speed
from rank_processes import run_ranks
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DynamicCache

from hf_hadacore import HadaCoreCache, HadaCoreConfig
from hf_hadacore.parallel.one_shot import use_one_shot_all_reduce

FORMS = ("bf16", "int4")
# Tokens that are read in one pass, and one by one behind them.
PROMPT, STEPS = 96, 16
# Both distances are of random roundings; the chance that they differ by more is small.
MAX_RATIO = 1.25
LOGITS_LAYERS = 8


class Part(StrEnum):
    LOGITS = "logits"
    SPEED = "speed"


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
    """What one process does: make both checkpoints, and the logits of one device and of layers on all."""
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
    return save_logits(root, ["one", "spread"] if torch.cuda.device_count() > 1 else ["one"])


def compare(root: Path) -> list[dict[str, Any]]:
    """Rows of every form, attention and place but one device, whose logits the others are compared with.

    A token is clear if its margin over the second exceeds what dividing the bf16 model among ranks changes.
    """
    rows = []
    for attention in ATTENTION:
        margin_of_rounding = 0.0
        for place, form in itertools.product(("ranks", "spread"), FORMS):
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
