"""`hadacore import` and `hadacore export`."""

from typing import Annotated, Any

import typer

from .report_errors import reports_errors, tells_how_to_resume

_Destination = Annotated[str, typer.Argument(help="Folder to make; must not exist.")]
_MaxShardSize = Annotated[str, typer.Option(help="Largest weight file.")]
_Resume = Annotated[bool, typer.Option("--resume", help="Continue a run that was interrupted.")]


@reports_errors
def import_(
    src: Annotated[
        str,
        typer.Argument(help="Folder of a GPTQ, AWQ or compressed-tensors int4 checkpoint, or a model id."),
    ],
    dst: _Destination,
    tensor_parallel: Annotated[
        bool,
        typer.Option(
            "--tensor-parallel",
            help="Store layers in full precision that act-order would keep from being divided among GPUs.",
        ),
    ] = False,
    max_shard_size: _MaxShardSize = "5GB",
    resume: _Resume = False,
) -> None:
    """Convert another library's int4 checkpoint; the weights stay the same, bit for bit."""
    from ..interchange.importing import import_checkpoint

    with tells_how_to_resume():
        report = import_checkpoint(
            src, dst, tensor_parallel=tensor_parallel, max_shard_size=max_shard_size, resume=resume
        )
    typer.echo(_summary(dst, report))
    for name in report.get("act_order", {}).get("not_row_parallel", ()):
        typer.echo(f"cannot be divided among GPUs, see --tensor-parallel: {name}", err=True)


@reports_errors
def export(
    src: Annotated[str, typer.Argument(help="Folder of a hadacore checkpoint, or a model id.")],
    dst: _Destination,
    to: Annotated[str, typer.Option("--format", metavar="FORMAT", help="compressed-tensors.")],
    max_shard_size: _MaxShardSize = "5GB",
    resume: _Resume = False,
) -> None:
    """Convert a hadacore checkpoint to what serving engines load; the weights stay the same, bit for bit."""
    from ..interchange.exporting import EXPORT_FORMATS, export_checkpoint

    if to not in EXPORT_FORMATS:
        raise typer.BadParameter(f"{to!r} is not one of {EXPORT_FORMATS}", param_hint="--format")
    with tells_how_to_resume():
        report = export_checkpoint(src, dst, max_shard_size=max_shard_size, resume=resume)
    typer.echo(_summary(dst, report))


def _summary(dst: str, report: dict[str, Any]) -> str:
    from ..inspection import format_size

    return f"{dst}: {format_size(report['quantized_bytes'])}, {len(report['layers'])} int4 weights"
