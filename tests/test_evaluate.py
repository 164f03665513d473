"""Perplexity against transformers' own loss, divergences and differences against plain formulas."""

import math

import pytest
import torch
from tiny_models import VOCAB_SIZE, make_model, token_ids
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, Gemma2Config, PreTrainedTokenizerFast

from hf_hadacore.errors import EvaluationError
from hf_hadacore.evaluation import perplexity as evaluate
from hf_hadacore.evaluation.perplexity import (
    Estimate,
    Perplexity,
    compare,
    encode,
    fp32_logits,
    paired_difference,
    perplexity,
)

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
    with pytest.raises(EvaluationError, match=f"{tokens} tokens hold {tokens // CONTEXT} windows of 16"):
        perplexity(make_model("llama"), text(tokens), context=CONTEXT, windows=windows)


def test_paired_difference() -> None:
    second = Perplexity(torch.tensor([[1.0, 3.0], [2.0, 2.0], [5.0, 1.0]]))
    first = Perplexity(second.token_nll + torch.tensor([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]]))
    difference = paired_difference(first, second)
    assert difference.value == pytest.approx(2.0)
    assert difference.standard_error == pytest.approx(1 / math.sqrt(3))
    assert paired_difference(second, first).value == pytest.approx(-2.0)


def test_one_window_says_nothing_of_the_error() -> None:
    result = Perplexity(torch.ones(1, 4))
    assert math.isnan(paired_difference(result, result).standard_error)


def test_results_of_different_windows_are_not_paired() -> None:
    with pytest.raises(EvaluationError, match="not paired"):
        paired_difference(Perplexity(torch.ones(1, 4)), Perplexity(torch.ones(2, 4)))


def decided_model(scale: float) -> torch.nn.Module:
    """A model whose next tokens are far from equally likely."""
    model = make_model("llama", torch.float32)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
        model.model.layers[0].mlp.up_proj.weight.mul_(scale)
    return model


@pytest.mark.parametrize("chunk", [256, 5])
def test_compare(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(evaluate, "_CHUNK", chunk)
    baseline, model, ids = decided_model(1), decided_model(30), text()
    options = {"context": CONTEXT, "windows": 3, "bos": 7}
    expected, (result, same) = compare([model, baseline], baseline, ids, **options)
    torch.testing.assert_close(expected.token_nll, perplexity(baseline, ids, **options).token_nll)
    torch.testing.assert_close(result.perplexity.token_nll, perplexity(model, ids, **options).token_nll)
    assert same.kl == (0, 0) and same.top1_agreement == (1, 0)
    first = torch.cat([torch.tensor([7]), ids[: CONTEXT - 1]])[None]
    with torch.no_grad():
        p, q = (m(first).logits[0, :-1].double().softmax(-1) for m in (baseline, model))
    torch.testing.assert_close(result.token_kl[0].double(), (p * (p / q).log()).sum(-1), rtol=1e-3, atol=1e-5)
    assert result.token_kl.min() > 0
    assert result.same_top1[0].tolist() == (p.argmax(-1) == q.argmax(-1)).tolist()
    assert 0 < result.top1_agreement.value < 1
    by_window = result.token_kl.double().mean(1)
    assert result.kl.value == pytest.approx(by_window.mean().item())
    assert result.kl.standard_error == pytest.approx(by_window.std().item() / math.sqrt(3))


def test_models_of_other_vocabularies_are_not_compared() -> None:
    model = make_model("llama", torch.float32)
    model.resize_token_embeddings(VOCAB_SIZE + 1, mean_resizing=False)
    with pytest.raises(
        EvaluationError, match=f"{VOCAB_SIZE + 1} different tokens, the baseline {VOCAB_SIZE}"
    ):
        compare([model], make_model("llama", torch.float32), text(), context=CONTEXT)


@pytest.mark.transformers_versions
@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_fp32_logits(name: str) -> None:
    model, ids = make_model(name, torch.bfloat16), text(CONTEXT)[None]
    head = model.get_output_embeddings()
    weight = head.weight
    with torch.no_grad():
        rounded = model(ids).logits
        hidden = model.model(ids).last_hidden_state
        with fp32_logits(model):
            logits = model(ids).logits
            assert model.get_input_embeddings().weight.dtype == torch.bfloat16
        assert model(ids).logits.equal(rounded)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, hidden.float() @ weight.float().T)
    assert not logits.bfloat16().float().equal(logits)
    assert head.weight is weight and not head._forward_pre_hooks


def test_estimates() -> None:
    assert Estimate.of(torch.tensor([True, False, True, True])) == (0.75, pytest.approx(0.25))
    assert Estimate.of(torch.tensor([2.0, 4.0])) == (3.0, pytest.approx(1.0))
