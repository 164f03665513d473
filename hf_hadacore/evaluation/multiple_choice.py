"""Accuracy on multiple-choice questions: the choice that a model finds likeliest is its answer."""

import json
import math
import os
from collections.abc import Iterator, Sequence
from itertools import groupby, takewhile
from typing import Any, NamedTuple

import torch
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from ..attention.kv_cache import HadaCoreCache, attention_mode
from ..errors import EvaluationError
from ..text_windows import bos_token
from .perplexity import Estimate, fp32_logits

# Prefixes are cut to a multiple of so many tokens: the fewer lengths there are, the larger batches can be.
_PREFIX_STEP = 8
_BATCH_TOKENS = 65536
_BATCH_TOKENS_CPU = 8192  # a CPU gains nothing from larger ones
_BATCH_LOGITS = 2**30
_NO_TOKEN = -100  # what cross_entropy gives a loss of 0


class Item(NamedTuple):
    """A question.

    Attributes:
        question: the text before the choices.
        choices: at least one.
        answer: index of the right one.
    """

    question: str
    choices: list[str]
    answer: int


class MultipleChoice(NamedTuple):
    """The result of `multiple_choice`.

    Attributes:
        correct: bool ``[items]``, whether the likeliest choice was the right one.
        correct_normalized: the same of the log-likelihood per character of the choice.
    """

    correct: torch.Tensor
    correct_normalized: torch.Tensor

    @property
    def accuracy(self) -> Estimate:
        """What lm-eval calls acc."""
        return Estimate.of(self.correct)

    @property
    def normalized_accuracy(self) -> Estimate:
        """What lm-eval calls acc_norm."""
        return Estimate.of(self.correct_normalized)


class _Encoded(NamedTuple):
    """An item in tokens.

    Attributes:
        prefix: of the question, as much as is computed once.
        rests: for each choice what follows the prefix.
        unscored: tokens at the beginning of each rest that are still the question's.
    """

    prefix: list[int]
    rests: list[list[int]]
    unscored: int

    @property
    def longest(self) -> int:
        return max(map(len, self.rests))


def read_items(file: str | os.PathLike[str]) -> list[Item]:
    """Questions from a file with a JSON object in each line: `question`, `choices` and `answer`, an index.

    Args:
        file: UTF-8; empty lines are left out, further keys ignored.

    Raises:
        EvaluationError: the file cannot be read, or a line is something else.
    """
    try:
        with open(file, encoding="utf-8") as lines:
            items = [_parse(line, f"{file}:{i}") for i, line in enumerate(lines, 1) if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"{file}: cannot be read: {error}") from None
    if not items:
        raise EvaluationError(f"{file}: has no questions")
    return items


def _parse(line: str, where: str) -> Item:
    try:
        entry = json.loads(line)
        item = Item(entry["question"], entry["choices"], entry["answer"])
    except (ValueError, KeyError, TypeError, RecursionError):
        raise EvaluationError(f"{where}: is no object with question, choices and answer") from None
    if not isinstance(item.question, str) or not item.question.strip():
        raise EvaluationError(f"{where}: question must be a text, got {item.question!r}")
    if not (isinstance(item.choices, list) and all(isinstance(c, str) and c.strip() for c in item.choices)):
        raise EvaluationError(f"{where}: choices must be a list of texts, got {item.choices!r}")
    if type(item.answer) is not int or not 0 <= item.answer < len(item.choices):
        raise EvaluationError(
            f"{where}: answer must be the index of one of {len(item.choices)} choices, got {item.answer!r}"
        )
    return item


@torch.inference_mode()
def log_likelihoods(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Item],
    *,
    progress: bool = False,
) -> list[list[float]]:
    """The log-likelihood of every choice after its question, in nats.

    The text is the question, a space unless there is one, and the choice. A question is computed once, but
    for its last few tokens, and its cache repeated for the choices, 8-bit if the model's attention is; so
    questions of about as many tokens share a batch, and none is padded.

    Args:
        model: a causal language model.
        tokenizer: the model's.
        items: the questions.
        progress: show a progress bar.

    Returns:
        One number for each choice of each item.
    """
    encoded = _encode(tokenizer, items)
    result: list[list[float]] = [[] for _ in items]
    with fp32_logits(model), tqdm(total=len(items), desc="choices", disable=not progress, leave=False) as bar:
        for batch in _batches(encoded, model):
            scores = iter(_score(model, [encoded[i] for i in batch]).tolist())
            for i in batch:
                result[i] = [next(scores) for _ in encoded[i].rests]
            bar.update(len(batch))
    return result


