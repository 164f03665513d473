"""What a user sees of this package's errors on the command line."""

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer

from ..errors import HadaCoreError

DEBUG_VARIABLE = "HADACORE_DEBUG"

_INTERRUPTED = 130  # what shells report of a command that was ended by ctrl-C


def reports_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Turn the errors of this package into one line and exit code 1."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except HadaCoreError as error:
            if os.environ.get(DEBUG_VARIABLE, "0") not in ("", "0"):
                raise
            typer.secho(f"error: {error}", fg=typer.colors.RED, err=True)
            raise typer.Exit(1) from None

    return wrapped


@contextmanager
def tells_how_to_resume() -> Iterator[None]:
    """Turn ctrl-C into one line that says how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        typer.secho("interrupted; the same command with --resume continues", fg=typer.colors.RED, err=True)
        raise typer.Exit(_INTERRUPTED) from None
