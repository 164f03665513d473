"""The real models, quantized and not, with and without 8-bit attention: quality and speed.

    python scripts/evaluate_models.py --data DATA --out evaluations --jobs 3

DATA holds wikipedia_eval.txt, wikipedia_calibration.txt and the questions. Each model is compared with itself
in bf16: in int4 as `HadaCoreConfig()` makes it on the fly (offline, to the same integers), with GPTQ, and
each of those three with 8-bit attention of both kinds. Every evaluation is written as soon as it is complete,
to OUT/CHECKPOINT/evaluation*.json beside the checkpoint's quantization report, and one that is there is not
made again. The models are dequantized GGUF files: what is measured is a second quantization.

With `--jobs` models are quantized and evaluated side by side, but timed one after the other, with nothing
else at work. Two runs of the script at a time disturb each other's speeds.

    python scripts/evaluate_models.py --data DATA --out OUT --samples 4 --sequence-length 64 \\
        --device cpu --speed-only scripts/results/speed_cpu.json

times another device and evaluates nothing; how fast a checkpoint runs does not depend on its calibration.
"""

import json
import multiprocessing
import re
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from gpu_report import about_this_run, write_report
from real_models import MODELS, export_checkpoint

from hf_hadacore import HadaCoreConfig
from hf_hadacore.evaluation.evaluate import Loaded, Protocol, evaluate_models, timed
from hf_hadacore.evaluation.report import device_name, speed_entry
from hf_hadacore.evaluation.speed import Speed
from hf_hadacore.offline.calibration import Calibration
from hf_hadacore.offline.checkpoint import quantize_checkpoint
from hf_hadacore.offline.staging import REPORT_NAME

TEXT, CALIBRATION = "wikipedia_eval.txt", "wikipedia_calibration.txt"
TASKS = ("goal_inference.jsonl", "social_iqa.jsonl", "subject_verb_agreement.jsonl")
CONTEXT = 1024
WINDOWS = {"cuda": 100, "cpu": 20}
# By what follows the model's name; None is the model itself.
RECIPES: dict[str, HadaCoreConfig | None] = {
    "": None,
    "-int4": HadaCoreConfig(),
    "-int4-gptq": HadaCoreConfig(method="gptq", group_size=64, act_order="static"),
}
ATTENTIONS = (None, "fp8", "int8-fp8")

# A device's name and what was timed there.
Timed = tuple[str, Speed]


class Variant(NamedTuple):
    """A checkpoint and the attention it is run with.

    Attributes:
        checkpoint: its name.
        attention: as in `HadaCoreConfig`.
    """

    checkpoint: str
    attention: str | None

    @property
    def file(self) -> str:
        """Where its evaluation lies, in the folder of all results."""
        suffix = f"-{self.attention}" if self.attention else ""
        return f"{self.checkpoint}/evaluation{suffix}.json"


class Options(NamedTuple):
    """What is measured, and where."""

    data: Path
    work: Path
    out: Path
    only: str
    device: str
    windows: int
    limit: int | None
    samples: int
    sequence_length: int
    speed: bool

    @property
    def command(self) -> str:
        """Without the folders of this machine, and without what has its default."""
        words = [self.command_of_speeds, f"--windows {self.windows}"]
        words += [f"--limit {self.limit}"] * (self.limit is not None)
        return " ".join(words)

    @property
    def command_of_speeds(self) -> str:
        """`command` without what is asked."""
        words = ["python scripts/evaluate_models.py --data DATA"]
        words += [f"--only '{self.only}'"] * bool(self.only)
        words += [f"--samples {self.samples}"] * (self.samples != Calibration.samples)
        words += [f"--sequence-length {self.sequence_length}"] * (
            self.sequence_length != Calibration.sequence_length
        )
        return " ".join(words)


def wanted(name: str, options: Options) -> list[Variant]:
    """What of a model is still to be evaluated."""
    variants = [
        Variant(name + suffix, attention)
        for suffix, config in RECIPES.items()
        for attention in ATTENTIONS
        # The model itself, as it is, is what all are compared with.
        if config is not None or attention is not None
    ]
    return [
        variant
        for variant in variants
        if re.search(options.only, variant.file) and not (options.out / variant.file).exists()
    ]


def make_checkpoints(name: str, variants: Sequence[Variant], options: Options) -> None:
    """Write the checkpoints of one model, unless they are there."""
    src = export_checkpoint(name, options.work / name)
    for suffix, config in RECIPES.items():
        if config is not None and any(variant.checkpoint == name + suffix for variant in variants):
            make_checkpoint(src, options.work / "evaluated" / (name + suffix), config, options)


def make_checkpoint(src: Path, dst: Path, config: HadaCoreConfig, options: Options) -> None:
    """Quantize as users do; a checkpoint that is there must be of the same recipe.

    Raises:
        SystemExit: it is not.
    """
    calibration = None
    if config.method == "gptq":
        calibration = Calibration(options.data / CALIBRATION, options.samples, options.sequence_length)
    report_file = dst / REPORT_NAME
    if not report_file.exists():
        quantize_checkpoint(src, dst, config, device=options.device, calibration=calibration)
    report = json.loads(report_file.read_text("utf-8"))
    used = report.get("calibration") or {}
    asked = (options.samples, options.sequence_length) if calibration else (None, None)
    found = (used.get("samples"), used.get("sequence_length"))
    recipe = HadaCoreConfig(**report["quantization_config"]).without_derived()
    if recipe.to_dict() != config.to_dict() or found != asked:
        raise SystemExit(f"{dst}: was made with another recipe; delete it")


