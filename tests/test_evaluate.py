"""Perplexity against transformers' own loss, and paired differences against numbers worked out by hand."""

import math

import pytest
import torch
from tiny_models import VOCAB_SIZE, make_model, token_ids
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, Gemma2Config, PreTrainedTokenizerFast

from hf_hadacore import evaluate
from hf_hadacore.evaluate import Perplexity, encode, paired_difference, perplexity

CONTEXT = 16


def text(tokens: int = 5 * CONTEXT + 3) -> torch.Tensor:
    return token_ids(1, tokens)[0]


def loss(model, ids: torch.Tensor) -> float:
    with torch.no_grad():
        return model(ids[None], labels=ids[None]).loss.item()


@pytest.mark.parametrize("chunk", [256, 5, 1])
def test_equals_the_models_own_loss(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(evaluate, "_CHUNK", chunk)
    model, ids = make_model("llama", torch.float32), text()
    result = perplexity(model, ids, context=CONTEXT)
    assert result.token_nll.shape == (5, CONTEXT - 1)
    assert result.token_nll.dtype == torch.float32
    for i, window in enumerate(ids[: 5 * CONTEXT].view(5, CONTEXT)):
        assert result.token_nll[i].mean().item() == pytest.approx(loss(model, window), rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(result.nll))


def test_models_that_change_their_logits_after_the_head() -> None:
    torch.manual_seed(0)
    config = Gemma2Config(
        **{"vocab_size": VOCAB_SIZE, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0},
        final_logit_softcapping=0.5,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(30)
    ids = text(CONTEXT)
    result = perplexity(model, ids, context=CONTEXT)
    assert result.nll == pytest.approx(loss(model, ids), rel=1e-5)
    assert result.token_nll.max() < math.log(VOCAB_SIZE) + 1  # as capped logits must be


def test_windows_are_spread_over_the_text() -> None:
    model, ids = make_model("llama", torch.float32), text()
    every = perplexity(model, ids, context=CONTEXT).token_nll
    some = perplexity(model, ids, context=CONTEXT, windows=2).token_nll
    torch.testing.assert_close(some, every[[0, 2]])


def test_bos_precedes_every_window() -> None:
    model, ids = make_model("llama", torch.float32), text()
    result = perplexity(model, ids, bos=7, context=CONTEXT)
    assert result.token_nll.shape == (5, CONTEXT - 1)
    for i, window in enumerate(ids[: 5 * (CONTEXT - 1)].view(5, CONTEXT - 1)):
        expected = loss(model, torch.cat([torch.tensor([7]), window]))
        assert result.token_nll[i].mean().item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("adds_bos", [False, True])
def test_encode_leaves_bos_to_the_windows(adds_bos: bool) -> None:
    words = Tokenizer(models.WordLevel({"[BOS]": 0, "[UNK]": 1, "a": 2, "b": 3}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    if adds_bos:
        words.post_processor = processors.TemplateProcessing(single="[BOS] $A", special_tokens=[("[BOS]", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="[BOS]", unk_token="[UNK]")
    ids, bos = encode(tokenizer, "a b a")
    assert ids.tolist() == [2, 3, 2]
    assert bos == (0 if adds_bos else None)


@pytest.mark.parametrize(("tokens", "windows"), [(CONTEXT - 1, None), (2 * CONTEXT, 3), (2 * CONTEXT, 0)])
def test_texts_that_are_too_short(tokens: int, windows: int | None) -> None:
    with pytest.raises(ValueError, match=f"{tokens} tokens hold {tokens // CONTEXT} windows of 16"):
        perplexity(make_model("llama"), text(tokens), context=CONTEXT, windows=windows)


def test_paired_difference() -> None:
    second = Perplexity(torch.tensor([[1.0, 3.0], [2.0, 2.0], [5.0, 1.0]]))
    first = Perplexity(second.token_nll + torch.tensor([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]]))
    difference = paired_difference(first, second)
    assert difference.nll == pytest.approx(2.0)
    assert difference.standard_error == pytest.approx(1 / math.sqrt(3))
    assert paired_difference(second, first).nll == pytest.approx(-2.0)


def test_one_window_says_nothing_of_the_error() -> None:
    result = Perplexity(torch.ones(1, 4))
    assert math.isnan(paired_difference(result, result).standard_error)


def test_results_of_different_windows_are_not_paired() -> None:
    with pytest.raises(ValueError, match="not paired"):
        paired_difference(Perplexity(torch.ones(1, 4)), Perplexity(torch.ones(2, 4)))
