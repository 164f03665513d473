"""The `hadacore` command: quantize, info, generate."""

import functools
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Annotated, Any

import typer

from ._version import __version__
from .errors import HadaCoreError

DEBUG_VARIABLE = "HADACORE_DEBUG"

_INTERRUPTED = 130  # what shells report of a command that was ended by ctrl-C

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="int4 weights and rotated 8-bit attention for Hugging Face Transformers.",
)


def main() -> None:
    """Entry point of the `hadacore` command."""
    app()


def _reports_errors(command: Callable[..., None]) -> Callable[..., None]:
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


@app.command()
@_reports_errors
def quantize(
    src: Annotated[
        str, typer.Argument(help="Folder of a full-precision checkpoint, or a model id on the Hub.")
    ],
    dst: Annotated[str, typer.Argument(help="Folder to make; must not exist.")],
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
    dtype: Annotated[
        str | None, typer.Option(help="Of scales and unquantized weights; default: the checkpoint's.")
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file.")] = "5GB",
    resume: Annotated[bool, typer.Option("--resume", help="Continue a run that was interrupted.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: the GPU if there is one.")] = None,
) -> None:
    """Quantize a checkpoint on disk, layer by layer."""
    overrides = dict(_parse_override(text) for text in override or ())
    from .checkpoint import quantize_checkpoint
    from .config import HadaCoreConfig
    from .inspection import format_size

    config = HadaCoreConfig(
        group_size=group_size,
        symmetric=symmetric,
        modules_to_not_convert=skip,
        overrides=overrides,
        quantize_lm_head=quantize_lm_head,
        attention=attention,
    )
    try:
        report = quantize_checkpoint(
            src, dst, config, dtype=dtype, max_shard_size=max_shard_size, resume=resume, device=device
        )
    except KeyboardInterrupt:
        typer.secho("interrupted; the same command with --resume continues", fg=typer.colors.RED, err=True)
        raise typer.Exit(_INTERRUPTED) from None
    typer.echo(
        f"{dst}: {format_size(report['quantized_bytes'])} ({report['size_ratio']:.1%} of the source), "
        f"{len(report['layers'])} int4 weights, {report['quantized_share']:.1%} of the parameters"
    )


@app.command()
@_reports_errors
def info(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="Folder of a checkpoint.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what is in a checkpoint; reads headers only."""
    from .inspection import describe, inspect_checkpoint

    summary = inspect_checkpoint(folder)
    typer.echo(json.dumps(summary, indent=2) if as_json else describe(summary))


@app.command()
@_reports_errors
def generate(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="Folder of a checkpoint, or a model id.")],
    prompt: Annotated[str, typer.Argument(help="What to continue or to answer.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 256,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="Of sampling; 0 takes the likeliest token.")
    ] = 0.0,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: the GPU if there is one.")] = None,
    attention: Annotated[
        str | None,
        typer.Option(metavar="MODE", help="fp8 or int8-fp8 for 8-bit attention; default: the checkpoint's."),
    ] = None,
    chat: Annotated[
        bool | None, typer.Option("--chat/--no-chat", help="Use the chat template; default: if there is one.")
    ] = None,
) -> None:
    """Generate text and stream it; the speed goes to stderr."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

    from .attention_interface import ATTENTION_NAMES
    from .checkpoint import find_source
    from .errors import CheckpointError

    if attention not in (None, *ATTENTION_NAMES):
        raise typer.BadParameter(
            f"{attention!r} is not one of {tuple(ATTENTION_NAMES)}", param_hint="--attention"
        )
    options = {} if attention is None else {"attn_implementation": ATTENTION_NAMES[attention]}
    source = find_source(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        place = device or ("cuda" if torch.cuda.is_available() else "cpu")
        model: Any = AutoModelForCausalLM.from_pretrained(source, device_map={"": place}, **options)
    except (OSError, ValueError) as error:
        if isinstance(error, HadaCoreError):
            raise
        raise CheckpointError(f"{folder}: cannot be loaded: {error}") from error
    use_chat = chat if chat is not None else tokenizer.chat_template is not None
    if use_chat and tokenizer.chat_template is None:
        raise CheckpointError(f"{folder}: the tokenizer has no chat template; use --no-chat")
    inputs: Any
    if use_chat:
        messages = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    inputs = inputs.to(model.device)
    sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature}
    if temperature == 0:
        sampling = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    start = time.perf_counter()
    output = model.generate(
        **inputs,
        **sampling,
        max_new_tokens=max_new_tokens,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
    )
    seconds = time.perf_counter() - start
    tokens = output.shape[-1] - inputs["input_ids"].shape[-1]
    sys.stdout.flush()
    typer.echo(f"{tokens} tokens in {seconds:.2f} s, {tokens / seconds:.1f} tok/s", err=True)


@app.command()
@_reports_errors
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
    from pathlib import Path

    from .kernels.w4a16_schedules import write_table
    from .tune import DEFAULT_TOKENS
    from .tune import about as about_this_machine
    from .tune import tune as measure

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
