"""`hadacore tune`."""

from pathlib import Path
from typing import Annotated

import typer

from .report_errors import reports_errors


@reports_errors
def tune(
    file: Annotated[str, typer.Argument(help="JSON to write; HADACORE_TUNING=FILE uses it.")],
    shape: Annotated[
        list[str], typer.Option(metavar="NxK", help="Outputs x inputs of a weight; repeatable.")
    ],
    tokens: Annotated[
        list[int] | None, typer.Option(min=1, help="Tokens of a product; repeatable. Default: 1 to 1024.")
    ] = None,
    group_size: Annotated[int, typer.Option(help="Inputs that share a scale.")] = 128,
) -> None:
    """Measure the fastest schedules of the int4 kernels on this GPU, for shapes that matter to you."""
    from ..kernels.w4a16_schedules import write_table
    from ..kernels.w4a16_tune import DEFAULT_TOKENS
    from ..kernels.w4a16_tune import about as about_this_machine
    from ..kernels.w4a16_tune import tune as measure

    schedules = measure(
        [_parse_shape(text) for text in shape], tokens or DEFAULT_TOKENS, group_size=group_size
    )
    write_table(Path(file), schedules, about_this_machine())
    typer.echo(f"{file}: {len(schedules)} schedules; set HADACORE_TUNING={file} to use them")


def _parse_shape(text: str) -> tuple[int, int]:
    """``NxK`` as a pair."""
    n, _, k = text.partition("x")
    if not (n.isdecimal() and k.isdecimal()):
        raise typer.BadParameter(f"{text!r} is not NxK, e.g. 4096x14336", param_hint="--shape")
    return int(n), int(k)
