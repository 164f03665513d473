"""Log-likelihoods of choices against plain forward passes, and accuracies worked out by hand."""

import json
from pathlib import Path

import pytest
import torch
from evaluation_cases import random_words, word_tokenizer
from tiny_models import make_model
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from hf_hadacore.attention.kv_cache import HadaCoreCache
from hf_hadacore.errors import EvaluationError
from hf_hadacore.evaluation import multiple_choice as module
from hf_hadacore.evaluation.multiple_choice import (
    Item,
    MultipleChoice,
    log_likelihoods,
    multiple_choice,
    read_items,
)

# Questions of 3, 2, 3 and 3 tokens, of one to three choices of one to four tokens.
ITEMS = [
    Item("w3 w4 w5 ", ["w6 w7 w8 w9", "w10", "w11 w12"], 1),
    Item("w3 w9", ["w6", "w7"], 0),
    Item("w20 w21 w22 ", ["w23"], 0),
    Item("w30 w31 w32", ["w33 w34", "w35 w36"], 1),
]


def plain_log_likelihood(model, context: list[int], rest: list[int]) -> float:
    with torch.no_grad():
        logits = model(torch.tensor([context + rest])).logits[0].float().log_softmax(-1)
    return sum(logits[len(context) - 1 + i, token].item() for i, token in enumerate(rest))


def words(text: str) -> list[int]:
    return [int(word[1:]) for word in text.split()]


@pytest.mark.transformers_versions
@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("batch_tokens", [8192, 1, 15])
@pytest.mark.parametrize("step", [8, 2, 1])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_equals_plain_forward_passes(
    monkeypatch: pytest.MonkeyPatch, name: str, step: int, batch_tokens: int, adds_bos: bool
) -> None:
    monkeypatch.setattr(module, "_BATCH_TOKENS_CPU", batch_tokens)
    monkeypatch.setattr(module, "_PREFIX_STEP", step)
    model = make_model(name, torch.float32)
    if name == "gemma3":
        model.config.sliding_window = 3  # shorter than the texts
    scores = log_likelihoods(model, word_tokenizer(adds_bos), ITEMS)
    for item, values in zip(ITEMS, scores, strict=True):
        prefix = [0] * adds_bos + words(item.question)
        expected = [plain_log_likelihood(model, prefix, words(choice)) for choice in item.choices]
        assert values == pytest.approx(expected, rel=1e-5)


