"""What tables and plots are made of: results as benchmarks wrote them, blocks of Markdown, their source."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"

BLOCKS: dict[str, Callable[[], str]] = {}


class FiguresError(Exception):
    """The documents and the functions do not fit together, or results are missing."""


def block(function: Callable[[], str]) -> Callable[[], str]:
    """Make a function the source of the documents' block of the same name."""
    BLOCKS[function.__name__] = function
    return function


def read_results(name: str) -> dict[str, Any]:
    """The results that a benchmark wrote to `scripts/results/NAME.json`.

    Raises:
        FiguresError: there are none.
    """
    file = RESULTS / f"{name}.json"
    if not file.is_file():
        raise FiguresError(f"scripts/results/{file.name} is missing; run the benchmark that writes it")
    return json.loads(file.read_text("utf-8"))


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table: text in the first column, figures in the others."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def source(result: dict[str, Any]) -> str:
    """Where, when, with what and how figures were measured, and what else is to be said of them."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    note = f" {result['note']}" if "note" in result else ""
    return f"{result['device']}; {versions}; {result['date']}: `{result['command']}`{note}"
