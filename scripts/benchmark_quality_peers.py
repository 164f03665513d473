"""Other int4 quantizers beside ours on real models, with the same bits, groups and calibration tokens.

    python scripts/benchmark_quality_peers.py --data DATA --json scripts/results/quality_peers.json \
        --site gptqmodel=DIR --site auto-round=DIR --site llm-compressor=DIR

DATA and what is measured are those of `benchmark_quality.py`. A peer gets the very tokens that ours is
calibrated with, quantizes in a process of its own, and writes its own format; `import_checkpoint` takes its
integers, zeros and scales over bit for bit, so that all models are run by the same code. DIR is put before
the peer's path: the peers want versions of packages that contradict each other. A peer that fails leaves the
reason in its row.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import benchmark_quality
import torch
import transformers
import typer
from benchmark_quality import CALIBRATION, TEXT, WINDOWS, Options, describe, load
from gpu_report import about_this_run
from quality_peers import PEERS, Task
from quality_report import about_model, as_json, scores
from real_models import MODELS, export_checkpoint
from safetensors.torch import save_file
from transformers import PreTrainedModel

import hf_hadacore
from hf_hadacore import HadaCoreConfig
from hf_hadacore.evaluation.perplexity import compare, encode, paired_difference
from hf_hadacore.evaluation.report import device_name
from hf_hadacore.inspection import inspect_checkpoint
from hf_hadacore.interchange.importing import import_checkpoint
from hf_hadacore.offline.calibration import Calibration, calibration_tokens, load_tokenizer
from hf_hadacore.offline.checkpoint import quantize_checkpoint

OURS = "hf_hadacore"
OUR_METHODS = {"GPTQ, static act-order": "none", "GPTQ, static act-order, rotated": "r1r2"}  # by rotation
REFERENCE = next(iter(OUR_METHODS))


class Recipe(NamedTuple):
    """Who quantizes how.

    Attributes:
        quantizer: `OURS`, or a key of `PEERS`.
        method: one of `OUR_METHODS`, or of the peer's.
        group_size, symmetric: of the weights.
    """

    quantizer: str
    method: str
    group_size: int
    symmetric: bool

    @property
    def name(self) -> str:
        """For people."""
        form = "symmetric" if self.symmetric else "asymmetric"
        return f"{self.quantizer}: {self.method}, {form}, group {self.group_size}"

    @property
    def ours(self) -> "Recipe":
        """What it is compared with."""
        return self._replace(quantizer=OURS, method=REFERENCE)


def recipes_of(peers: list[str], group_sizes: list[int], symmetries: list[bool]) -> list[Recipe]:
    """Ours and the peers', those that are compared with each other side by side."""
    methods = [(OURS, method) for method in OUR_METHODS]
    methods += [(peer, method) for peer in peers for method in PEERS[peer].methods]
    return [
        Recipe(*who, group_size, symmetric)
        for group_size in group_sizes
        for symmetric in symmetries
        for who in methods
    ]


def quantize(
    recipe: Recipe, src: Path, dst: Path, options: Options, sites: dict[str, Path]
) -> dict[str, Any]:
    """Write the checkpoint of a recipe in the hadacore format.

    Returns:
        The quantizer's version and seconds.

    Raises:
        PeerError: the peer failed.
    """
    if recipe.quantizer != OURS:
        return quantize_with_peer(recipe, src, dst, options, sites)
    config = HadaCoreConfig(
        method="gptq", act_order="static", group_size=recipe.group_size, symmetric=recipe.symmetric
    )
    start = time.perf_counter()
    quantize_checkpoint(
        src,
        dst,
        config,
        device=options.device,
        calibration=options.calibration,
        rotation=OUR_METHODS[recipe.method],
    )
    seconds = time.perf_counter() - start
    return {"version": hf_hadacore.__version__, "seconds_to_quantize": round(seconds, 1)}


class PeerError(Exception):
    """A peer could not do its task; the message is the last line that it wrote."""


