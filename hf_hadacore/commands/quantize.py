"""`hadacore quantize`."""

from typing import Annotated, Any

import typer

from ..errors import HubError
from .report_errors import reports_errors, tells_how_to_resume


@reports_errors
def quantize(
    src: Annotated[
        str, typer.Argument(help="Folder of a full-precision checkpoint, or a model id on the Hub.")
    ],
    dst: Annotated[str, typer.Argument(help="Folder to make; must not exist.")],
    method: Annotated[
        str, typer.Option(help="rtn: round to nearest; gptq: with calibration data, better and slower.")
    ] = "rtn",
    group_size: Annotated[
        int, typer.Option(help="Inputs that share a scale: 32, 64, 128, or -1 for a row.")
    ] = 128,
    symmetric: Annotated[
        bool, typer.Option("--symmetric/--asymmetric", help="Fix the zero point, or store one per group.")
    ] = False,
    skip: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Module to leave in full precision; repeatable.")
    ] = None,
    override: Annotated[
        list[str] | None,
        typer.Option(
            metavar="REGEX:OPTION=VALUE,...",
            help="Options of modules, e.g. 'down_proj:group_size=64,symmetric=true'; repeatable.",
        ),
    ] = None,
    quantize_lm_head: Annotated[
        bool, typer.Option("--quantize-lm-head", help="Quantize the output head.")
    ] = False,
    attention: Annotated[
        str | None, typer.Option(metavar="MODE", help="8-bit attention by default: fp8 or int8-fp8.")
    ] = None,
    act_order: Annotated[
        str | None,
        typer.Option(
            metavar="ORDER",
            help="Order in which gptq quantizes columns: none, static or permuted; default: static.",
        ),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            help="For gptq: a .txt, .json, .jsonl, .parquet or .csv file, or a hub dataset "
            "name[:config[:split]].",
        ),
    ] = None,
    samples: Annotated[int, typer.Option(help="Calibration samples.")] = 512,
    sequence_length: Annotated[int, typer.Option(help="Tokens of a calibration sample.")] = 512,
    column: Annotated[
        str | None, typer.Option(help="Column of the calibration text; default: found by its name.")
    ] = None,
    chat_template: Annotated[
        bool, typer.Option("--chat-template", help="Calibrate on conversations, by the chat template.")
    ] = False,
    rotate: Annotated[
        str,
        typer.Option(
            metavar="KIND",
            help="Hadamard rotations folded into the weights: none, r1 (residual stream), r2 (heads' values)"
            ", r1r2, or auto: for gptq what the model allows, for rtn none.",
        ),
    ] = "auto",
    dtype: Annotated[
        str | None, typer.Option(help="Of scales and unquantized weights; default: the checkpoint's.")
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file.")] = "5GB",
    resume: Annotated[bool, typer.Option("--resume", help="Continue a run that was interrupted.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: the GPU if there is one.")] = None,
    push: Annotated[
        str | None,
        typer.Option(
            metavar="REPO", help="Then do as `hadacore push DST REPO`; a repository that is made is private."
        ),
    ] = None,
) -> None:
    """Quantize a checkpoint on disk, layer by layer."""
    overrides = dict(_parse_override(text) for text in override or ())
    from ..config import HadaCoreConfig
    from ..inspection import format_size
    from ..offline.calibration import Calibration
    from ..offline.checkpoint import quantize_checkpoint
    from ..publishing.hub import push as push_folder
    from ..publishing.hub import require_token

    config = HadaCoreConfig(
        method=method,
        act_order=_parse_act_order(act_order, method),
        group_size=group_size,
        symmetric=symmetric,
        modules_to_not_convert=skip,
        overrides=overrides,
        quantize_lm_head=quantize_lm_head,
        attention=attention,
    )
    if push is not None:
        require_token()
    with tells_how_to_resume():
        report = quantize_checkpoint(
            src,
            dst,
            config,
            dtype=dtype,
            max_shard_size=max_shard_size,
            resume=resume,
            device=device,
            rotation=rotate,
            calibration=None
            if calibration is None
            else Calibration(
                calibration, samples, sequence_length, column=column, chat_template=chat_template
            ),
        )
    typer.echo(
        f"{dst}: {format_size(report['quantized_bytes'])} ({report['size_ratio']:.1%} of the source), "
        f"{len(report['layers'])} int4 weights, {report['quantized_share']:.1%} of the parameters"
    )
    if push is not None:
        try:
            typer.echo(push_folder(dst, push))
        except HubError:
            typer.secho(f"{dst} is complete; hadacore push {dst} {push} sends it", err=True)
            raise


def _parse_act_order(text: str | None, method: str) -> str | bool:
    """What `HadaCoreConfig` calls it; without a choice gptq gets the order that it calls True."""
    if text is None:
        return method == "gptq"
    return False if text == "none" else text


def _parse_override(text: str) -> tuple[str, dict[str, Any]]:
    """``REGEX:group_size=64,symmetric=true`` as a pair for `HadaCoreConfig.overrides`."""
    pattern, _, options = text.rpartition(":")
    pairs = [option.partition("=") for option in options.split(",")]
    if not pattern or not all(name and value for name, _, value in pairs):
        raise typer.BadParameter(f"{text!r} is not REGEX:OPTION=VALUE,...", param_hint="--override")
    return pattern, {name.strip(): _parse_value(value.strip()) for name, _, value in pairs}


def _parse_value(text: str) -> Any:
    """true, false or an integer; anything else stays a text, which the config then refuses by name."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return int(text)
    except ValueError:
        return text
