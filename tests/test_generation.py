"""`generate` with decode graphs gives the tokens of plain `generate`.

`graph_recorder` stands in for CUDA's capture; everything else is what runs on a GPU.
"""

import inspect

import pytest
import torch
from tiny_models import make_model, token_ids
from transformers import AttentionInterface, AutoModelForCausalLM, CompileConfig, GenerationMixin
from transformers.cache_utils import DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, create_masks_for_generate, sdpa_mask
from varied_models import LENGTH, WINDOW, left_padded, plain, varied_model

from hf_hadacore import HadaCoreConfig
from hf_hadacore.attention import decode_cache
from hf_hadacore.decoding.generation import DecodeGraphs, enable_cuda_graphs

pytestmark = pytest.mark.transformers_versions


@pytest.fixture
def llama(recorder):
    model = varied_model("llama")
    enable_cuda_graphs(model)
    return model


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "gpt-oss", "gemma3+sliding", "gpt-oss+sliding"])
@pytest.mark.parametrize("padded", [False, True])
def test_greedy_tokens_are_those_of_plain_generate(recorder, name, padded):
    model = varied_model(name)
    inputs = left_padded() if padded else {"inputs": token_ids(2, LENGTH)}
    options = dict(**inputs, do_sample=False, max_new_tokens=30)
    expected = model.generate(**options)
    assert len(expected[0, LENGTH:].unique()) > 5  # not one token for ever

    enable_cuda_graphs(model)
    assert torch.equal(model.generate(**options), expected)
    # A window that fills up on the way needs a second graph; each has a first step without one.
    graphs = 2 if "sliding" in name else 1
    assert (recorder.captures, recorder.replays) == (graphs, 29 - graphs)
    assert torch.equal(model.generate(**options), expected)
    assert (recorder.captures, recorder.replays) == (graphs, 29 - graphs + 29)


@pytest.fixture
def renamed_sdpa():
    """The name of an attention function that transformers' own masks are for."""
    name = "renamed_sdpa"
    AttentionInterface.register(name, sdpa_attention_forward)
    AttentionMaskInterface.register(name, sdpa_mask)
    yield name
    del AttentionInterface._global_mapping[name], AttentionMaskInterface._global_mapping[name]


@pytest.mark.parametrize("is_sdpa", [True, False])
@pytest.mark.parametrize("padded", [False, True])
def test_masks_are_made_in_the_graph(recorder, monkeypatch, renamed_sdpa, is_sdpa, padded):
    model = varied_model("gemma3+sliding")
    if not is_sdpa:
        model.set_attn_implementation(renamed_sdpa)
    made = []

    def counted(*args, **kwargs):
        made.append(kwargs["past_key_values"].layers[0].length)
        return create_masks_for_generate(*args, **kwargs)

    monkeypatch.setattr(type(model), "create_masks_for_generate", staticmethod(counted), raising=False)
    enable_cuda_graphs(model)
    inputs = left_padded() if padded else {"inputs": token_ids(2, LENGTH)}
    model.generate(**inputs, do_sample=False, max_new_tokens=30)
    # The prompt's, and for other attention those of steps that push out a token.
    assert made == ([0] if is_sdpa else [0, *range(WINDOW, LENGTH + 29)])
    assert recorder.captures == 2


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt-oss", "gemma3", "gemma3+sliding"])
@pytest.mark.parametrize("padded", [False, True])
def test_a_steps_inputs_are_those_that_transformers_would_make(recorder, monkeypatch, name, padded):
    steps = []
    make_inputs = DecodeGraphs.prepare_inputs_for_generation

    def compared(self, input_ids, past_key_values=None, **kwargs):
        got = make_inputs(self, input_ids, past_key_values=past_key_values, **kwargs)
        general = GenerationMixin.prepare_inputs_for_generation
        want = general(self._model, input_ids, past_key_values=past_key_values, **kwargs)
        assert list(got) == list(want) and got.pop("past_key_values") is want.pop("past_key_values")
        torch.testing.assert_close(got, want, rtol=0, atol=0)
        got["past_key_values"] = past_key_values
        steps.append(got["input_ids"].shape[1])
        return got

    compared.__signature__ = inspect.signature(make_inputs)
    monkeypatch.setattr(DecodeGraphs, "prepare_inputs_for_generation", compared)
    model = varied_model(name)
    enable_cuda_graphs(model)
    inputs = left_padded() if padded else {"inputs": token_ids(2, LENGTH)}
    model.generate(**inputs, do_sample=False, max_new_tokens=5)
    assert steps[1:] == [1] * 4 and recorder.replays > 0


