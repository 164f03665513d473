"""Perplexity, the distance from a baseline's predictions, and how sure one can be of both."""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import EvaluationError
from ..text_windows import bos_token, window_starts

_CHUNK = 256  # positions whose logits are widened to fp32 at a time


class Estimate(NamedTuple):
    """A mean of samples.

    Attributes:
        value: the mean.
        standard_error: of the mean; NaN for a single sample.
    """

    value: float
    standard_error: float

    @classmethod
    def of(cls, samples: torch.Tensor) -> "Estimate":
        """Of independent samples of any dtype, ``[n]``."""
        samples = samples.double()
        error = samples.std() / math.sqrt(len(samples)) if len(samples) > 1 else math.nan
        return cls(float(samples.mean()), float(error))


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


class Comparison(NamedTuple):
    """A model beside a baseline, on the same tokens.

    Attributes:
        perplexity: of the model.
        token_kl: fp32 ``[windows, context - 1]``, KL(baseline || model) of the next token's distributions, in
            nats.
        same_top1: bool ``[windows, context - 1]``, whether both find the same token likeliest.
    """

    perplexity: Perplexity
    token_kl: torch.Tensor
    same_top1: torch.Tensor

    @property
    def kl(self) -> Estimate:
        """The mean divergence, with its error over windows."""
        return Estimate.of(self.token_kl.double().mean(dim=1))

    @property
    def top1_agreement(self) -> Estimate:
        """The share of tokens with the same likeliest one, with its error over windows."""
        return Estimate.of(self.same_top1.double().mean(dim=1))


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[torch.Tensor, int | None]:
    """A text as `perplexity` wants it.

    Returns:
        int64 ``[T]``, and `bos_token`.
    """
    ids = tokenizer(text, add_special_tokens=False, verbose=False, return_tensors="pt").input_ids[0]
    return ids, bos_token(tokenizer)


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
        EvaluationError: the text is shorter than one window, or has not that many windows.
    """
    rows = []
    with fp32_logits(model):
        for ids in _windows(input_ids, bos, context, windows, progress):
            rows.append(_token_nll(_logits(model, ids), ids).cpu())
    return Perplexity(torch.stack(rows))


@torch.inference_mode()
def compare(
    models: Sequence[PreTrainedModel],
    baseline: PreTrainedModel,
    input_ids: torch.Tensor,
    *,
    bos: int | None = None,
    context: int = 1024,
    windows: int | None = None,
    progress: bool = False,
) -> tuple[Perplexity, list[Comparison]]:
    """`perplexity` of models and of a baseline, and how far their predictions are from the baseline's.

    The logits of one window are held at a time, the baseline's and those of one model.

    Args:
        models: which are compared with the baseline.
        baseline: usually the full-precision model; may lie on another device.
        input_ids, bos, context, windows, progress: as for `perplexity`.

    Returns:
        The baseline's result, and one for each model.

    Raises:
        EvaluationError: as `perplexity`; a model has another vocabulary than the baseline.
    """
    expected = []
    found: list[list[tuple[torch.Tensor, ...]]] = [[] for _ in models]
    with ExitStack() as heads:
        for model in (baseline, *models):
            heads.enter_context(fp32_logits(model))
        for ids in _windows(input_ids, bos, context, windows, progress):
            reference = _logits(baseline, ids)
            expected.append(_token_nll(reference, ids).cpu())
            for model, rows in zip(models, found, strict=True):
                logits = _logits(model, ids)
                nll, distance = _token_nll(logits, ids), _distance(logits[:-1], reference[:-1])
                rows.append(tuple(row.cpu() for row in (nll, *distance)))
    results = []
    for rows in found:
        nll, kl, same = (torch.stack(column) for column in zip(*rows, strict=True))
        results.append(Comparison(Perplexity(nll), kl, same))
    return Perplexity(torch.stack(expected)), results


@contextmanager
def fp32_logits(model: PreTrainedModel) -> Iterator[None]:
    """Compute a full-precision output head in fp32 while this lasts.

    Logits that are rounded to bf16 have ties among the likeliest tokens, and an error of their own.

    Args:
        model: may be tied; its embedding stays as it is. A quantized head is left alone.
    """
    head: Any = model.get_output_embeddings()
    if type(head) is not nn.Linear or head.weight.dtype == torch.float32 or head.weight.is_meta:
        yield
        return
    original = {name: parameter for name, parameter in head.named_parameters()}
    for name, parameter in original.items():
        head.register_parameter(name, nn.Parameter(parameter.detach().float(), requires_grad=False))
    hook = head.register_forward_pre_hook(lambda _, args: (args[0].float(), *args[1:]))
    try:
        yield
    finally:
        hook.remove()
        for name, parameter in original.items():
            head.register_parameter(name, parameter)


def _windows(
    input_ids: torch.Tensor, bos: int | None, context: int, windows: int | None, progress: bool
) -> Iterator[torch.Tensor]:
    """int64 ``[context]`` each."""
    prefix = input_ids.new_tensor([] if bos is None else [bos])
    length = context - len(prefix)
    most = input_ids.numel() // length
    count = most if windows is None else windows
    if not 0 < count <= most:
        raise EvaluationError(
            f"{input_ids.numel()} tokens hold {most} windows of {length}, asked for {count}"
        )
    starts = window_starts(most, count, length)
    for start in tqdm(starts, desc="perplexity", disable=not progress, leave=False):
        yield torch.cat([prefix, input_ids[start : start + length]])


def _logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """The model's own ``[T, V]``: some models scale or cap them after the head."""
    return model(ids[None].to(model.device), use_cache=False).logits[0]


def _token_nll(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """fp32 ``[T - 1]`` from logits ``[T, V]``: token t is predicted by logits t - 1."""
    targets = ids[1:].to(logits.device)
    return torch.cat(
        [
            nn.functional.cross_entropy(chunk[: len(target)].float(), target, reduction="none")
            for chunk, target in zip(logits.split(_CHUNK), targets.split(_CHUNK), strict=False)
        ]
    )


def _distance(logits: torch.Tensor, reference: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(reference || logits), fp32 ``[T]``, and whether the largest are the same, of logits ``[T, V]``."""
    if logits.shape != reference.shape:
        raise EvaluationError(
            f"the model predicts {logits.shape[1]} different tokens, the baseline {reference.shape[1]}: "
            "they are not forms of one model"
        )
    kl, same = [], []
    for chunk, expected in zip(logits.split(_CHUNK), reference.split(_CHUNK), strict=True):
        expected = expected.to(chunk.device)
        p, q = expected.float().log_softmax(dim=-1), chunk.float().log_softmax(dim=-1)
        kl.append((p.exp() * (p - q)).sum(dim=-1))
        same.append(chunk.argmax(dim=-1) == expected.argmax(dim=-1))
    return torch.cat(kl), torch.cat(same)


def paired_difference(first: Perplexity, second: Perplexity) -> Estimate:
    """How much larger the first result's negative log-likelihood is, in nats per token.

    The error is over windows: tokens of one window are not independent.

    Args:
        first, second: of the same windows of the same text.

    Raises:
        EvaluationError: the results are of different windows.
    """
    if first.token_nll.shape != second.token_nll.shape:
        raise EvaluationError(
            f"results of different tokens are not paired: {tuple(first.token_nll.shape)} and "
            f"{tuple(second.token_nll.shape)}"
        )
    return Estimate.of((first.token_nll.double() - second.token_nll.double()).mean(dim=1))
