"""`hadacore card`."""

from typing import Annotated

import typer

from .report_errors import reports_errors


@reports_errors
def card(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="Folder of an int4 checkpoint.")],
    evaluation: Annotated[
        list[str] | None,
        typer.Option(
            metavar="JSON",
            help="Written by hadacore evaluate --json; repeatable. Default: evaluation*.json in DIR.",
        ),
    ] = None,
    repo: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="Where it will be on the Hub.")
    ] = None,
    base_model: Annotated[
        str | None,
        typer.Option(metavar="ID", help="Model it was made from; default: as the quantization report says."),
    ] = None,
    license_id: Annotated[
        str | None,
        typer.Option("--license", metavar="ID", help="As the Hub calls it; default: that of the source."),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace a card that a person has written or changed.")
    ] = False,
) -> None:
    """Write the model card of a checkpoint, DIR/README.md, from what was measured."""
    from ..publishing.model_card import write_card

    file = write_card(
        folder,
        evaluations=evaluation,
        repo_id=repo,
        base_model=base_model,
        license_id=license_id,
        force=force,
    )
    typer.echo(str(file))
