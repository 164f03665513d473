"""Quantize a checkpoint on disk without ever holding the model: layer by layer, atomically, resumable.

All work happens in `DST.partial`, which never loads as a checkpoint: its shards lie in a subfolder that
gets its config.json last of all, and that is then renamed to DST in one step. A run that was killed, at
any point, is continued with `resume=True` and gives the same bytes as one that was not.
"""

import hashlib
import importlib.metadata
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock
import torch
from huggingface_hub import snapshot_download
from tqdm import tqdm

from ._version import __version__
from .config import HadaCoreConfig
from .errors import CheckpointError
from .integrity import INDEX_NAME, TensorInfo, checkpoint_files, verify_files
from .shard_writer import Journal, ShardPlan, ShardWriter, plan_shards, sync_folder, write_index, write_text
from .streaming import SourceModel

REPORT_NAME = "quantization_report.json"
PARTIAL_SUFFIX = ".partial"

_COPIED_SUFFIXES = (".json", ".model", ".txt", ".jinja", ".tiktoken")
_COPIED_NAMES = ("LICENSE*", "NOTICE*", "USE_POLICY*")
_NOT_COPIED = ("config.json", INDEX_NAME, REPORT_NAME)
_TEMPLATES_FOLDER = "additional_chat_templates"
_SAMPLE_BYTES = 4096
_PACKAGES = ("hf_hadacore", "transformers", "torch", "safetensors")


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
) -> dict[str, Any]:
    """Quantize a full-precision checkpoint and write the int4 checkpoint that `from_pretrained` loads.

    The tensors are those of `from_pretrained(src, quantization_config=config)` and `save_pretrained`, bit
    for bit. Memory is needed for one Parameter at a time.

    Args:
        src: a local folder with safetensors weights, or a model id on the Hub.
        dst: the folder to make; must not exist (an empty one is fine).
        config: the options of the quantizer.
        dtype: of scales and of what stays in full precision, e.g. "bfloat16"; None takes the checkpoint's.
        max_shard_size: largest weight file, in bytes or as a text like "5GB".
        resume: continue a run that was interrupted; with nothing to continue, start one.
        progress: show a progress bar with the time left.
        device: where weights are quantized; None takes the GPU if there is one.

    Returns:
        The report, which also lies in DST as `quantization_report.json`.

    Raises:
        CheckpointError: the source is damaged, incomplete, already quantized or not in safetensors; dst
            exists or lies in src; the disk is too small; what there is to resume is other work.
        ConfigError: the config does not fit the model.
        QuantizationError: a weight holds NaN or infinite values.
    """
    target = Path(os.path.abspath(dst))
    partial = target.parent / (target.name + PARTIAL_SUFFIX)
    if resume and _was_renamed(target, partial):
        return _finish_renamed(target, partial)
    _check_target(target, partial, resume)
    folder = find_source(src)
    if folder.resolve() in (target.resolve(), *target.resolve().parents):
        raise CheckpointError(f"{target}: lies in the source {folder}; choose a folder outside of it")
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    source = SourceModel(folder, config, dtype=dtype, device=chosen)
    plan = plan_shards(
        source.outputs, max_shard_size=max_shard_size, total_parameters=source.total_parameters
    )
    staging = _make_staging(partial)
    with _sole_user(partial):
        journal = Journal(partial / "journal.jsonl", _fingerprint(folder, source, config, plan, chosen))
        try:
            writer = ShardWriter(staging, plan, journal)
            _check_space(staging, plan, writer)
            _write_shards(source, writer, journal, progress)
        finally:
            journal.close()
        report = _report(source, journal, plan, folder, src)
        _write_small_files(source, plan, report, folder, staging)
    _publish(staging, target, partial)
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
                    *(f"*{suffix}" for suffix in _COPIED_SUFFIXES),
                    *_COPIED_NAMES,
                ],
                ignore_patterns=["*/*", "consolidated*"],
            )
        )
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{src}: there is no such folder, and it cannot be had from the Hub: {error}"
        ) from error


def _check_target(target: Path, partial: Path, resume: bool) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target}: exists already; nothing is overwritten, choose another folder")
    if target.is_symlink() or target.is_mount():
        raise CheckpointError(f"{target}: is a link or a mount point, which no rename can replace")
    if partial.exists() and not resume:
        raise CheckpointError(
            f"{partial}: holds an unfinished run; continue it with resume=True (--resume) or delete "
            "the folder"
        )


def _make_staging(partial: Path) -> Path:
    staging = partial / "checkpoint"
    try:
        staging.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{staging}: cannot be made: {error.strerror}") from error
    return staging


def _was_renamed(target: Path, partial: Path) -> bool:
    """Whether the run ended between the rename of its result and the removal of its journal."""
    return (target / REPORT_NAME).is_file() and partial.is_dir() and not (partial / "checkpoint").exists()


def _finish_renamed(target: Path, partial: Path) -> dict[str, Any]:
    shutil.rmtree(partial)
    return json.loads((target / REPORT_NAME).read_text("utf-8"))


@contextmanager
def _sole_user(partial: Path) -> Iterator[None]:
    try:
        with filelock.FileLock(partial / "lock", timeout=0):
            yield
    except filelock.Timeout:
        raise CheckpointError(f"{partial}: another process is working on it") from None


