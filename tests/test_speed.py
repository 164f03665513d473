"""`measure_speed`: what it counts, with a clock of its own, and how reports show it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import make_model

from hf_hadacore.errors import EvaluationError
from hf_hadacore.evaluation import speed as module
from hf_hadacore.evaluation.report import describe_evaluation, speed_entry, speed_rows
from hf_hadacore.evaluation.speed import BatchSpeed, Speed, measure_speed


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Batch and number of new tokens of each timed call, which takes 0.5 s and 0.1 s for each token."""
    made: list[tuple[int, int]] = []
    model_class = type(make_model("llama"))
    generate = model_class.generate
    last: list[torch.Tensor] = []

    def spy(self: Any, prompt: torch.Tensor, **options: Any) -> torch.Tensor:
        last[:] = [generate(self, prompt, **options)]
        return last[0]

    def seconds(function: Callable[[], Any], device: torch.device) -> float:
        function()
        batch, tokens = last[0].shape
        made.append((batch, tokens - 8))
        return 0.5 + 0.1 * (tokens - 8)

    monkeypatch.setattr(model_class, "generate", spy)
    monkeypatch.setattr(module, "seconds", seconds)
    return made


@pytest.mark.transformers_versions
def test_speed_is_that_of_the_steps(calls: list[tuple[int, int]]) -> None:
    model = make_model("llama")
    found = measure_speed(model, batches=(1, 3), prompt_tokens=8, new_tokens=5, repeats=2)
    assert calls == [(1, 1), (1, 1), (1, 5), (1, 5), (3, 1), (3, 1), (3, 5), (3, 5)]
    assert found.batches[0] == pytest.approx((1, 10.0, 0.6))
    assert found.batches[1] == pytest.approx((3, 30.0, 0.6))
    assert (found.prompt_tokens, found.new_tokens, found.peak_bytes) == (8, 5, None)


def test_weights_that_are_shared_count_once() -> None:
    sizes = {
        name: measure_speed(make_model(name), prompt_tokens=2, new_tokens=2, repeats=1).weight_bytes
        for name in ("llama", "llama-tied")
    }
    model = make_model("llama")
    tensors = [*model.parameters(), *model.buffers()]
    assert sizes["llama"] == sum(tensor.nbytes for tensor in tensors)
    assert sizes["llama"] - sizes["llama-tied"] == model.lm_head.weight.nbytes


def test_no_token_ends_a_sequence() -> None:
    """Whatever the model's own end is, and its penalties and sampling."""
    model = make_model("llama")
    model.generation_config.eos_token_id = list(range(model.config.vocab_size))
    model.generation_config.update(do_sample=True, repetition_penalty=1.5, top_k=5)
    found = measure_speed(model, prompt_tokens=2, new_tokens=6, repeats=1)
    assert found.batches[0].tokens_per_second > 0
    assert found.batches[0].time_to_first_token > 0
    model.generation_config.max_time = 0.0
    with pytest.raises(EvaluationError, match=r"asked for 6 new tokens, .* config allows 1"):
        measure_speed(model, prompt_tokens=2, new_tokens=6, repeats=1)


MEASURED = Speed(128, 64, [BatchSpeed(1, 300.04, 0.0123), BatchSpeed(8, 2000, 0.04)], 2_000_000, 3_000_000)
ON_CPU = Speed(128, 64, [BatchSpeed(1, 100.02, 0.5)], 4_000_000, None)


def test_rows() -> None:
    report = {"speed": speed_entry(("a GPU", MEASURED), ("a CPU", ON_CPU))}
    assert speed_rows(report) == [
        ["generate, tok/s, batch 1", "300.0", "100.0", "3.00x"],
        ["first token, ms, batch 1", "12.3", "500.0", "0.02x"],
        ["generate, tok/s, batch 8", "2,000.0", "", ""],
        ["first token, ms, batch 8", "40.0", "", ""],
        ["weights in memory", "2.00 MB", "4.00 MB", "0.50x"],
        ["peak memory", "3.00 MB", "", ""],
    ]
    alone = {"speed": speed_entry(("a GPU", MEASURED))}
    assert speed_rows(alone)[0] == ["generate, tok/s, batch 1", "300.0", "", ""]
    assert speed_rows({}) == []
    part = {"name": "int4", "bytes": 5, "attention": "sdpa"}
    text = describe_evaluation({"model": part, "baseline": part, **report})
    assert text.endswith("greedy generate, prompts of 128 tokens, 64 new ones; a GPU and a CPU")
