"""A checkpoint folder that appears whole or not at all, made by a run that can be continued after a kill.

All work happens in `DST.partial`, which never loads as a checkpoint: its shards lie in a subfolder that
gets its config.json last of all, and that is then renamed to DST in one step.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock

from ..errors import CheckpointError
from ..integrity import INDEX_NAME, TensorInfo, checkpoint_files, verify_files
from .shard_writer import Journal, ShardPlan, ShardWriter, sync_folder, write_index, write_text

REPORT_NAME = "quantization_report.json"
PARTIAL_SUFFIX = ".partial"
COPIED_SUFFIXES = (".json", ".model", ".txt", ".jinja", ".tiktoken")
COPIED_NAMES = ("LICENSE*", "NOTICE*", "USE_POLICY*")

_TEMPLATES_FOLDER = "additional_chat_templates"
_SAMPLE_BYTES = 4096


class Staging:
    """A checkpoint in the making.

    Args:
        dst: the folder to make.
        resume: continue a run that was interrupted.

    Attributes:
        target: the folder to make, as an absolute path.
        partial: where the work happens.
        folder: the subfolder that becomes the target.
    """

    def __init__(self, dst: str | os.PathLike[str], *, resume: bool = False):
        self.target = Path(os.path.abspath(dst))
        self.partial = self.target.parent / (self.target.name + PARTIAL_SUFFIX)
        self.folder = self.partial / "checkpoint"
        self._resume = resume

    def finish_renamed(self) -> dict[str, Any] | None:
        """Clean up after a run that ended between the rename of its result and the removal of its journal.

        Returns:
            Its report; None if there is no such run to resume.
        """
        was_renamed = (
            self._resume
            and (self.target / REPORT_NAME).is_file()
            and self.partial.is_dir()
            and not self.folder.exists()
        )
        if not was_renamed:
            return None
        shutil.rmtree(self.partial)
        return json.loads((self.target / REPORT_NAME).read_text("utf-8"))

    def check(self) -> None:
        """Check that the target can be made.

        Raises:
            CheckpointError: it exists, cannot be replaced by a rename, or an unfinished run is in the way.
        """
        target, partial = self.target, self.partial
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise CheckpointError(f"{target}: exists already; nothing is overwritten, choose another folder")
        if target.is_symlink() or target.is_mount():
            raise CheckpointError(f"{target}: is a link or a mount point, which no rename can replace")
        if partial.exists() and not self._resume:
            raise CheckpointError(
                f"{partial}: holds an unfinished run; continue it with resume=True (--resume) or delete "
                "the folder"
            )

    def check_is_outside(self, source: Path) -> None:
        """Check that the target does not lie in the source.

        Raises:
            CheckpointError: it does.
        """
        resolved = self.target.resolve()
        if source.resolve() in (resolved, *resolved.parents):
            raise CheckpointError(
                f"{self.target}: lies in the source {source}; choose a folder outside of it"
            )

    @contextmanager
    def open(self, plan: ShardPlan, fingerprint: Mapping[str, Any]) -> Iterator[ShardWriter]:
        """The writer of the shards, with what an interrupted run has left; no other process may work here.

        Args:
            plan: of the shards.
            fingerprint: everything that the output depends on; the keys are what a user reads when it
                has changed since the run began.

        Raises:
            CheckpointError: the folder cannot be made, belongs to other work or to another process, or
                the disk is too small.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"{self.folder}: cannot be made: {error.strerror}") from error
        with self._sole_user():
            journal = Journal(self.partial / "journal.jsonl", fingerprint)
            try:
                writer = ShardWriter(self.folder, plan, journal)
                self._check_space(plan, writer)
                yield writer
            finally:
                journal.close()

    @contextmanager
    def _sole_user(self) -> Iterator[None]:
        try:
            with filelock.FileLock(self.partial / "lock", timeout=0):
                yield
        except filelock.Timeout:
            raise CheckpointError(f"{self.partial}: another process is working on it") from None

    def _check_space(self, plan: ShardPlan, writer: ShardWriter) -> None:
        needed = sum(plan.places[name].end - plan.places[name].begin for name in writer.missing())
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise CheckpointError(
                f"{self.folder}: the disk has {free / 1e9:.1f} GB left, {needed / 1e9:.1f} GB more are needed"
            )

    def copy_small_files(self, source: Path) -> None:
        """Copy the source's tokenizer, processor and generation files, templates and licenses."""
        for file in small_files(source):
            copy = self.folder / file.relative_to(source)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, copy)

    def describe(self, plan: ShardPlan, report: Mapping[str, Any], config: str) -> None:
        """Write what belongs to the shards; config.json last, because without it nothing loads.

        Args:
            plan: of the shards, which are all written.
            report: goes to `REPORT_NAME`.
            config: text of config.json.

        Raises:
            CheckpointError: the shards are not what was planned.
        """
        verify_files(self.folder / name for name in plan.sizes)
        write_text(self.folder / REPORT_NAME, json.dumps(report, indent=2) + "\n")
        write_index(self.folder, plan)
        checkpoint_files(self.folder)
        write_text(self.folder / "config.json", config)

    def publish(self) -> None:
        """Give the finished checkpoint its name."""
        sync_folder(self.folder)
        os.replace(self.folder, self.target)
        sync_folder(self.target.parent)
        shutil.rmtree(self.partial)


def digest_of_weights(headers: Mapping[str, TensorInfo]) -> str:
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


def small_files(folder: Path) -> Iterator[Path]:
    """Tokenizer, processor and generation files, chat templates and licenses; no weights, no code.

    Args:
        folder: a checkpoint. What is written anew for every checkpoint, like its config.json, is left out.
    """
    for file in sorted(folder.iterdir()):
        wanted = file.suffix in COPIED_SUFFIXES or any(file.match(pattern) for pattern in COPIED_NAMES)
        is_ours = file.name in ("config.json", INDEX_NAME, REPORT_NAME)
        is_hidden = file.name.startswith(".")
        if wanted and file.is_file() and not (is_ours or is_hidden or file.name.endswith(".index.json")):
            yield file
    yield from sorted(folder.glob(f"{_TEMPLATES_FOLDER}/*.jinja"))