def _fingerprint(
    folder: Path, source: SourceModel, config: HadaCoreConfig, plan: ShardPlan, device: torch.device
) -> dict[str, Any]:
    """Everything that the output depends on; the keys are what a user reads when it has changed."""
    shards = hashlib.sha256(json.dumps(plan.sizes).encode())
    for header in plan.headers.values():
        shards.update(header)
    return {
        "source weights": _digest_of_weights(source.headers),
        "source config": hashlib.sha256((folder / "config.json").read_bytes()).hexdigest(),
        "quantization config": config.to_dict(),
        "dtype": str(source.model.dtype),
        "device": device.type,
        "plan of the shards": shards.hexdigest(),
        "version of hf_hadacore": _version("hf_hadacore"),
    }


def _digest_of_weights(headers: Mapping[str, TensorInfo]) -> str:
    """Digest of names, sizes and places of all tensors, and of the first bytes of each."""
    digest = hashlib.sha256()
    by_file: dict[Path, list[tuple[str, TensorInfo]]] = {}
    for name, info in headers.items():
        by_file.setdefault(info.file, []).append((name, info))
    for file, tensors in sorted(by_file.items()):
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
        with open(file, "rb") as stream:
            for name, info in tensors:
                digest.update(f"{name} {info.dtype} {info.shape} {info.offset}\n".encode())
                stream.seek(info.offset)
                digest.update(stream.read(min(_SAMPLE_BYTES, info.nbytes)))
    return digest.hexdigest()


def _check_space(staging: Path, plan: ShardPlan, writer: ShardWriter) -> None:
    needed = sum(plan.places[name].end - plan.places[name].begin for name in writer.missing())
    free = shutil.disk_usage(staging).free
    if needed > free:
        raise CheckpointError(
            f"{staging}: the disk has {free / 1e9:.1f} GB left, {needed / 1e9:.1f} GB more are needed"
        )


def _write_shards(source: SourceModel, writer: ShardWriter, journal: Journal, progress: bool) -> None:
    sizes = {
        unit.name: sum(source.headers[name].nbytes for name in unit.sources.values()) for unit in source.units
    }
    done = sum(sizes[name] for name in journal.entries)
    with tqdm(
        total=sum(sizes.values()),
        initial=done,
        unit="B",
        unit_scale=True,
        desc="Quantizing",
        disable=not progress,
    ) as bar:
        for unit in source.units:
            if unit.name in journal.entries:
                continue
            tensors, records = source.realise(unit)
            writer.write(unit.name, tensors, {"layers": [record._asdict() for record in records]})
            bar.update(sizes[unit.name])
    if missing := writer.missing():
        raise CheckpointError(f"no source tensor gave {missing[0]!r} ({len(missing)} tensors are missing)")


def _report(
    source: SourceModel, journal: Journal, plan: ShardPlan, folder: Path, src: str | os.PathLike[str]
) -> dict[str, Any]:
    """What was done, without times and paths: the same run gives the same report."""
    sizes = source.layer_plan.sizes
    total = sum(sizes.values())
    layers = [layer for unit in source.units for layer in journal.entries[unit.name]["layers"]]
    source_bytes = sum(info.nbytes for info in source.headers.values())
    return {
        "source": os.fspath(src) if not Path(src).is_dir() else folder.resolve().name,
        "architecture": type(source.model).__name__,
        "quantization_config": source.model.config.quantization_config.to_dict(),
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


def _write_small_files(
    source: SourceModel, plan: ShardPlan, report: Mapping[str, Any], folder: Path, staging: Path
) -> None:
    """Everything but the shards; config.json last, because without it nothing loads."""
    verify_files(staging / name for name in plan.sizes)
    for file in _files_to_copy(folder):
        copy = staging / file.relative_to(folder)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, copy)
    model = source.model
    if model.can_generate() and not (staging / "generation_config.json").exists():
        model.generation_config.save_pretrained(staging)
    write_text(staging / REPORT_NAME, json.dumps(report, indent=2) + "\n")
    write_index(staging, plan)
    checkpoint_files(staging)
    model.config.dtype = _text(model.dtype)
    model.config.architectures = [type(model).__name__]
    write_text(staging / "config.json", model.config.to_json_string(use_diff=True))


def _files_to_copy(folder: Path) -> Iterable[Path]:
    """Tokenizer, processor and generation files, chat templates and licenses; no weights, no code."""
    for file in sorted(folder.iterdir()):
        wanted = file.suffix in _COPIED_SUFFIXES or any(file.match(pattern) for pattern in _COPIED_NAMES)
        if (
            wanted
            and file.is_file()
            and file.name not in _NOT_COPIED
            and not file.name.endswith(".index.json")
        ):
            yield file
    yield from sorted(folder.glob(f"{_TEMPLATES_FOLDER}/*.jinja"))


def _publish(staging: Path, target: Path, partial: Path) -> None:
    sync_folder(staging)
    os.replace(staging, target)
    sync_folder(target.parent)
    shutil.rmtree(partial)


def _text(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _version(package: str) -> str:
    return __version__ if package == "hf_hadacore" else importlib.metadata.version(package)
