"""Write a sharded safetensors checkpoint tensor by tensor, in any order, and resume after a kill.

The library's `save_file` wants a whole shard in memory. Here the sizes are known in advance, so the
header of a shard is written first and every tensor goes to its place in the file as soon as it
exists: no more than one tensor is ever held. The files are the same, byte for byte, as those of
`save_file`.

A journal beside the shards notes what is safely on disk. A line is written only after its tensors
were synced, so whatever the journal says survives a kill at any point; the rest is done again.
"""

import json
import os
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import save

from ..errors import CheckpointError
from ..integrity import DTYPE_NAMES, INDEX_NAME

UNFINISHED_SUFFIX = ".unfinished"

_READ_BYTES = 1 << 24


class Place(NamedTuple):
    """Where a tensor's data goes.

    Attributes:
        file: name of the shard.
        begin: first byte in the file, header included.
        end: one past its last byte.
    """

    file: str
    begin: int
    end: int


class ShardPlan(NamedTuple):
    """Which tensor is where, known before the first one is computed.

    Attributes:
        places: `{tensor: Place}`.
        headers: `{file: everything before its data}`.
        sizes: `{file: bytes}`.
        shard_index: content of the index file, or None if one shard holds everything.
    """

    places: dict[str, Place]
    headers: dict[str, bytes]
    sizes: dict[str, int]
    shard_index: dict[str, Any] | None

    @property
    def total_bytes(self) -> int:
        """The size of all shards."""
        return sum(self.sizes.values())

    def index_text(self) -> str:
        """The index file as `save_pretrained` writes it."""
        return json.dumps(self.shard_index, indent=2, sort_keys=True) + "\n"


def plan_shards(
    tensors: Mapping[str, torch.Tensor], *, max_shard_size: int | str, total_parameters: int
) -> ShardPlan:
    """Divide tensors among shards as `save_pretrained` does.

    Args:
        tensors: on the meta device, in the order of the state dict.
        max_shard_size: bytes, or a text like "5GB"; a larger tensor gets its own shard.
        total_parameters: noted in the index.

    Raises:
        CheckpointError: max_shard_size cannot be understood, or there are no tensors.
    """
    if not tensors:
        raise CheckpointError("there is no tensor to write")
    try:
        split = split_torch_state_dict_into_shards(dict(tensors), max_shard_size=max_shard_size)
    except ValueError as error:
        raise CheckpointError(f"max_shard_size={max_shard_size!r}: {error}") from None
    places: dict[str, Place] = {}
    headers: dict[str, bytes] = {}
    sizes: dict[str, int] = {}
    for file, names in split.filename_to_tensors.items():
        headers[file], offsets = _header({name: tensors[name] for name in names})
        start = len(headers[file])
        places.update(
            {name: Place(file, start + begin, start + end) for name, (begin, end) in offsets.items()}
        )
        sizes[file] = start + max(end for _, end in offsets.values())
    index = {
        "metadata": {"total_parameters": total_parameters, **split.metadata},
        "weight_map": split.tensor_to_filename,
    }
    return ShardPlan(places, headers, sizes, index if split.is_sharded else None)


def _header(tensors: Mapping[str, torch.Tensor]) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """Header of a file and the places of its tensors, in the library's order: widest dtypes first."""
    order = {dtype: rank for rank, dtype in enumerate(_dtype_order())}
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offsets: dict[str, tuple[int, int]] = {}
    end = 0
    for name in sorted(tensors, key=lambda name: (order[tensors[name].dtype], name)):
        tensor = tensors[name]
        begin, end = end, end + tensor.numel() * tensor.element_size()
        offsets[name] = (begin, end)
        entries[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, offsets


@cache
def _dtype_order() -> list[torch.dtype]:
    """The order in which the installed safetensors library puts dtypes into a file."""
    blob = save({str(dtype): torch.empty(0, dtype=dtype) for dtype in DTYPE_NAMES})
    (length,) = struct.unpack("<Q", blob[:8])
    by_text = {str(dtype): dtype for dtype in DTYPE_NAMES}
    return [by_text[name] for name in json.loads(blob[8 : 8 + length])]


class Journal:
    """What is safely on disk: a file of JSON lines, the first one a fingerprint of the work.

    Args:
        file: path of the journal; made if it does not exist.
        fingerprint: of everything that the output depends on.

    Attributes:
        entries: `{unit of work: its line}` of the lines that are whole.

    Raises:
        CheckpointError: the journal belongs to other work.
    """

    def __init__(self, file: Path, fingerprint: Mapping[str, Any]):
        self.file = file
        self.entries: dict[str, dict[str, Any]] = {}
        lines, whole_bytes = _whole_lines(file)
        if lines and lines[0] != fingerprint:
            changed = [key for key in fingerprint if lines[0].get(key) != fingerprint[key]]
            raise CheckpointError(
                f"{file.parent}: cannot resume, because this has changed since the run began: "
                f"{', '.join(changed) or 'the format of the journal'}; delete the folder to start again"
            )
        self._stream = open(file, "ab")  # open as long as the run
        self._stream.truncate(whole_bytes)
        if not lines:
            self._append(dict(fingerprint))
        for line in lines[1:]:
            self.entries[line["unit"]] = line

    def add(self, unit: str, entry: Mapping[str, Any]) -> None:
        """Note that a unit of work is done; returns when the note is on disk."""
        line = {"unit": unit, **entry}
        self._append(line)
        self.entries[unit] = line

    def _append(self, line: dict[str, Any]) -> None:
        self._stream.write(json.dumps(line).encode() + b"\n")
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


def _whole_lines(file: Path) -> tuple[list[dict[str, Any]], int]:
    """The lines up to the first that a kill or a damaged disk cut short, and their size."""
    if not file.exists():
        return [], 0
    lines, size = [], 0
    for raw in file.read_bytes().splitlines(keepends=True):
        try:
            line = json.loads(raw)
        except ValueError:
            break
        if not raw.endswith(b"\n") or not isinstance(line, dict):
            break
        lines.append(line)
        size += len(raw)
    return lines, size


class ShardWriter:
    """Writes the tensors of a plan into their places.

    A shard has a temporary name until its last tensor is on disk.

    Args:
        folder: where the shards go; exists.
        plan: of the shards.
        journal: of the work; tensors that it notes and that are on disk unharmed count as done.
    """

    def __init__(self, folder: Path, plan: ShardPlan, journal: Journal):
        self.folder = folder
        self.plan = plan
        self.journal = journal
        self._prepared: set[str] = set()
        self._missing: dict[str, set[str]] = {file: set() for file in plan.sizes}
        for name, place in plan.places.items():
            self._missing[place.file].add(name)
        for unit, entry in list(journal.entries.items()):
            if self._is_unharmed(entry["crc32"]):
                self._mark_done(entry["crc32"])
            else:
                del journal.entries[unit]

    def write(self, unit: str, tensors: Mapping[str, torch.Tensor], note: Mapping[str, Any]) -> None:
        """Write the tensors of one unit of work and note it in the journal.

        Args:
            unit: name of the unit.
            tensors: its tensors, as planned.
            note: what else the journal shall keep of the unit.

        Raises:
            CheckpointError: a tensor does not have the planned size, or the disk is full.
        """
        checksums = {}
        files = {self.plan.places[name].file for name in tensors}
        try:
            for file in sorted(files):
                with self._open(file) as descriptor:
                    for name, tensor in tensors.items():
                        place = self.plan.places[name]
                        if place.file == file:
                            checksums[name] = _write_tensor(descriptor, name, tensor, place)
        except OSError as error:
            raise CheckpointError(
                f"{self.folder}: cannot write {unit!r}: {error.strerror}; the work so far is kept, free some "
                "space and resume"
            ) from error
        self.journal.add(unit, {"crc32": checksums, **note})
        self._mark_done(checksums)

    def read(self, name: str) -> torch.Tensor:
        """A tensor that is on disk already.

        Args:
            name: of the tensor.
        """
        path = self._path(self.plan.places[name].file)
        assert path is not None
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name)

    def missing(self) -> list[str]:
        """Planned tensors that are not on disk yet."""
        return [name for names in self._missing.values() for name in sorted(names)]

    @contextmanager
    def _open(self, file: str) -> Iterator[int]:
        """A descriptor of the shard, with header and full size in place; synced when left."""
        finished = self.folder / file
        path = finished if finished.exists() else self.folder / (file + UNFINISHED_SUFFIX)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if file not in self._prepared:
                # Always, once a run: that the file has its size does not say that its header was written.
                _write_all(descriptor, memoryview(self.plan.headers[file]), 0)
                os.ftruncate(descriptor, self.plan.sizes[file])
                self._prepared.add(file)
            yield descriptor
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _mark_done(self, names: Iterable[str]) -> None:
        for name in names:
            file = self.plan.places[name].file
            self._missing[file].discard(name)
            unfinished = self.folder / (file + UNFINISHED_SUFFIX)
            if not self._missing[file] and unfinished.exists():
                os.replace(unfinished, self.folder / file)
                sync_folder(self.folder)

    def _is_unharmed(self, checksums: Mapping[str, int]) -> bool:
        return all(
            name in self.plan.places and self._checksum(self.plan.places[name]) == checksum
            for name, checksum in checksums.items()
        )

    def _checksum(self, place: Place) -> int | None:
        path = self._path(place.file)
        if path is None:
            return None
        checksum, position = 0, place.begin
        with open(path, "rb") as stream:
            stream.seek(position)
            while position < place.end and (block := stream.read(min(_READ_BYTES, place.end - position))):
                checksum = zlib.crc32(block, checksum)
                position += len(block)
        return checksum if position == place.end else None

    def _path(self, file: str) -> Path | None:
        """Where a shard lies, finished or not."""
        paths = (self.folder / file, self.folder / (file + UNFINISHED_SUFFIX))
        return next((path for path in paths if path.exists()), None)


def write_text(file: Path, text: str) -> None:
    """Write a text file so that it is either absent or whole."""
    unfinished = file.with_name(file.name + UNFINISHED_SUFFIX)
    with open(unfinished, "w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(unfinished, file)


def write_index(folder: Path, plan: ShardPlan) -> None:
    """Write the index of a checkpoint that has several shards."""
    if plan.shard_index is not None:
        write_text(folder / INDEX_NAME, plan.index_text())


def sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a power cut (where the system can open folders)."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_tensor(descriptor: int, name: str, tensor: torch.Tensor, place: Place) -> int:
    """Write one tensor; returns the CRC-32 of its bytes."""
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    if len(data) != place.end - place.begin:
        raise CheckpointError(
            f"{name}: {tensor.dtype} {list(tensor.shape)} takes {len(data)} bytes, {place.end - place.begin} "
            "were planned"
        )
    _write_all(descriptor, data, place.begin)
    return zlib.crc32(data)


def _write_all(descriptor: int, data: memoryview, position: int) -> None:
    """Write at a position; one call of the system may take less than it is given (at most 2 GB)."""
    while data:
        written = os.pwrite(descriptor, data, position)
        data = data[written:]
        position += written
