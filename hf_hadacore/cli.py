"""The `hadacore` command."""

from typing import Annotated

import typer

from ._version import __version__
from .commands.card import card
from .commands.convert import export, import_
from .commands.evaluate import evaluate
from .commands.generate import generate
from .commands.info import info
from .commands.push import push
from .commands.quantize import quantize
from .commands.tune import tune

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="int4 weights and rotated 8-bit attention for Hugging Face Transformers.",
)
for command in (quantize, info, generate, evaluate, card, push, export, tune):
    app.command()(command)
app.command("import")(import_)


def main() -> None:
    """Entry point of the `hadacore` command."""
    app()


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"hadacore {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass
