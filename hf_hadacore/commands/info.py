"""`hadacore info`."""

import json
from typing import Annotated

import typer

from .report_errors import reports_errors


@reports_errors
def info(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="Folder of a checkpoint.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what is in a checkpoint; reads headers only."""
    from ..inspection import describe, inspect_checkpoint

    summary = inspect_checkpoint(folder)
    typer.echo(json.dumps(summary, indent=2) if as_json else describe(summary))
