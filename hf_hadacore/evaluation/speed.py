"""How fast a model generates, and in how much memory."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from ..errors import EvaluationError

_PROMPT_TOKENS = 128
_NEW_TOKENS = 64
_REPEATS = 3
# Calls that take milliseconds scatter, and are repeated until they have taken this long together.
_LEAST_SECONDS, _MOST_REPEATS = 1.0, 25


class BatchSpeed(NamedTuple):
    """Of `generate` with prompts of one length.

    Attributes:
        batch: sequences.
        tokens_per_second: of all sequences together, the prompts' pass not counted.
        time_to_first_token: in seconds, of that pass.
    """

    batch: int
    tokens_per_second: float
    time_to_first_token: float


class Speed(NamedTuple):
    """The result of `measure_speed`.

    Attributes:
        prompt_tokens, new_tokens: of a sequence.
        batches: one result for each size.
        weight_bytes: of the tensors that the model consists of, in the form in which it keeps them.
        peak_bytes: the most that generating took on GPUs, weights included; None on a CPU, which does not
            tell.
    """

    prompt_tokens: int
    new_tokens: int
    batches: list[BatchSpeed]
    weight_bytes: int
    peak_bytes: int | None


def measure_speed(
    model: PreTrainedModel,
    *,
    batches: Sequence[int] | None = None,
    prompt_tokens: int = _PROMPT_TOKENS,
    new_tokens: int = _NEW_TOKENS,
    repeats: int = _REPEATS,
) -> Speed:
    """Time greedy `generate`, as users call it, after a call that is not counted.

    Figures are medians. The prompts are random tokens, and what would end a sequence is ignored.

    Args:
        model: a causal language model; on a GPU with nothing else to do.
        batches: sizes; None takes 1 and 8, on a CPU 1.
        prompt_tokens, new_tokens: of a sequence; at least 1 and 2.
        repeats: timings of each kind; of short calls more.

    Raises:
        EvaluationError: the model's own generation config stops sequences early.
    """
    on_gpu = model.device.type == "cuda"
    devices = {tensor.device for tensor in model.parameters() if tensor.device.type == "cuda"}
    before = sum(map(torch.cuda.memory_allocated, devices))
    for device in devices:
        torch.cuda.reset_peak_memory_stats(device)
    found = [
        _time_batch(model, batch, prompt_tokens, new_tokens, repeats)
        for batch in batches or ((1, 8) if on_gpu else (1,))
    ]
    weight_bytes = _weight_bytes(model)
    # Of other models in the same process nothing is counted.
    added = sum(map(torch.cuda.max_memory_allocated, devices)) - before
    return Speed(prompt_tokens, new_tokens, found, weight_bytes, weight_bytes + added if on_gpu else None)


def seconds(function: Callable[[], Any], device: torch.device) -> float:
    """How long a call takes until the device is done.

    Args:
        function: is called once.
        device: that it keeps busy.
    """

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    wait()
    start = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - start


def _time_batch(model: Any, batch: int, prompt_tokens: int, new_tokens: int, repeats: int) -> BatchSpeed:
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    prompt = torch.randint(vocabulary, (batch, prompt_tokens), generator=torch.Generator().manual_seed(0))
    prompt = prompt.to(model.device)
    options: dict[str, Any] = {
        "attention_mask": torch.ones_like(prompt),
        **{"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "repetition_penalty": 1.0},
        # No token has this number, so that every call makes as many.
        "eos_token_id": vocabulary,
        "pad_token_id": 0,
    }

    def generate(count: int) -> None:
        output = model.generate(prompt, max_new_tokens=count, **options)
        if output.shape != (batch, prompt_tokens + count):
            raise EvaluationError(
                f"speed cannot be measured: asked for {count} new tokens, the model's generation config "
                f"allows {output.shape[1] - prompt_tokens}"
            )

    def median(count: int) -> float:
        times: list[float] = []
        while len(times) < repeats or (sum(times) < _LEAST_SECONDS and len(times) < _MOST_REPEATS):
            times.append(seconds(lambda: generate(count), model.device))
        return statistics.median(times)

    generate(new_tokens)
    first, whole = median(1), median(new_tokens)
    return BatchSpeed(batch, batch * (new_tokens - 1) / (whole - first), first)


def _weight_bytes(model: PreTrainedModel) -> int:
    """Memory that two tensors share counts once."""
    storages = {
        (tensor.device, tensor.untyped_storage().data_ptr()): tensor.untyped_storage().nbytes()
        for tensor in (*model.parameters(), *model.buffers())
        if tensor.device.type != "meta"
    }
    return sum(storages.values())
