"""The tables and plots of README and docs, from the committed results.

    python scripts/make_figures.py            # fill them in
    python scripts/make_figures.py --check    # fail if the documents do not say what the results say

A table stands between `<!-- figures:NAME -->` and `<!-- /figures:NAME -->`, and is what the function NAME of
a module `figure_…` returns. To add one, write a function with `@block` that reads its results with
`read_results`, and put the two comments into a document.
"""

import re
from pathlib import Path
from typing import Annotated

import figure_attention  # noqa: F401  # fills BLOCKS
import figure_hadamard  # noqa: F401
import figure_models  # noqa: F401
import figure_parallel  # noqa: F401
import figure_tables  # noqa: F401
import typer
from figure_plots import PLOTS, is_current, write_plot
from figures import BLOCKS, FiguresError

ROOT = Path(__file__).parents[1]
DOCUMENTS = tuple(ROOT / name for name in ("README.md", "docs/benchmarks.md", "docs/attention.md"))
_MARKERS = re.compile(r"(<!-- figures:(\w+) -->\n).*?(<!-- /figures:\2 -->)", re.DOTALL)


def fill(texts: dict[str, str]) -> dict[str, str]:
    """The documents with all their blocks written anew.

    Args:
        texts: by name.

    Raises:
        FiguresError: a block has no function, a function no block, or a closing comment is missing.
    """
    names = []
    for name, text in texts.items():
        found = [match[2] for match in _MARKERS.finditer(text)]
        opened = re.findall(r"<!-- figures:(\w+) -->", text)
        if found != opened:
            raise FiguresError(f"{name}: figures:{next(n for n in opened if n not in found)} is not closed")
        names += found
    if sorted(names) != sorted(BLOCKS):
        raise FiguresError(
            f"the documents have blocks {sorted(names)}, the scripts functions {sorted(BLOCKS)}; "
            "they must be the same"
        )
    return {
        name: _MARKERS.sub(lambda match: f"{match[1]}{BLOCKS[match[2]]()}\n{match[3]}", text)
        for name, text in texts.items()
    }


def main(
    check: Annotated[
        bool, typer.Option("--check", help="Change nothing; fail if anything is stale.")
    ] = False,
) -> None:
    texts = {file.name: file.read_text("utf-8") for file in DOCUMENTS}
    try:
        filled = fill(texts)
        stale = [name for name in texts if filled[name] != texts[name]]
        stale += [f"docs/{name}.svg" for name in PLOTS if not is_current(name)]
    except FiguresError as error:
        raise SystemExit(f"error: {error}") from None
    if check and stale:
        raise SystemExit(f"{', '.join(stale)} stale; run: make figures")
    if not check:
        for file in DOCUMENTS:
            file.write_text(filled[file.name], "utf-8")
        for name in PLOTS:
            if not is_current(name):
                write_plot(name)


if __name__ == "__main__":
    typer.run(main)
