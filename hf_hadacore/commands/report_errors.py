"""What a user sees of this package's errors on the command line."""

import functools
import os
from collections.abc import Callable
from typing import Any

import typer

from ..errors import HadaCoreError

DEBUG_VARIABLE = "HADACORE_DEBUG"


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
