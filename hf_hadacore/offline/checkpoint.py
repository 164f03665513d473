"""Quantize a checkpoint on disk without ever holding the model: layer by layer, atomically, resumable.

The result is made in `DST.partial` (see `staging`). A run that was killed, at any point, is continued with
`resume=True` and gives the same bytes as one that was not.
"""

import hashlib
import importlib.metadata
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from huggingface_hub import snapshot_download
from tqdm import tqdm
from transformers import PreTrainedModel

from .._version import __version__
from ..config import HadaCoreConfig
from ..errors import CheckpointError
from ..integrity import TensorInfo
from ..layer_plan import LayerPlan
from .calibrated import open_source
from .calibration import Calibration
from .layer_record import LayerRecord
from .licenses import find_license
from .shard_writer import Journal, ShardPlan, ShardWriter, plan_shards
from .staging import COPIED_NAMES, COPIED_SUFFIXES, Staging, digest_of_weights
from .streaming import Unit

_PACKAGES = ("hf_hadacore", "transformers", "torch", "safetensors")


class Source(Protocol):
    """What a checkpoint is written from; see `SourceModel` for the attributes."""

    folder: Path
    stored: dict[str, TensorInfo]
    headers: dict[str, TensorInfo]
    model: PreTrainedModel
    layer_plan: LayerPlan
    units: list[Unit]
    total_parameters: int
    unused: list[str]
    outputs: dict[str, torch.Tensor]
    provenance: dict[str, Any]
    read_back: Callable[[str], torch.Tensor]

    def realise(self, unit: Unit) -> tuple[dict[str, torch.Tensor], list[LayerRecord]]:
        """The tensors of one unit under their names on disk, and a record of each int4 weight."""


def quantize_checkpoint(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    config: HadaCoreConfig,
    *,
    dtype: str | torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
    resume: bool = False,
    progress: bool = True,
    device: str | torch.device | None = "cpu",
    calibration: Calibration | torch.Tensor | None = None,
    rotation: str = "auto",
) -> dict[str, Any]:
    """Quantize a full-precision checkpoint and write the int4 checkpoint that `from_pretrained` loads.

    With method "rtn" the tensors are those of `from_pretrained(src, quantization_config=config)` and
    `save_pretrained`, bit for bit, and memory is needed for one Parameter at a time. "gptq" needs calibration
    data, and memory for one decoder layer, the Hessian of an input and the hidden states of all samples.

    Args:
        src: a local folder with safetensors weights, or a model id on the Hub.
        dst: the folder to make; must not exist (an empty one is fine).
        config: the options of the quantizer.
        dtype: of scales and of what stays in full precision, e.g. "bfloat16"; None takes the checkpoint's.
        max_shard_size: largest weight file, in bytes or as a text like "5GB".
        resume: continue a run that was interrupted; with nothing to continue, start one.
        progress: show a progress bar with the time left.
        device: where weights are quantized; None takes the GPU if there is one.
        calibration: for method "gptq", text or tokens (int64 ``[samples, length]``).
        rotation: Hadamard rotations folded into the weights first: "r1" of the residual stream, "r2" of the
            heads' values, "r1r2" of both, "none". The model computes the same, and nothing is left to do at
            run time, but for R1 of a model whose head is tied to the embedding: two transforms of the hidden
            states. "auto" is "r1r2" for method "gptq", if the model allows it, else "none": rotations make
            "rtn" worse.

    Returns:
        The report, which also lies in DST as `quantization_report.json`.

    Raises:
        CheckpointError: the source is damaged, incomplete, already quantized or not in safetensors; dst
            exists or lies in src; the disk is too small; what there is to resume is other work.
        ConfigError: the config does not fit the model, or calibration does not fit the method.
        CalibrationError: the calibration data cannot be read, or there is too little of it.
        QuantizationError: weights or hidden states hold NaN or infinite values.
        UnsupportedError: method "gptq" and a model that is no stack of decoder layers, or a rotation that the
            model does not allow.
    """
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return convert_checkpoint(
        src,
        dst,
        lambda folder: open_source(
            folder, config, calibration, dtype=dtype, device=chosen, rotation=rotation
        ),
        {"quantization config": config.to_dict(), "device": chosen.type, "rotation": "none"},
        max_shard_size=max_shard_size,
        resume=resume,
        progress=progress,
        label="Quantizing",
    )


def convert_checkpoint(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    open_source: Callable[[Path], Source],
    options: Mapping[str, Any],
    *,
    max_shard_size: int | str,
    resume: bool,
    progress: bool,
    label: str,
) -> dict[str, Any]:
    """Make a checkpoint of what another one becomes.

    Args:
        src, dst, max_shard_size, resume, progress: as in `quantize_checkpoint`.
        open_source: what is written, from the local folder of src.
        options: what the tensors depend on, besides src and what the source calls its provenance.
        label: of the progress bar.

    Returns:
        The report.

    Raises:
        CheckpointError: as in `quantize_checkpoint`, and what `open_source` raises.
    """
    staging = Staging(dst, resume=resume)
    if (finished := staging.finish_renamed()) is not None:
        return finished
    staging.check()
    folder = find_source(src)
    staging.check_is_outside(folder)
    source = open_source(folder)
    plan = plan_shards(
        source.outputs, max_shard_size=max_shard_size, total_parameters=source.total_parameters
    )
    work = {**_fingerprint(source, plan), **options, **source.provenance}
    with staging.open(plan, work) as writer:
        _write_shards(source, writer, progress, label)
        report = _report(source, writer.journal, plan, src)
        _write_small_files(source, plan, report, staging)
    staging.publish()
    return report