def test_questions_of_like_lengths_share_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 8 to 15 tokens, and the same log-likelihoods as with one batch for each length."""
    model, tokenizer = make_model("llama", torch.float32), word_tokenizer()
    items = [
        Item(random_words(8 + i, seed=i), ["w6 w7 w8 w9"[: 3 * j - 1] for j in (1, 4)], 0) for i in range(8)
    ]
    sizes = []
    model.register_forward_pre_hook(lambda _, args: sizes.append(tuple(args[0].shape)), with_kwargs=False)
    found = log_likelihoods(model, tokenizer, items)
    assert sizes == [(8, 8), (16, 7 + 4 - 1)]
    monkeypatch.setattr(module, "_PREFIX_STEP", 1)
    expected = log_likelihoods(model, tokenizer, items)
    assert len(sizes) == 2 + 2 * 8
    for values, others in zip(found, expected, strict=True):
        assert values == pytest.approx(others, rel=1e-5)


def test_batches_have_a_bounded_number_of_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama", torch.float32)
    items = [Item("w3 w4", ["w5 w6", "w7 w8"], 0)] * 6
    passes: list[int] = []
    model.register_forward_pre_hook(lambda _, args: passes.append(len(args[0])))
    monkeypatch.setattr(module, "_BATCH_LOGITS", 8 * model.config.vocab_size)  # two items of 2 x 2 tokens
    log_likelihoods(model, word_tokenizer(), items)
    assert passes == [2, 4] * 3


def test_choices_of_one_token_need_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama", torch.float32)
    passes = []
    model.register_forward_pre_hook(lambda *args: passes.append(1))
    log_likelihoods(model, word_tokenizer(), [Item("w3 w4", ["w5", "w6"], 0), Item("w7 w8", ["w9"], 0)])
    assert len(passes) == 1


def test_a_question_whose_end_merges_with_a_choice() -> None:
    vocabulary = {"x": 0, " ": 1, "a": 2, "b": 3, "c": 4, "a ": 5, "a b": 6}
    merging = Tokenizer(models.BPE(vocabulary, [("a", " "), ("a ", "b")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=merging)
    model = make_model("llama", torch.float32)
    (values,) = log_likelihoods(model, tokenizer, [Item("x a", ["b", "c"], 0)])
    expected = [plain_log_likelihood(model, [0, 1], rest) for rest in ([6], [5, 4])]
    assert values == pytest.approx(expected, rel=1e-5)
    with pytest.raises(EvaluationError, match="do not start with the question's tokens"):
        log_likelihoods(model, tokenizer, [Item("a", ["b", "c"], 0)])


@pytest.mark.transformers_versions
def test_8bit_attention_reads_an_8bit_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    caches = []
    make_cache = HadaCoreCache.__init__
    monkeypatch.setattr(
        HadaCoreCache,
        "__init__",
        lambda *args, **kwargs: (caches.append(args[0]), make_cache(*args, **kwargs))[1],
    )
    model = make_model("llama")
    expected = log_likelihoods(model, word_tokenizer(), ITEMS)
    assert not caches
    model.set_attn_implementation("hadacore-int8-fp8")
    found = log_likelihoods(model, word_tokenizer(), ITEMS)
    assert {cache.layers[0].key_dtype for cache in caches} == {torch.int8}
    assert found != expected
    for values, others in zip(found, expected, strict=True):
        assert values == pytest.approx(others, abs=0.1)


def test_accuracies(monkeypatch: pytest.MonkeyPatch) -> None:
    items = [
        Item("q", ["aa", "aaaa"], 0),  # per character -0.5 and -0.3
        Item("q", ["aa", "aaaa"], 1),
        Item("q", ["a", "a"], 0),
        Item("q", ["a", "a"], 0),
    ]
    scores = [[-1.0, -1.2], [-1.0, -1.2], [-1.0, -2.0], [float("nan"), -2.0]]
    monkeypatch.setattr(module, "log_likelihoods", lambda *args, **kwargs: scores)
    result = multiple_choice(None, None, items)
    assert result.correct.tolist() == [True, False, True, False]
    assert result.correct_normalized.tolist() == [False, True, True, False]
    assert result.accuracy.value == 0.5
    assert result.accuracy.standard_error == pytest.approx((1 / 3 / 4) ** 0.5)
    assert MultipleChoice(torch.tensor([True]), torch.tensor([False])).normalized_accuracy.value == 0


def test_read_items(tmp_path: Path) -> None:
    file = tmp_path / "task.jsonl"
    lines = [json.dumps({**item._asdict(), "source": "made up"}) for item in ITEMS]
    file.write_text("\n\n".join(lines) + "\n")
    assert read_items(file) == ITEMS


GOOD = '{"question": "q", "choices": ["a", "b"], "answer": 0}'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        ("", "has no questions"),
        (f"{GOOD}\n{{", ":2: is no object with"),
        ("[1, 2]", ":1: is no object with"),
        ('{"question": "q", "choices": ["a"]}', ":1: is no object with"),
        ('{"question": " ", "choices": ["a"], "answer": 0}', "question must be a text, got ' '"),
        ('{"question": "q", "choices": "ab", "answer": 0}', "choices must be a list of texts, got 'ab'"),
        ('{"question": "q", "choices": ["a", ""], "answer": 0}', "choices must be a list of texts"),
        ('{"question": "q", "choices": ["a", "b"], "answer": 2}', "index of one of 2 choices, got 2"),
        ('{"question": "q", "choices": ["a", "b"], "answer": true}', "index of one of 2 choices, got True"),
        ('{"question": "q", "choices": [], "answer": 0}', "index of one of 0 choices"),
    ],
)
def test_files_that_are_no_tasks(tmp_path: Path, content: str | bytes | None, message: str) -> None:
    file = tmp_path / "task.jsonl"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(EvaluationError, match=message.replace("(", "\\(")) as error:
        read_items(file)
    assert "task.jsonl" in str(error.value)
