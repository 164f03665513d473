"""`hadacore push`."""

from typing import Annotated

import typer

from .report_errors import reports_errors


@reports_errors
def push(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="Folder of an int4 checkpoint.")],
    repo: Annotated[
        str, typer.Argument(metavar="REPO", help="OWNER/NAME on the Hub, or NAME in your own namespace.")
    ],
    private: Annotated[
        bool | None,
        typer.Option(
            "--private/--public",
            help="Who can see a repository that is made; default: private. One that exists stays as it is.",
        ),
    ] = None,
    revision: Annotated[
        str | None, typer.Option(metavar="BRANCH", help="Branch, made if it does not exist; default: main.")
    ] = None,
    create_pr: Annotated[
        bool, typer.Option("--create-pr", help="Open a pull request instead of committing.")
    ] = False,
    message: Annotated[str | None, typer.Option(help="First line of the commit.")] = None,
) -> None:
    """Upload an int4 checkpoint to the Hub in a single commit; the same command continues an interrupted one.

    The token is that of `hf auth login` or HF_TOKEN.
    """
    from ..publishing.hub import DEFAULT_MESSAGE
    from ..publishing.hub import push as push_folder

    typer.echo(
        push_folder(
            folder,
            repo,
            private=private,
            revision=revision,
            create_pr=create_pr,
            commit_message=message or DEFAULT_MESSAGE,
        )
    )