def find_source(src: str | os.PathLike[str]) -> Path:
    """The local folder of a checkpoint; a model id is looked up in the local cache and on the Hub.

    Args:
        src: a folder or a model id.

    Raises:
        CheckpointError: there is no such folder, and no such model can be had.
    """
    folder = Path(src)
    if folder.is_dir():
        return folder
    model_id = os.fspath(src)
    if folder.exists() or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", model_id):
        raise CheckpointError(f"{src}: is neither a checkpoint folder nor a model id on the Hub")
    try:
        return Path(
            snapshot_download(
                model_id,
                allow_patterns=[
                    "*.safetensors",
                    *(f"*{suffix}" for suffix in COPIED_SUFFIXES),
                    *COPIED_NAMES,
                    "README.md",
                ],
                ignore_patterns=["*/*", "consolidated*"],
            )
        )
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{src}: there is no such folder, and it cannot be had from the Hub: {error}"
        ) from error


def _fingerprint(source: Source, plan: ShardPlan) -> dict[str, Any]:
    """What the output of any work on a source depends on; the keys are what a user reads."""
    shards = hashlib.sha256(json.dumps(plan.sizes).encode())
    for header in plan.headers.values():
        shards.update(header)
    return {
        "source weights": digest_of_weights(source.stored),
        "source config": hashlib.sha256((source.folder / "config.json").read_bytes()).hexdigest(),
        "dtype": str(source.model.dtype),
        "plan of the shards": shards.hexdigest(),
        "version of hf_hadacore": _version("hf_hadacore"),
    }


def _write_shards(source: Source, writer: ShardWriter, progress: bool, label: str) -> None:
    done = writer.journal.entries
    sizes = {
        unit.name: sum(source.headers[name].nbytes for name in unit.sources.values()) for unit in source.units
    }
    with tqdm(
        total=sum(sizes.values()),
        initial=sum(sizes[name] for name in done),
        unit="B",
        unit_scale=True,
        desc=label,
        disable=not progress,
    ) as bar:
        source.read_back = writer.read
        for unit in source.units:
            if unit.name in done:
                continue
            tensors, records = source.realise(unit)
            writer.write(unit.name, tensors, {"layers": [record.as_json() for record in records]})
            bar.update(sizes[unit.name])
            if errors := [record.calibration.output_error for record in records if record.calibration]:
                bar.set_postfix_str(f"{unit.name}: output error {sum(errors) / len(errors):.2%}")
    if missing := writer.missing():
        raise CheckpointError(f"no source tensor gave {missing[0]!r} ({len(missing)} tensors are missing)")


def _report(source: Source, journal: Journal, plan: ShardPlan, src: str | os.PathLike[str]) -> dict[str, Any]:
    """What was done, without times and paths: the same run gives the same report."""
    sizes = source.layer_plan.sizes
    total = sum(sizes.values())
    layers = [layer for unit in source.units for layer in journal.entries[unit.name]["layers"]]
    source_bytes = sum(info.nbytes for info in source.stored.values())
    return {
        "source": os.fspath(src) if not Path(src).is_dir() else source.folder.resolve().name,
        "license": find_license(source.folder),
        "architecture": type(source.model).__name__,
        "quantization_config": source.model.config.quantization_config.to_dict(),
        **source.provenance,
        "dtype": _text(source.model.dtype),
        "versions": {package: _version(package) for package in _PACKAGES},
        "source_bytes": source_bytes,
        "quantized_bytes": plan.total_bytes,
        "size_ratio": round(plan.total_bytes / source_bytes, 4),
        "parameters": total,
        "quantized_share": round(source.layer_plan.quantized_share, 6),
        "layers": layers,
        "full_precision": [
            {"name": name, "reason": reason, "share": round(sizes[name] / total, 8)}
            for name, reason in source.layer_plan.kept.items()
        ],
        "unused_source_tensors": source.unused,
    }


def _write_small_files(source: Source, plan: ShardPlan, report: dict[str, Any], staging: Staging) -> None:
    staging.copy_small_files(source.folder)
    model = source.model
    if model.can_generate() and not (staging.folder / "generation_config.json").exists():
        model.generation_config.save_pretrained(staging.folder)
    model.config.dtype = _text(model.dtype)
    model.config.architectures = [type(model).__name__]
    staging.describe(plan, report, model.config.to_json_string(use_diff=True))


def _text(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _version(package: str) -> str:
    return __version__ if package == "hf_hadacore" else importlib.metadata.version(package)
