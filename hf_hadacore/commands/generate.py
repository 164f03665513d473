"""`hadacore generate`."""

import sys
import time
from typing import Annotated, Any

import typer

from ..errors import CheckpointError
from .report_errors import reports_errors


@reports_errors
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
    from transformers import TextStreamer

    from ..pretrained import load_pretrained

    model: Any
    model, tokenizer = load_pretrained(folder, device=device, attention=attention)
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