@pytest.mark.parametrize("name", ["llama", "gemma3+sliding"])
@pytest.mark.parametrize("options", [{}, {"top_k": 10, "temperature": 0.7}, {"repetition_penalty": 1.3}])
def test_sampling_under_a_seed_gives_the_same_tokens(recorder, name, options):
    model = varied_model(name)
    enable_cuda_graphs(model)
    options = dict(**left_padded(), do_sample=True, max_new_tokens=20, num_return_sequences=2, **options)
    torch.manual_seed(3)
    expected = model.generate(disable_compile=True, **options)
    for _ in range(2):
        torch.manual_seed(3)
        assert torch.equal(model.generate(**options), expected)
    assert recorder.replays > 30


@pytest.mark.parametrize("name", ["llama", "gpt-oss+sliding"])
def test_calls_of_other_lengths_and_batches(recorder, monkeypatch, name):
    monkeypatch.setattr(decode_cache, "bucket", lambda length: -(-length // 16) * 16)
    model = varied_model(name)
    enable_cuda_graphs(model)
    for batch, length, new in (
        (1, 9, 5),
        (1, 20, 9),
        (1, 3, 60),
        (4, 9, 9),
        (1, 9, 9),
        (2, 1, 12),
        (2, 2, 1),
    ):
        ids = token_ids(batch, length)
        options = dict(do_sample=False, max_new_tokens=new)
        assert torch.equal(model.generate(ids, **options), plain(model, ids, **options))


@pytest.mark.parametrize("name", ["llama", "gemma3+sliding"])
def test_buffers_grow_during_a_generation(recorder, monkeypatch, name):
    monkeypatch.setattr(decode_cache, "bucket", lambda length: -(-length // 4) * 4)
    monkeypatch.setattr(decode_cache, "_ROOM", 2)
    model = varied_model(name)
    enable_cuda_graphs(model)
    ids = token_ids(2, LENGTH)
    options = dict(do_sample=False, max_new_tokens=50)
    assert torch.equal(model.generate(ids, **options), plain(model, ids, **options))
    assert recorder.captures > 2 and recorder.replays > 40


def test_memory_follows_what_is_generated_not_what_is_allowed(llama):
    llama.generate(token_ids(1, LENGTH), max_new_tokens=100_000, eos_token_id=list(range(96)))
    assert llama.generate.__self__ is llama
    layer = llama.get_compiled_call.__self__._session.layers[0]
    assert layer.keys.shape[2] == decode_cache.bucket(LENGTH + 1024)


@pytest.mark.parametrize("options", [{"min_new_tokens": 12}, {"min_new_tokens": 4}, {}])
def test_stops_at_eos(llama, recorder, options):
    ids = token_ids(3, LENGTH)
    free = plain(llama, ids, do_sample=False, max_new_tokens=30)
    options = dict(do_sample=False, max_new_tokens=30, eos_token_id=free[:, LENGTH + 6].tolist(), **options)
    expected = plain(llama, ids, **options)
    assert torch.equal(llama.generate(ids, **options), expected)
    assert recorder.replays > 0


def test_chunked_prefill(llama, recorder):
    ids = token_ids(2, 23)
    options = dict(do_sample=False, max_new_tokens=8, prefill_chunk_size=5)
    assert torch.equal(llama.generate(ids, **options), plain(llama, ids, **options))
    assert recorder.replays == 6


@pytest.mark.parametrize("name", ["llama", "gemma3+sliding"])
def test_returned_scores_and_cache_are_the_callers_own(recorder, name):
    model = varied_model(name)
    enable_cuda_graphs(model)
    ids = token_ids(2, LENGTH)
    options = dict(
        do_sample=False,
        max_new_tokens=14,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
    )
    expected = plain(model, ids, **options)
    got = model.generate(ids, **options)
    model.generate(token_ids(2, 5), **options)  # would overwrite what was not copied
    assert torch.equal(got.sequences, expected.sequences)
    for one, other in ((got.scores, expected.scores), (got.logits, expected.logits)):
        # Attention over a masked buffer sums in another order.
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert type(got.past_key_values) is DynamicCache
    for layer, reference in zip(got.past_key_values.layers, expected.past_key_values.layers, strict=True):
        torch.testing.assert_close(layer.keys, reference.keys, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(layer.values, reference.values, rtol=1e-4, atol=1e-4)
        assert layer.get_seq_length() == reference.get_seq_length()

    follow_up = torch.cat([got.sequences, token_ids(2, 4)], dim=1)
    more = dict(do_sample=False, max_new_tokens=9)
    assert torch.equal(
        model.generate(follow_up, past_key_values=got.past_key_values, **more),
        plain(model, follow_up, past_key_values=expected.past_key_values, **more),
    )


def test_later_steps_leave_an_output_alone(llama, monkeypatch):
    step, kept = DecodeGraphs._step, []

    def keeping(self, **inputs):
        kept.append(step(self, **inputs))
        return kept[-1]

    monkeypatch.setattr(DecodeGraphs, "_step", keeping)
    options = dict(max_new_tokens=8, return_dict_in_generate=True, output_logits=True)
    got = llama.generate(token_ids(2, LENGTH), **options)
    for output, logits in zip(kept, got.logits[1:], strict=True):
        assert torch.equal(output.logits[:, -1], logits)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_int4_models_use_graphs_unless_told_not_to(recorder, tmp_path, name):
    make_model(name, torch.float32).save_pretrained(tmp_path / name)
    ids = token_ids(2, LENGTH)
    options = dict(do_sample=False, max_new_tokens=10)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / name, quantization_config=HadaCoreConfig())
    assert torch.equal(model.generate(ids, **options), plain(model, ids, **options))
    assert recorder.replays == 8
    model.save_pretrained(tmp_path / "int4")

    for quantization in (HadaCoreConfig(cuda_graphs=False), HadaCoreConfig(dequantize=True)):
        other = AutoModelForCausalLM.from_pretrained(tmp_path / "int4", quantization_config=quantization)
        other.generate(ids, **options)
    model.dequantize()
    model.generate(ids, **options)
    assert recorder.replays == 8


def test_int4_compiles_in_one_graph(tmp_path):
    make_model("llama", torch.float32).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=HadaCoreConfig())
    ids = token_ids(2, LENGTH)
    options = dict(do_sample=False, max_new_tokens=6)
    compiled = CompileConfig(backend="aot_eager", fullgraph=True, mode=None)
    compiled._compile_all_devices = True
    got = model.generate(ids, cache_implementation="static", compile_config=compiled, **options)
    assert model._compiled_call is not None
    assert torch.equal(got, plain(model, ids, **options))


def test_graphs_repeat_no_keys(llama, monkeypatch):
    rows = set()
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def watched(query, key, value, **options):
        assert options["attn_mask"] is None or options["attn_mask"].is_floating_point()
        rows.add((query.shape[2], key.shape[1]))
        return sdpa(query, key, value, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    llama.generate(token_ids(2, LENGTH), max_new_tokens=6)
    # The prompt; then 4 query heads on 2 key heads.
    assert rows == {(LENGTH, 2), (2, 2)}
    assert llama.config._attn_implementation == "sdpa"


def test_what_the_first_step_prepares_does_not_count(llama, recorder):
    verdicts = iter(["waits", None])
    recorder.rehearse = lambda function: (function(), next(verdicts))
    llama.generate(token_ids(2, LENGTH), max_new_tokens=8)
    assert (recorder.captures, recorder.replays) == (1, 5)
