"""Calibration data: text of a file or a hub dataset as windows of tokens, all of one length.

The `datasets` library streams the rows, so nothing is copied to a cache and no more is read than needed.
"""

import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..errors import CalibrationError
from ..text_windows import bos_token, parse_dataset, window_starts

_BUILDERS = {".txt": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
_DATASET = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?(:[^:]*){0,2}")
_TEXT_COLUMNS = ("text", "content")
_MESSAGE_COLUMNS = ("messages", "conversations")
_SHUFFLE_ROWS = 10_000
_BETWEEN_DOCUMENTS = "\n\n"


@dataclass(frozen=True)
class Calibration:
    """What a model is shown while it is quantized.

    Rows are shuffled, and their texts joined by blank lines until there are enough tokens; samples are cut
    from them without overlap, spread evenly. A .txt file is a single text. Every sample begins with the
    token that the tokenizer puts before a text, if it does.

    Attributes:
        source: a .txt, .json, .jsonl, .parquet or .csv file, or a hub dataset ``name[:config[:split]]``; the
            split is "train" unless given.
        samples: how many sequences.
        sequence_length: tokens of each. All tokens attend to the first of a sequence, so what it becomes
            matters to all; as many tokens in shorter samples have more of it (docs/benchmarks.md, Quality).
        column: holds the text; None finds it.
        chat_template: the column holds conversations, lists of messages with role and content, which the
            tokenizer's chat template turns into text.
        seed: of the shuffling.
    """

    source: str | os.PathLike[str]
    samples: int = 512
    sequence_length: int = 512
    column: str | None = None
    chat_template: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for option, least in (("samples", 1), ("sequence_length", 2)):
            value = getattr(self, option)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise CalibrationError(f"{option} must be an integer of at least {least}, got {value!r}")

    @property
    def title(self) -> str:
        """The source without the folders of this machine: a file's name, or the dataset's."""
        return Path(self.source).name if _is_file(self.source) else os.fspath(self.source)


def calibration_tokens(calibration: Calibration, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """The samples of a calibration.

    Args:
        calibration: says where from and how many.
        tokenizer: the model's.

    Returns:
        int64 ``[samples, sequence_length]``; the same every time.

    Raises:
        CalibrationError: the data cannot be read, has no text in the column, or not enough of it.
    """
    bos = bos_token(tokenizer)
    prefix = [] if bos is None else [bos]
    length = calibration.sequence_length - len(prefix)
    ids: list[int] = []
    for text in _texts(calibration, tokenizer):
        ids += tokenizer(text + _BETWEEN_DOCUMENTS, add_special_tokens=False, verbose=False).input_ids
        if len(ids) >= calibration.samples * length:
            break
    most = len(ids) // length
    if most < calibration.samples:
        raise CalibrationError(
            f"{calibration.title}: {len(ids)} tokens give {most} samples of {calibration.sequence_length}, "
            f"{calibration.samples} were asked for; use more text, or fewer or shorter samples"
        )
    starts = window_starts(most, calibration.samples, length)
    return torch.tensor([prefix + ids[start : start + length] for start in starts])


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint.

    Args:
        folder: local checkpoint.

    Raises:
        CalibrationError: it has none that transformers can read; its own code is never run.
    """
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # hostile files fail in many ways
        raise CalibrationError(
            f"{folder}: calibration text needs a tokenizer, and transformers cannot read one here: {error}"
        ) from error


def digest(tokens: torch.Tensor) -> str:
    """SHA-256 of token ids, as hexadecimal text."""
    return hashlib.sha256(tokens.to("cpu", torch.int64).contiguous().numpy().tobytes()).hexdigest()


def _texts(calibration: Calibration, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    column = calibration.column
    for row in _rows(calibration):
        if column is None:
            column = _find_column(row, calibration)
        if column not in row:
            raise CalibrationError(
                f"{calibration.title}: has no column {column!r}; its columns are {_listed(row)}"
            )
        value = row[column]
        if value is None:
            continue
        if calibration.chat_template:
            yield _apply_chat_template(value, column, calibration, tokenizer)
        elif isinstance(value, str):
            yield value
        else:
            raise CalibrationError(
                f"{calibration.title}: column {column!r} holds {type(value).__name__}, not text; for "
                "conversations use chat_template=True (--chat-template)"
            )


def _rows(calibration: Calibration) -> Iterator[dict[str, Any]]:
    from datasets import load_dataset  # slow to import, and only calibration needs it

    try:
        rows = load_dataset(**_loading_options(calibration), streaming=True)
        yield from rows.shuffle(seed=calibration.seed, buffer_size=_SHUFFLE_ROWS)
    except CalibrationError:
        raise
    except Exception as error:  # damaged files and a missing network fail in many ways
        what = str(error) or type(error).__name__
        raise CalibrationError(f"{calibration.title}: cannot be read: {what}") from error


def _loading_options(calibration: Calibration) -> dict[str, Any]:
    """The arguments of `datasets.load_dataset`."""
    source = os.fspath(calibration.source)
    suffix = Path(source).suffix.lower()
    if Path(source).is_dir():
        raise CalibrationError(f"{calibration.title}: is a folder; name a file or a hub dataset")
    if suffix in _BUILDERS:
        if not Path(source).is_file():
            raise CalibrationError(f"{source}: there is no such file")
        options = {"path": _BUILDERS[suffix], "data_files": source, "split": "train"}
        return {**options, "sample_by": "document"} if suffix == ".txt" else options
    if Path(source).is_file() or not _DATASET.fullmatch(source):
        raise CalibrationError(
            f"{source}: is neither a file that ends in {', '.join(_BUILDERS)} nor a hub dataset "
            "name[:config[:split]]"
        )
    name, config, split = parse_dataset(source)
    return {"path": name, "name": config, "split": split or "train"}


def _find_column(row: dict[str, Any], calibration: Calibration) -> str:
    names = _MESSAGE_COLUMNS if calibration.chat_template else _TEXT_COLUMNS
    texts = [name for name, value in row.items() if isinstance(value, str)]
    found = [name for name in names if name in row]
    if found:
        return found[0]
    if len(texts) == 1 and not calibration.chat_template:
        return texts[0]
    raise CalibrationError(
        f"{calibration.title}: which column is the text? None is called {' or '.join(names)}; its columns "
        f"are {_listed(row)}"
    )


def _apply_chat_template(
    messages: Any, column: str, calibration: Calibration, tokenizer: PreTrainedTokenizerBase
) -> str:
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # templates raise whatever they like
        raise CalibrationError(
            f"{calibration.title}: the chat template cannot be applied to column {column!r}: {error}"
        ) from error
    assert isinstance(text, str)
    # Samples get it from `calibration_tokens`.
    return text.removeprefix(str(tokenizer.bos_token or ""))


def _is_file(source: str | os.PathLike[str]) -> bool:
    return Path(source).suffix.lower() in _BUILDERS or Path(source).exists()


def _listed(row: dict[str, Any]) -> str:
    return ", ".join(map(repr, row)) or "none"