def multiple_choice(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Item],
    *,
    progress: bool = False,
) -> MultipleChoice:
    """Which questions a model answers rightly.

    Args:
        model, tokenizer, items, progress: as for `log_likelihoods`.
    """
    scores = log_likelihoods(model, tokenizer, items, progress=progress)
    plain, normalized = [], []
    for item, values in zip(items, scores, strict=True):
        per_character = [value / len(text) for value, text in zip(values, item.choices, strict=True)]
        plain.append(_best(values) == item.answer)
        normalized.append(_best(per_character) == item.answer)
    return MultipleChoice(torch.tensor(plain), torch.tensor(normalized))


def _best(values: list[float]) -> int:
    """The index of the largest; -1, no answer, if there is a NaN."""
    return -1 if any(map(math.isnan, values)) else values.index(max(values))


def _encode(tokenizer: PreTrainedTokenizerBase, items: Sequence[Item]) -> list[_Encoded]:
    """What is not scored never reaches beyond the question, spaces at its end not counted.

    Those are tokens of the choices, as in lm-eval. A tokenizer that merges a question's end with a choice
    makes what the choices share shorter.
    """
    bos = bos_token(tokenizer)
    start = [] if bos is None else [bos]

    def tokens(texts: list[str]) -> list[list[int]]:
        return tokenizer(texts, add_special_tokens=False, verbose=False).input_ids

    questions = [item.question if item.question[-1].isspace() else item.question + " " for item in items]
    stems = tokens([question.rstrip() for question in questions])
    wholes = iter(
        tokens([q + choice for q, item in zip(questions, items, strict=True) for choice in item.choices])
    )
    encoded = []
    for item, stem in zip(items, stems, strict=True):
        choices = [next(wholes) for _ in item.choices]
        shared = sum(1 for _ in takewhile(_all_equal, zip(stem, *choices, strict=False)))
        if not start and shared == 0:
            raise EvaluationError(f"the choices of {item.question!r} do not start with the question's tokens")
        length = len(start) + shared
        # A short one stays whole: an 8-bit cache takes the mean of its keys.
        cut = length - length % _PREFIX_STEP or length
        wholes_of_item = [start + choice for choice in choices]
        encoded.append(_Encoded(wholes_of_item[0][:cut], [w[cut:] for w in wholes_of_item], length - cut))
    return encoded


def _all_equal(tokens: tuple[int, ...]) -> bool:
    return len(set(tokens)) == 1


def _batches(encoded: Sequence[_Encoded], model: PreTrainedModel) -> Iterator[list[int]]:
    """Indices of items with prefixes of one length, and rests of like lengths.

    A batch has at most `_BATCH_TOKENS`, padding included, and `_BATCH_LOGITS`, unless it is a single item.
    """
    most_tokens = _BATCH_TOKENS_CPU if model.device.type == "cpu" else _BATCH_TOKENS
    most_scored = _BATCH_LOGITS // model.config.get_text_config(decoder=True).vocab_size
    order = sorted(range(len(encoded)), key=lambda i: (len(encoded[i].prefix), encoded[i].longest))
    for length, indices in groupby(order, key=lambda i: len(encoded[i].prefix)):
        batch: list[int] = []
        rows = 0
        for i in indices:
            rows += len(encoded[i].rests)
            longest = encoded[i].longest
            if batch and (rows * (length + longest) > most_tokens or rows * longest > most_scored):
                yield batch
                batch, rows = [], len(encoded[i].rests)
            batch.append(i)
        yield batch


def _score(model: PreTrainedModel, batch: Sequence[_Encoded]) -> torch.Tensor:
    """Log-likelihoods, fp32 ``[choices of all items]``."""
    device = model.device
    prefix = torch.tensor([item.prefix for item in batch], device=device)
    rests = pad_sequence(
        [torch.tensor(rest) for item in batch for rest in item.rests],
        batch_first=True,
        padding_value=_NO_TOKEN,
    ).to(device)
    choices = torch.tensor([len(item.rests) for item in batch], device=device)
    owners = torch.arange(len(batch), device=device).repeat_interleave(choices)
    unscored = torch.tensor([item.unscored for item in batch], device=device)[owners]
    is_question = torch.arange(rests.shape[1], device=device) < unscored[:, None]
    targets = rests.masked_fill(is_question, _NO_TOKEN)
    quantized = attention_mode(model.config) is not None
    cache: Any = HadaCoreCache(model.config) if quantized else DynamicCache(config=model.config)
    logits = model(prefix, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1].to(device)
    nll = cross_entropy(logits[owners].float(), targets[:, 0], reduction="none")
    if rests.shape[1] > 1:
        cache.batch_select_indices(owners)
        # What follows a choice's end is never read: later tokens do not change earlier ones.
        logits = model(rests[:, :-1].clamp(min=0), past_key_values=cache, use_cache=True).logits.to(device)
        losses = cross_entropy(logits.flatten(0, 1).float(), targets[:, 1:].flatten(), reduction="none")
        nll = nll + losses.view(len(rests), -1).sum(dim=1)
    return -nll
