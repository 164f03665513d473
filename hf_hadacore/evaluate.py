"""Perplexity, and how sure one can be that two models differ in it."""

import math
from typing import NamedTuple

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

_CHUNK = 256  # positions whose logits are widened to fp32 at a time


class Perplexity(NamedTuple):
    """The result of `perplexity`.

    Attributes:
        token_nll: fp32 ``[windows, context - 1]``, the negative log-likelihood of each predicted token.
    """

    token_nll: torch.Tensor

    @property
    def nll(self) -> float:
        """Mean negative log-likelihood per token, in nats."""
        return float(self.token_nll.double().mean())

    @property
    def perplexity(self) -> float:
        """``exp(nll)``."""
        return math.exp(self.nll)


class Difference(NamedTuple):
    """The mean difference of two results on the same tokens, and its standard error.

    Attributes:
        nll: of the first minus of the second.
        standard_error: of `nll`, over windows: tokens of one window are not independent.
    """

    nll: float
    standard_error: float


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[torch.Tensor, int | None]:
    """A text as `perplexity` wants it.

    Returns:
        int64 ``[T]``, and the token that the tokenizer puts before a text, if it does: some models trained
        that way (Gemma) are lost without it.
    """
    ids = tokenizer(text, add_special_tokens=False, verbose=False, return_tensors="pt").input_ids[0]
    bos = tokenizer.bos_token_id
    return ids, bos if bos is not None and tokenizer("").input_ids[:1] == [bos] else None


@torch.inference_mode()
def perplexity(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    *,
    bos: int | None = None,
    context: int = 1024,
    windows: int | None = None,
    progress: bool = False,
) -> Perplexity:
    """Negative log-likelihoods of a text, in windows that do not overlap and are spread over it evenly.

    Args:
        model: a causal language model.
        input_ids: integer ``[T]``, the whole text.
        bos: token to put before the text of every window; see `encode`.
        context: tokens of a window, `bos` included; the first of each is only read.
        windows: how many; None takes as many as fit.
        progress: show a progress bar.

    Raises:
        ValueError: the text is shorter than one window, or has not that many windows.
    """
    prefix = input_ids.new_tensor([] if bos is None else [bos])
    length = context - len(prefix)
    most = input_ids.numel() // length
    count = most if windows is None else windows
    if not 0 < count <= most:
        raise ValueError(f"{input_ids.numel()} tokens hold {most} windows of {length}, asked for {count}")
    starts = [most * i // count * length for i in range(count)]
    rows = []
    for start in tqdm(starts, desc="perplexity", disable=not progress, leave=False):
        ids = torch.cat([prefix, input_ids[start : start + length]]).to(model.device)
        # The model's own logits: some scale or cap them after the head.
        logits = model(ids[None], use_cache=False).logits[0]
        rows.append(_token_nll(logits, ids).cpu())
    return Perplexity(torch.stack(rows))


def _token_nll(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """fp32 ``[T - 1]`` from logits ``[T, V]``: token t is predicted by logits t - 1."""
    return torch.cat(
        [
            nn.functional.cross_entropy(chunk[: len(target)].float(), target, reduction="none")
            for chunk, target in zip(logits.split(_CHUNK), ids[1:].split(_CHUNK), strict=False)
        ]
    )


def paired_difference(first: Perplexity, second: Perplexity) -> Difference:
    """How much larger the first result's negative log-likelihood is.

    Args:
        first, second: of the same windows of the same text.

    Raises:
        ValueError: the results are of different windows.
    """
    if first.token_nll.shape != second.token_nll.shape:
        raise ValueError(
            f"results of different tokens are not paired: {tuple(first.token_nll.shape)} and "
            f"{tuple(second.token_nll.shape)}"
        )
    by_window = (first.token_nll.double() - second.token_nll.double()).mean(dim=1)
    error = by_window.std() / math.sqrt(len(by_window)) if len(by_window) > 1 else torch.tensor(math.nan)
    return Difference(float(by_window.mean()), float(error))
