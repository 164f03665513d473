"""Checks that a safetensors checkpoint is whole, from the headers alone.

A safetensors file is eight bytes of header length, a JSON header that gives every
tensor's dtype, shape and place, and the data. Everything that can be wrong without
looking at a weight is found here, in milliseconds and without loading anything:
truncated files, places that overlap or leave the file, missing shards, an index that
contradicts its shards. The data itself is read by the safetensors library.
"""

import json
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open

from .errors import CheckpointError

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

_MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own cap
_MAX_ELEMENTS = 2**63 - 1
_MAX_LISTED = 3

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class TensorInfo(NamedTuple):
    """What a header says about one tensor.

    Attributes:
        dtype: of the stored values.
        shape: of the tensor.
        file: the file that holds it.
        nbytes: size of its data.
        offset: where its data begins in the file, counted from the file's first byte.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    nbytes: int
    offset: int


def read_header(file: str | os.PathLike[str]) -> dict[str, TensorInfo]:
    """Read and check the header of one safetensors file; no tensor is loaded.

    Args:
        file: path of the file.

    Returns:
        The tensors by name, in the order of their data.

    Raises:
        CheckpointError: naming the file (and tensor): it is missing, truncated, too long, its
            header is not valid, or a tensor's dtype, shape and place do not agree.
    """
    path = Path(file)
    header, data_start, data_bytes = _read_json(path)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__ must map strings to strings")
    tensors = {name: _tensor_info(path, name, entry, data_start) for name, entry in header.items()}
    return _check_coverage(path, tensors, data_start, data_bytes)


def verify_files(files: Iterable[str | os.PathLike[str]]) -> dict[str, TensorInfo]:
    """Check the headers of the files of one checkpoint.

    Args:
        files: safetensors files that together hold the checkpoint.

    Returns:
        Every tensor of the checkpoint by name.

    Raises:
        CheckpointError: a file is not a whole safetensors file, two files hold one tensor, or the index
            beside them contradicts them.
    """
    tensors: dict[str, TensorInfo] = {}
    paths = [Path(file) for file in files]
    for file in paths:
        for name, info in read_header(file).items():
            if name in tensors:
                raise CheckpointError(f"tensor {name!r} is in both {tensors[name].file} and {info.file}")
            tensors[name] = info
    names = {path.name for path in paths}
    index = paths[0].parent / INDEX_NAME if paths else None
    if index is not None and WEIGHTS_NAME not in names and index.is_file():
        weight_map = _read_index(index)
        # Otherwise it is the index of other weights in the same folder.
        if set(weight_map.values()) == names:
            _check_index(index, weight_map, tensors)
    return tensors


def checkpoint_files(folder: str | os.PathLike[str]) -> list[Path]:
    """Find the weight files of a checkpoint folder and check that they are all there.

    `model.safetensors` is taken if it exists, otherwise the files that
    `model.safetensors.index.json` names: the order in which `from_pretrained` looks.

    Args:
        folder: a local checkpoint.

    Returns:
        The files, sorted by name.

    Raises:
        CheckpointError: the folder has no safetensors weights (pickled ones are never opened), a
            shard is missing or is no plain file name, or index and shards name different tensors.
    """
    folder = Path(folder)
    single, index = folder / WEIGHTS_NAME, folder / INDEX_NAME
    if single.is_file():
        return [single]
    if not index.is_file():
        raise CheckpointError(_no_weights(folder))
    weight_map = _read_index(index)
    files = [folder / name for name in sorted(set(weight_map.values()))]
    for file in files:
        if not file.is_file():
            named = next(tensor for tensor, name in weight_map.items() if name == file.name)
            raise CheckpointError(f"{file}: shard is missing, though {index.name} says it holds {named!r}")
    verify_files(files)
    return files


def verify_quantized(
    headers: Mapping[str, TensorInfo],
    expected: Mapping[str, tuple[torch.dtype | None, Sequence[int]]],
) -> None:
    """Check a quantized checkpoint's tensors against what its config makes of the model.

    Args:
        headers: as returned by `verify_files`.
        expected: `{tensor name: (dtype, shape)}`; dtype None accepts every floating-point dtype.

    Raises:
        CheckpointError: naming the tensors that are absent or have another dtype or shape, with
            what was found and what was expected; zeros of symmetric weights and permutations that the
            config does not name, too.
    """
    problems = []
    for name, (dtype, shape) in expected.items():
        wanted = f"{_dtype_text(dtype)} {list(shape)}"
        info = headers.get(name)
        if info is None:
            problems.append(f"{name}: expected {wanted}, found no such tensor")
            continue
        dtype_agrees = info.dtype.is_floating_point if dtype is None else info.dtype == dtype
        if not dtype_agrees or info.shape != tuple(shape):
            found = f"{_dtype_text(info.dtype)} {list(info.shape)}"
            problems.append(f"{name}: expected {wanted}, found {found} in {info.file}")
    for zero in (f"{name}_zero" for name in expected):
        if zero in headers and zero not in expected:
            problems.append(
                f"{zero}: expected no zeros in a symmetric weight, found some in {headers[zero].file}"
            )
    for scale in expected:
        perm = f"{scale.removesuffix('weight_scale')}input_perm"
        if scale.endswith("weight_scale") and perm in headers and perm not in expected:
            problems.append(
                f"{perm}: expected none, because input_permutations does not name the layer, found one in "
                f"{headers[perm].file}"
            )
    if problems:
        raise CheckpointError(f"the checkpoint contradicts its quantization config: {_listed(problems)}")


def verify_permutations(headers: Mapping[str, TensorInfo], names: Iterable[str]) -> None:
    """Read the orders of inputs of a checkpoint and check that each names every input once.

    Kernels index with them, so a wrong one would read memory that is not x's.

    Args:
        headers: as returned by `verify_files`; shapes and dtypes are checked already.
        names: of the ``input_perm`` tensors.

    Raises:
        CheckpointError: naming the tensors that are no permutations.
    """
    problems = []
    for name in names:
        with safe_open(headers[name].file, "pt") as file:
            perm = file.get_tensor(name)
        if not torch.equal(perm.sort().values, torch.arange(len(perm), dtype=perm.dtype, device="cpu")):
            problems.append(
                f"{name}: expected every input from 0 to {len(perm) - 1} once, found {_what_is_wrong(perm)}"
            )
    if problems:
        raise CheckpointError(f"the checkpoint's input permutations are damaged: {_listed(problems)}")


def _what_is_wrong(perm: torch.Tensor) -> str:
    outside = perm[(perm < 0) | (perm >= len(perm))]
    if len(outside):
        return f"{int(outside[0])}"
    values, counts = perm.unique(return_counts=True)
    return f"{int(values[counts > 1][0])} more than once"


def _read_json(path: Path) -> tuple[dict[str, Any], int, int]:
    """The parsed header, where the data starts, and how many bytes of data there are."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as stream:
            prefix = stream.read(8)
            if len(prefix) < 8:
                raise CheckpointError(f"{path}: truncated: {size} bytes, a safetensors file has at least 8")
            (length,) = struct.unpack("<Q", prefix)
            if length > _MAX_HEADER_BYTES:
                raise CheckpointError(
                    f"{path}: not a safetensors file: its header claims {length} bytes, at most "
                    f"{_MAX_HEADER_BYTES} are allowed"
                )
            if length > size - 8:
                raise CheckpointError(
                    f"{path}: truncated: the header claims {length} bytes, only {size - 8} follow"
                )
            raw = stream.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the header is not valid JSON: {error}") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the header must be a JSON object, found {type(header).__name__}")
    return header, 8 + length, size - 8 - length


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse a name given twice: readers disagree about which one counts."""
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} occurs twice")
    return found


def _tensor_info(path: Path, name: str, entry: object, data_start: int) -> TensorInfo:
    where = f"{path}: tensor {name!r}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: expected dtype, shape and data_offsets, found {entry!r:.200}")
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise CheckpointError(f"{where}: unknown dtype {entry['dtype']!r:.80}; known: {', '.join(DTYPES)}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _are_sizes(shape) or prod(shape) > _MAX_ELEMENTS:
        raise CheckpointError(f"{where}: shape {shape!r:.200} is not a list of sizes that fit in 64 bits")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{where}: data_offsets {offsets!r:.200} is not [begin, end]")
    nbytes = prod(shape) * dtype.itemsize
    if offsets[1] - offsets[0] != nbytes:
        raise CheckpointError(
            f"{where}: {entry['dtype']} {shape} takes {nbytes} bytes, but data_offsets {offsets} gives it "
            f"{offsets[1] - offsets[0]}"
        )
    return TensorInfo(dtype, tuple(shape), path, nbytes, data_start + offsets[0])


def _are_sizes(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _check_coverage(
    path: Path, tensors: dict[str, TensorInfo], data_start: int, data_bytes: int
) -> dict[str, TensorInfo]:
    """Check that the tensors fill the data from its first byte to its last, each byte once."""
    in_order = dict(sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)))
    position, previous = data_start, "the header"
    for name, info in in_order.items():
        if info.offset != position:
            what = "overlaps" if info.offset < position else "leaves a hole after"
            raise CheckpointError(
                f"{path}: tensor {name!r} begins at byte {info.offset} and {what} {previous!r}, which ends "
                f"at {position}"
            )
        position, previous = info.offset + info.nbytes, name
    end = data_start + data_bytes
    if position > end:
        raise CheckpointError(
            f"{path}: truncated: tensor {previous!r} ends at byte {position}, the file at byte {end}"
        )
    if position < end:
        raise CheckpointError(f"{path}: {end - position} bytes after the last tensor belong to none")
    return in_order


def _no_weights(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder}: no such checkpoint folder"
    pickled = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLE_SUFFIXES)
    if pickled:
        return (
            f"{folder}: only pickled weights found ({_listed(pickled)}); no pickle is ever opened, because "
            "loading one runs code; convert the checkpoint to safetensors first"
        )
    return f"{folder}: found neither {WEIGHTS_NAME} nor {INDEX_NAME}"


def _read_index(index: Path) -> dict[str, str]:
    try:
        content = json.loads(index.read_text("utf-8"), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{index}: not valid JSON: {error}") from None
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map must be an object {{tensor: file}} that is not empty")
    for tensor, name in weight_map.items():
        # Only plain names: a path could leave the folder. Checked on both kinds of separators.
        plain = isinstance(name, str) and name.endswith(".safetensors") and not set(name) & set("/\\:\0")
        if not plain:
            raise CheckpointError(
                f"{index}: tensor {tensor!r} is said to be in {name!r:.200}, which is not the plain name of "
                "a .safetensors file beside the index"
            )
    return weight_map


def _check_index(index: Path, weight_map: dict[str, str], headers: dict[str, TensorInfo]) -> None:
    for tensor, name in weight_map.items():
        found = headers.get(tensor)
        if found is None:
            raise CheckpointError(f"{index}: names tensor {tensor!r} in {name}, which does not hold it")
        if found.file.name != name:
            raise CheckpointError(f"{index}: says {tensor!r} is in {name}, but {found.file.name} holds it")
    for tensor, info in headers.items():
        if tensor not in weight_map:
            raise CheckpointError(f"{info.file}: holds tensor {tensor!r}, which {index.name} does not name")


def _dtype_text(dtype: torch.dtype | None) -> str:
    return "floating point" if dtype is None else str(dtype).removeprefix("torch.")


def _listed(items: list[str]) -> str:
    rest = len(items) - _MAX_LISTED
    return "; ".join(items[:_MAX_LISTED]) + (f"; and {rest} more" if rest > 0 else "")