def load(variant: Variant, name: str, options: Options) -> Loaded:
    folder = options.work / (name if variant.checkpoint == name else f"evaluated/{variant.checkpoint}")
    return Loaded.load(str(folder), device=options.device, dtype="bfloat16", attention=variant.attention)


def time_variants(name: str, variants: Sequence[Variant], options: Options) -> dict[Variant, Timed]:
    """The speed of a model as it is, and of its variants."""
    return {variant: timed(load(variant, name, options)) for variant in (Variant(name, None), *variants)}


def describe_speeds(speeds: Mapping[str, Mapping[Variant, Timed]], options: Options) -> dict[str, Any]:
    """A report of speeds alone, by evaluations' files."""
    command = f"{options.command_of_speeds} --out OUT --device {options.device} --speed-only JSON"
    report = about_this_run(command, "transformers")
    entries = {
        variant.file: speed_entry(of_model[variant], of_model[Variant(name, None)])
        for name, of_model in speeds.items()
        for variant in of_model
        if variant != Variant(name, None)
    }
    return {**report, "device": device_name(torch.device(options.device)), "speeds": entries}


def evaluate(
    name: str, variants: Sequence[Variant], speeds: Mapping[Variant, Timed], options: Options
) -> None:
    """Write the evaluations of a model, each when it is complete."""
    protocol = Protocol.read(
        text=str(options.data / TEXT),
        context=CONTEXT,
        windows=options.windows,
        tasks=[str(options.data / task) for task in TASKS],
        limit=options.limit,
    )
    original = Variant(name, None)
    loaded = [load(variant, name, options) for variant in variants]
    reports = evaluate_models(loaded, load(original, name, options), protocol)
    for variant, report in zip(variants, reports, strict=True):
        if options.speed:
            report["speed"] = speed_entry(speeds[variant], speeds[original])
        file = options.out / variant.file
        file.parent.mkdir(parents=True, exist_ok=True)
        made_by = options.work / "evaluated" / variant.checkpoint / REPORT_NAME
        if made_by.exists():
            shutil.copyfile(made_by, file.parent / REPORT_NAME)
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps({"command": options.command, **report}, indent=1) + "\n", "utf-8")
        partial.rename(file)
        print(f"{variant.file}: {summary(report)}", flush=True)


def summary(report: Mapping[str, Any]) -> str:
    """A report on a line."""
    text = report["perplexity"]
    parts = [f"perplexity {text['value']:.3f} ({text['over_baseline']['value']:+.4f} nats)"]
    parts += [f"{name} {task['metrics']['acc']['value']:.3f}" for name, task in report["tasks"].items()]
    if speed := report.get("speed"):
        parts.append(f"{speed['model']['batches'][0]['tokens_per_second']} tok/s")
    return ", ".join(parts)


def main(
    data: Annotated[Path, typer.Option(help="Folder of the text files and questions.")],
    out: Annotated[Path, typer.Option(help="Where the evaluations go.")],
    model: Annotated[list[str] | None, typer.Option(help=f"Of {list(MODELS)}; repeatable.")] = None,
    only: Annotated[
        str, typer.Option(metavar="REGEX", help="Evaluations to make, by their files; default: all.")
    ] = "",
    work: Annotated[Path, typer.Option(help="Where checkpoints are, or are made.")] = Path("demo_output"),
    device: Annotated[str | None, typer.Option(help="Default: the GPU if there is one.")] = None,
    windows: Annotated[
        int | None, typer.Option(help=f"Windows of {CONTEXT} tokens; default: 100 on a GPU, else 20.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Questions of each task; default: all.")] = None,
    samples: Annotated[int, typer.Option(help="Calibration samples.")] = Calibration.samples,
    sequence_length: Annotated[
        int, typer.Option(help="Tokens of a calibration sample.")
    ] = Calibration.sequence_length,
    speed: Annotated[bool, typer.Option(help="Time them, too.")] = True,
    speed_only: Annotated[
        Path | None, typer.Option(metavar="JSON", help="Where to write speeds; nothing is evaluated.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Models side by side, each in a process.")] = 1,
) -> None:
    """Evaluate the real models."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    windows = windows or WINDOWS[torch.device(device).type]
    options = Options(data, work, out, only, device, windows, limit, samples, sequence_length, speed)
    missing = {name: variants for name in model or list(MODELS) if (variants := wanted(name, options))}
    speeds: dict[str, dict[Variant, Timed]] = {name: {} for name in missing}
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        for made in [pool.submit(make_checkpoints, *item, options) for item in missing.items()]:
            made.result()
        if speed:
            for name, variants in missing.items():
                speeds[name] = pool.submit(time_variants, name, variants, options).result()
            print("all are timed: other work disturbs no more", flush=True)
        if speed_only is not None:
            write_report(describe_speeds(speeds, options), speed_only)
            return
        evaluations = [
            pool.submit(evaluate, name, variants, speeds[name], options) for name, variants in missing.items()
        ]
        for evaluation in evaluations:
            evaluation.result()


if __name__ == "__main__":
    typer.run(main)
