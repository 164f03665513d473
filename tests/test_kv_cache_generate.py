"""`generate` with the 8-bit cache: its tokens are those of one pass over all of them."""

import pytest
import torch
from kv_cache_cases import (
    CLOSE,
    MODELS,
    generate,
    hadacore_model,
    logits_in_chunks,
    relative_error,
    teacher_forced,
)
from tiny_models import token_ids
from transformers import AutoModelForCausalLM, DynamicCache
from varied_models import LENGTH, left_padded

from hf_hadacore import HadaCoreCache, HadaCoreConfig
from hf_hadacore.decoding import generation
from hf_hadacore.decoding.generation import enable_cuda_graphs

pytestmark = pytest.mark.transformers_versions


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("implementation", ["hadacore", "hadacore-int8-fp8"])
def test_generate(small_buffers, name, padded, implementation):
    model = hadacore_model(name, implementation)
    inputs = left_padded() if padded else {"inputs": token_ids(2, LENGTH)}
    got = generate(model, inputs=inputs, new=50, return_dict_in_generate=True)
    assert type(got.past_key_values) is HadaCoreCache
    assert len(got.sequences[0, LENGTH:].unique()) > 5  # not one token for ever
    logits = teacher_forced(model, got.sequences, LENGTH, inputs.get("attention_mask"))
    assert torch.equal(logits.argmax(-1), got.sequences[:, LENGTH:])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("padded", [False, True])
def test_graphs(small_buffers, recorder, name, padded):
    model = hadacore_model(name)
    inputs = left_padded() if padded else {"inputs": token_ids(2, LENGTH)}
    options = dict(inputs=inputs, new=45, return_dict_in_generate=True, output_logits=True)
    expected = generate(model, **options)
    enable_cuda_graphs(model)
    captures = []
    for _ in range(2):
        got = generate(model, **options)
        assert torch.equal(got.sequences, expected.sequences)
        assert relative_error(torch.stack(got.logits), torch.stack(expected.logits)) < CLOSE
        captures.append(recorder.captures)
    # A step runs as it is, and another is captured, after each growth of the buffers; these are there then.
    assert captures[0] > 1 and captures[1] == captures[0]
    assert recorder.replays == 2 * 44 - captures[0]
    # What was kept is the caller's own.
    assert type(got.past_key_values) is HadaCoreCache
    more = torch.cat([got.sequences, token_ids(len(got.sequences), 4)], 1)
    follow = {"inputs": more}
    if padded:
        follow["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (0, 49), value=1)
    assert torch.equal(
        generate(model, inputs=follow, new=9, past_key_values=got.past_key_values),
        generate(model, inputs=follow, new=9, past_key_values=expected.past_key_values),
    )


def test_graphs_leave_masks_with_gaps_alone(recorder, monkeypatch):
    messages = []
    monkeypatch.setattr(generation.logger, "warning_once", messages.append)
    model = hadacore_model("llama")
    enable_cuda_graphs(model)
    ids, mask = token_ids(2, LENGTH), torch.ones(2, LENGTH, dtype=torch.int64)
    mask[1, 3:5] = 0
    inputs = {"inputs": ids, "attention_mask": mask}
    got = generate(model, inputs=inputs, new=12)
    assert "padding on the right" in messages[0] and recorder.captures == 0
    assert torch.equal(teacher_forced(model, got, LENGTH, mask).argmax(-1), got[:, LENGTH:])


@pytest.mark.parametrize("name", ["llama", "gemma3+sliding"])
def test_beam_search(small_buffers, name):
    model = hadacore_model(name)
    got = generate(
        model, new=25, num_beams=3, length_penalty=0.0, return_dict_in_generate=True, output_scores=True
    )
    logits = teacher_forced(model, got.sequences, LENGTH)
    chosen = logits.log_softmax(-1).gather(2, got.sequences[:, LENGTH:, None]).sum((1, 2))
    torch.testing.assert_close(got.sequences_scores, chosen, rtol=1e-3, atol=1e-2)
    greedy = generate(model, new=25)
    alone = teacher_forced(model, greedy, LENGTH).log_softmax(-1).gather(2, greedy[:, LENGTH:, None])
    assert chosen.sum() > alone.sum()


@pytest.mark.parametrize("name", ["llama", "gemma3+sliding", "mistral"])
@pytest.mark.parametrize("by", ["prompt", "assistant"])
def test_assisted_generation(small_buffers, name, by):
    model = hadacore_model(name)
    options = {"prompt_lookup_num_tokens": 3}
    if by == "assistant":
        options = {"assistant_model": hadacore_model("qwen3")}
    got = generate(model, inputs={"inputs": token_ids(1, 40)}, new=40, **options)
    logits = teacher_forced(model, got, 40)
    with torch.no_grad():
        without = model(got, use_cache=False).logits[:, 39:-1]
    chosen = logits.gather(2, got[:, 40:, None])[..., 0]
    # The first pass reads candidates, too, and so has another constant: what is close may change places.
    assert (logits.amax(-1) - chosen < 2 * (logits - without).abs().max()).all()
    assert (logits.argmax(-1) == got[:, 40:]).float().mean() > 0.7


def test_sampling_several_sequences():
    model = hadacore_model("llama")
    options = dict(do_sample=True, num_return_sequences=3, max_new_tokens=12)
    torch.manual_seed(0)
    got = model.generate(token_ids(2, LENGTH), **options)
    torch.manual_seed(0)
    assert torch.equal(model.generate(token_ids(2, LENGTH), **options), got)
    assert got.shape == (6, LENGTH + 12)


def test_chunked_prefill(small_buffers):
    model = hadacore_model("gemma3+sliding")
    ids = token_ids(2, 50)
    got = generate(model, inputs={"inputs": ids}, new=8, prefill_chunk_size=16)
    logits = logits_in_chunks(model, got, (16, 16, 16, 2, 8))[:, 49:-1]
    assert torch.equal(logits.argmax(-1), got[:, 50:])


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({}, HadaCoreCache),
        ({"cache_implementation": "dynamic"}, HadaCoreCache),
        ({"cache_implementation": "static"}, "StaticCache"),
        ({"use_cache": False}, None),
    ],
)
def test_which_cache_generate_makes(options, kind):
    model = hadacore_model("llama")
    got = generate(model, new=4, return_dict_in_generate=True, **options)
    if kind is None:
        assert got.past_key_values is None
    else:
        assert type(got.past_key_values).__name__ == getattr(kind, "__name__", kind)
    model.set_attn_implementation("sdpa")
    got = generate(model, new=4, return_dict_in_generate=True)
    assert type(got.past_key_values) is DynamicCache


def test_int4_weights(llama_dir, recorder):
    config = HadaCoreConfig(attention="int8-fp8")
    model = AutoModelForCausalLM.from_pretrained(llama_dir, quantization_config=config, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    got = generate(model, new=12)
    assert recorder.replays == 10
    assert torch.equal(teacher_forced(model, got, LENGTH).argmax(-1), got[:, LENGTH:])
