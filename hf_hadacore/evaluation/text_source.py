"""Text to evaluate on: a file, a dataset, or what every Python carries."""

import hashlib
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

from ..errors import EvaluationError
from ..text_windows import parse_dataset

_BETWEEN_DOCUMENTS = "\n\n"


class Text(NamedTuple):
    """A text.

    Attributes:
        name: without the folders of this machine.
        content: all of it.
    """

    name: str
    content: str

    @property
    def sha256(self) -> str:
        """Of its UTF-8 form, as hexadecimal digits."""
        return hashlib.sha256(self.content.encode()).hexdigest()


def read_text(source: str | None) -> Text:
    """Read a text.

    Args:
        source: a file in UTF-8, or a dataset ``name[:config[:split]]`` of the Hub, of whose "text" column all
            rows are joined by empty lines; its split is "test" unless given. None takes Python's own
            documentation, English technical prose that needs no download.

    Raises:
        EvaluationError: there is no such file or dataset, or it has no text.
    """
    if source is None:
        return Text("Python's documentation", "\n".join(topics[name] for name in sorted(topics)))
    file = Path(source)
    if file.is_file():
        try:
            return Text(file.name, file.read_text("utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise EvaluationError(f"{source}: cannot be read as text: {error}") from None
    return Text(source, _read_dataset(source))


def _read_dataset(source: str) -> str:
    from datasets import load_dataset  # slow to import, and seldom needed

    name, config, split = parse_dataset(source)
    try:
        rows = load_dataset(name, config, split=split or "test")
    except Exception as error:  # missing networks and damaged files fail in many ways
        raise EvaluationError(
            f"{source}: is neither a file nor a dataset that can be had: {' '.join(str(error).split())}"
        ) from error
    if "text" not in rows.column_names:
        raise EvaluationError(f"{source}: has no column 'text', but {', '.join(rows.column_names)}")
    return _BETWEEN_DOCUMENTS.join(rows["text"])
