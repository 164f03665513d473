"""What is in a checkpoint on disk, from its headers and JSON files alone."""

import json
import os
import re
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch

from .architecture import read_config_file
from .attention.key_means import is_key_mean
from .int4 import NIBBLES_PER_WORD
from .integrity import TensorInfo, checkpoint_files, verify_files
from .offline.staging import REPORT_NAME

_LISTED = 12
_KINDS = ("int4 weights", "scales", "zeros", "full precision")


def inspect_checkpoint(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Architecture, recipe and sizes of a local checkpoint, quantized or not.

    Args:
        folder: the checkpoint.

    Returns:
        architecture, model_type, dtype, quantization_config (None if there is none), files, bytes,
        bytes_by_kind, parameters, quantized_share, bits_per_weight (of the int4 weights with their scales
        and zeros; None if there are none), bits_per_parameter (of everything), and full_precision: tensors
        that are not int4, with layers' numbers replaced by ``*``, with count, share and (where the
        checkpoint came with a report) the reason; largest share first.

    Raises:
        CheckpointError: the checkpoint is damaged or incomplete.
    """
    folder = Path(folder)
    files = checkpoint_files(folder)
    headers = verify_files(files)
    config = read_config_file(folder)
    kinds = {name: _kind(name, headers) for name in headers}
    bytes_by_kind = dict.fromkeys(_KINDS, 0)
    for name, info in headers.items():
        bytes_by_kind[kinds[name]] += info.nbytes
    # Means of keys, like scales and zeros, stand for nothing that the original has.
    elements = {
        name: 0 if is_key_mean(name) else _elements(info, kinds[name]) for name, info in headers.items()
    }
    parameters = sum(elements.values())
    quantized = sum(count for name, count in elements.items() if kinds[name] == "int4 weights")
    total = sum(bytes_by_kind.values())
    int4_bytes = total - bytes_by_kind["full precision"]
    kept = {name: count for name, count in elements.items() if kinds[name] == "full precision"}
    return {
        "architecture": next(iter(config.get("architectures") or ()), None),
        "model_type": config.get("model_type"),
        "dtype": config.get("dtype", config.get("torch_dtype")),
        "quantization_config": config.get("quantization_config"),
        "files": [file.name for file in files],
        "bytes": total,
        "bytes_by_kind": bytes_by_kind,
        "parameters": parameters,
        "quantized_share": round(quantized / parameters, 6) if parameters else 0.0,
        "bits_per_weight": round(8 * int4_bytes / quantized, 4) if quantized else None,
        "bits_per_parameter": round(8 * total / parameters, 4) if parameters else None,
        "full_precision": _full_precision(kept, parameters, _reasons(folder)),
    }


def describe(summary: Mapping[str, Any]) -> str:
    """The summary of `inspect_checkpoint` as text for people."""
    recipe = summary["quantization_config"]
    if recipe is None:
        recipe_text = "none, full precision"
    elif isinstance(recipe, dict):
        recipe_text = ", ".join(
            f"{key}={value}" for key, value in recipe.items() if value not in (None, [], {})
        )
    else:
        recipe_text = str(recipe)
    lines = [
        f"architecture    {summary['architecture']} ({summary['model_type']}, {summary['dtype']})",
        f"recipe          {recipe_text}",
        f"parameters      {summary['parameters']:,}, {summary['quantized_share']:.2%} in int4",
        f"size            {format_size(summary['bytes'])} in {len(summary['files'])} file(s), "
        f"{summary['bits_per_parameter']} bits per parameter",
    ]
    lines += [f"  {kind:<16}{format_size(size)}" for kind, size in summary["bytes_by_kind"].items() if size]
    if summary["bits_per_weight"] is not None:
        lines.append(
            f"int4 weights    {summary['bits_per_weight']} bits per weight, scales and zeros included"
        )
    lines.append("in full precision")
    kept = summary["full_precision"]
    for group in kept[:_LISTED]:
        reason = f"  ({group['reason']})" if group["reason"] else ""
        lines.append(f"  {group['share']:>8.3%}  {group['count']:>5} x {group['name']}{reason}")
    if len(kept) > _LISTED:
        rest = sum(group["share"] for group in kept[_LISTED:])
        lines.append(f"  {rest:>8.3%}  in {len(kept) - _LISTED} more kinds of tensors")
    return "\n".join(lines)


def _kind(name: str, headers: Mapping[str, TensorInfo]) -> str:
    for suffix, kind in (("_scale", "scales"), ("_zero", "zeros")):
        if name.endswith(suffix) and _is_packed(name.removesuffix(suffix), headers):
            return kind
    return "int4 weights" if _is_packed(name, headers) else "full precision"


def _is_packed(name: str, headers: Mapping[str, TensorInfo]) -> bool:
    return name in headers and headers[name].dtype == torch.int32 and f"{name}_scale" in headers


def _elements(info: TensorInfo, kind: str) -> int:
    """How many of the model's parameters a stored tensor stands for."""
    if kind in ("scales", "zeros"):
        return 0
    return prod(info.shape) * (NIBBLES_PER_WORD if kind == "int4 weights" else 1)


def _reasons(folder: Path) -> dict[str, str]:
    """Why tensors stayed in full precision, if the checkpoint came with a report that can be read."""
    try:
        report = json.loads((folder / REPORT_NAME).read_text("utf-8"))
        return {entry["name"]: str(entry["reason"]) for entry in report["full_precision"]}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}


def _full_precision(
    kept: Mapping[str, int], parameters: int, reasons: Mapping[str, str]
) -> list[dict[str, Any]]:
    groups: dict[str, dict[str, Any]] = {}
    for name, elements in kept.items():
        pattern = re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
        reason = "mean of the keys, for 8-bit attention" if is_key_mean(name) else reasons.get(name)
        group = groups.setdefault(pattern, {"name": pattern, "count": 0, "share": 0.0, "reason": reason})
        group["count"] += 1
        group["share"] += elements / parameters if parameters else 0.0
    return sorted(groups.values(), key=lambda group: -group["share"])


def format_size(nbytes: int) -> str:
    """A number of bytes for people, e.g. ``5.31 GB``."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= scale:
            return f"{nbytes / scale:.2f} {unit}"
    return f"{nbytes} bytes"