def quantize_with_peer(
    recipe: Recipe, src: Path, dst: Path, options: Options, sites: dict[str, Path]
) -> dict[str, Any]:
    """As `quantize`, in another process."""
    with tempfile.TemporaryDirectory(dir=dst.parent) as temporary:
        folder = Path(temporary)
        tokens, target, report = folder / "tokens.safetensors", folder / "peer", folder / "report.json"
        save_file({"tokens": calibration_tokens(options.calibration, load_tokenizer(src))}, tokens)
        task = Task(
            peer=recipe.quantizer,
            method=recipe.method,
            group_size=recipe.group_size,
            symmetric=recipe.symmetric,
            source=str(src.resolve()),
            target=str(target),
            tokens=str(tokens),
            report=str(report),
            device=options.device,
        )
        (folder / "task.json").write_text(json.dumps(task._asdict()))
        path = [str(sites[recipe.quantizer])] if recipe.quantizer in sites else []
        path += filter(None, [os.environ.get("PYTHONPATH")])
        program = Path(__file__).with_name("quality_peers.py")
        done = subprocess.run(
            [sys.executable, program, folder / "task.json"],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        if done.returncode or not report.is_file():
            raise PeerError((done.stdout.strip().splitlines() or ["it said nothing"])[-1][:300])
        # auto-round writes into a folder of its own naming.
        written = next(target.rglob("config.json")).parent
        import_checkpoint(written, dst, progress=False)
        return dict(json.loads(report.read_text()))


def measure(name: str, recipes: list[Recipe], options: Options, sites: dict[str, Path]) -> dict[str, Any]:
    """Every recipe on one model."""
    src = export_checkpoint(name, options.work / name)
    baseline, tokenizer = load(src, options)
    ids, bos = encode(tokenizer, (options.data / TEXT).read_text("utf-8"))
    rows: dict[Recipe, dict[str, Any]] = {}
    models: dict[Recipe, PreTrainedModel] = {}
    with tempfile.TemporaryDirectory(dir=options.work) as temporary:
        for number, recipe in enumerate(recipes):
            dst = Path(temporary) / str(number)
            rows[recipe] = {**recipe._asdict(), "recipe": recipe.name}
            try:
                rows[recipe] |= quantize(recipe, src, dst, options, sites)
            except Exception as error:  # what stops a peer, or its import, is a result
                if recipe.quantizer == OURS:
                    raise
                rows[recipe]["failed"] = f"{type(error).__name__}: {error}"
                print(f"{name}: {recipe.name}: {rows[recipe]['failed']}", flush=True)
                continue
            summary = inspect_checkpoint(dst)
            rows[recipe] |= {
                "bits_per_weight": round(summary["bits_per_weight"], 3),
                "bytes": summary["bytes"],
            }
            models[recipe] = load(dst, options)[0]
            print(f"{name}: {recipe.name}: {rows[recipe]['seconds_to_quantize']} s", flush=True)
    expected, found = compare(
        list(models.values()),
        baseline,
        ids,
        bos=bos,
        context=benchmark_quality.CONTEXT,
        windows=options.windows,
        progress=True,
    )
    results = dict(zip(models, found, strict=True))
    for recipe, result in results.items():
        rows[recipe] |= scores(result, expected)
        if recipe != recipe.ours and recipe.ours in results:
            rows[recipe]["over_ours"] = as_json(
                paired_difference(result.perplexity, results[recipe.ours].perplexity)
            )
        print(f"{name}: {describe(rows[recipe])}", flush=True)
    return {
        **about_model(name, expected),
        "recipes": list(rows.values()),
    }


def merge_report(report: dict[str, Any], file: Path) -> dict[str, Any]:
    """Write the report, and keep the rows of other recipes that the file has of the same measurement.

    Returns:
        What was written.
    """
    before = json.loads(file.read_text()) if file.exists() else {}
    same = all(before.get(key) == report[key] for key in report if key not in ("command", "date", "models"))
    merged = {**report, "models": dict(before["models"]) if same else {}}
    for name, measured in report["models"].items():
        old = merged["models"].get(name, {})
        keys = [key for key in measured if key not in ("recipes", "baseline_perplexity")]
        rows = old.get("recipes", []) if all(old.get(key) == measured[key] for key in keys) else []
        by_name = {row["recipe"]: row for row in [*rows, *measured["recipes"]]}
        merged["models"][name] = {**measured, "recipes": list(by_name.values())}
    file.write_text(json.dumps(merged, indent=2) + "\n")
    return merged


def main(
    data: Annotated[Path, typer.Option(help="Folder of the text files.")],
    model: Annotated[list[str] | None, typer.Option(help=f"Of {list(MODELS)}; repeatable.")] = None,
    peer: Annotated[list[str] | None, typer.Option(help=f"Of {list(PEERS)}; repeatable.")] = None,
    site: Annotated[
        list[str] | None, typer.Option(metavar="PEER=DIR", help="Where a peer is installed; repeatable.")
    ] = None,
    group_size: Annotated[list[int] | None, typer.Option(help="Repeatable; default: 64 and 128.")] = None,
    symmetric: Annotated[bool, typer.Option(help="Measure symmetric weights too.")] = True,
    only: Annotated[
        str, typer.Option(metavar="REGEX", help="Peers' recipes to measure, by their names; default: all.")
    ] = "",
    windows: Annotated[
        int | None, typer.Option(help="Windows of 1024 tokens; default: 100 on a GPU, else 20.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Calibration samples.")] = Calibration.samples,
    sequence_length: Annotated[
        int, typer.Option(help="Tokens of a calibration sample.")
    ] = Calibration.sequence_length,
    work: Annotated[
        Path, typer.Option(help="Where checkpoints are exported to, unless they are there.")
    ] = Path("demo_output"),
    device: Annotated[str | None, typer.Option(help="Default: the GPU if there is one.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the computation.")] = "bfloat16",
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Where to write the results; other recipes' are kept.")
    ] = None,
) -> None:
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    windows = windows or WINDOWS[torch.device(device).type]
    sites = {name: Path(folder).resolve() for name, _, folder in (s.partition("=") for s in site or [])}
    peers = peer or [name for name in PEERS if name in sites or find_spec(PEERS[name].module)]
    for name in {*peers, *sites} - PEERS.keys():
        raise typer.BadParameter(f"{name!r} is none of {list(PEERS)}", param_hint="--peer or --site")
    recipes = recipes_of(peers, group_size or [64, 128], [False, True] if symmetric else [False])
    recipes = [recipe for recipe in recipes if recipe.quantizer == OURS or re.search(only, recipe.name)]
    options = Options(data, work, [], device, dtype, windows, samples, sequence_length)
    command = f"--samples {samples} --sequence-length {sequence_length} --windows {windows} --dtype {dtype}"
    command += "".join(f" --site {name}=DIR" for name in sorted(sites))
    report: dict[str, Any] = about_this_run(
        f"python scripts/benchmark_quality_peers.py --data DATA {command}", "transformers"
    )
    report |= {
        "device": device_name(torch.device(device)),
        "text": TEXT,
        "context": benchmark_quality.CONTEXT,
        "calibration": {"text": CALIBRATION, "samples": samples, "sequence_length": sequence_length},
        "models": {},
    }
    for name in model or list(MODELS):
        report["models"][name] = measure(name, recipes, options, sites)
        if json_file is not None:
            merge_report(report, json_file)


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    typer.run(main)
