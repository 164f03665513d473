"""`generate` with decode graphs gives the tokens of plain `generate`, and falls back where it cannot serve.

`graph_recorder` stands in for CUDA's capture; everything else is what runs on a GPU.
"""

import copy
import gc
import inspect
import pickle
import threading
import weakref

import pytest
import torch
from graph_recorder import CountedCaptures
from peft import LoraConfig, get_peft_model
from tiny_models import make_model, token_ids
from transformers import AutoModelForCausalLM, CompileConfig, GenerationMixin
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from varied_models import LENGTH, left_padded, varied_model

from hf_hadacore import HadaCoreConfig
from hf_hadacore.attention import decode_cache
from hf_hadacore.attention.decode_attention import decode_attention_forward
from hf_hadacore.attention.decode_cache import DecodeCache, DecodeLayer, Progress
from hf_hadacore.decoding import generation
from hf_hadacore.decoding.generation import DecodeGraphs, disable_cuda_graphs, enable_cuda_graphs

pytestmark = pytest.mark.transformers_versions


@pytest.fixture
def calls(monkeypatch) -> CountedCaptures:
    """Graphs on the CPU, counted."""
    counted = CountedCaptures()
    monkeypatch.setattr(DecodeGraphs, "device_types", ("cpu",))
    monkeypatch.setattr(DecodeGraphs, "capture", counted)
    return counted


@pytest.fixture
def warnings(monkeypatch) -> list[str]:
    messages: list[str] = []
    monkeypatch.setattr(generation.logger, "warning_once", messages.append)
    return messages


@pytest.fixture
def llama(calls):
    model = varied_model("llama")
    enable_cuda_graphs(model)
    return model


def plain(model, ids, **options):
    """transformers' own `generate`."""
    return model.generate(ids, disable_compile=True, **options)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "gpt-oss", "gemma3+sliding", "gpt-oss+sliding"])
@pytest.mark.parametrize("padded", [False, True])
def test_greedy_tokens_are_those_of_plain_generate(calls, name, padded):
    model = varied_model(name)
    inputs = left_padded() if padded else {"inputs": token_ids(2, LENGTH)}
    options = dict(**inputs, do_sample=False, max_new_tokens=30)
    expected = model.generate(**options)
    assert len(expected[0, LENGTH:].unique()) > 5  # not one token for ever

    enable_cuda_graphs(model)
    assert torch.equal(model.generate(**options), expected)
    # A window that fills up on the way needs a second graph; each has a first step without one.
    graphs = 2 if "sliding" in name else 1
    assert (calls.captures, calls.replays) == (graphs, 29 - graphs)
    assert torch.equal(model.generate(**options), expected)
    assert (calls.captures, calls.replays) == (graphs, 29 - graphs + 29)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt-oss"])
@pytest.mark.parametrize("padded", [False, True])
def test_a_steps_inputs_are_those_that_transformers_would_make(calls, monkeypatch, name, padded):
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
    assert steps[1:] == [1] * 4 and calls.replays > 0


@pytest.mark.parametrize("name", ["llama", "gemma3+sliding"])
@pytest.mark.parametrize("options", [{}, {"top_k": 10, "temperature": 0.7}, {"repetition_penalty": 1.3}])
def test_sampling_under_a_seed_gives_the_same_tokens(calls, name, options):
    model = varied_model(name)
    enable_cuda_graphs(model)
    options = dict(**left_padded(), do_sample=True, max_new_tokens=20, num_return_sequences=2, **options)
    torch.manual_seed(3)
    expected = model.generate(disable_compile=True, **options)
    for _ in range(2):
        torch.manual_seed(3)
        assert torch.equal(model.generate(**options), expected)
    assert calls.replays > 30


@pytest.mark.parametrize("name", ["llama", "gpt-oss+sliding"])
def test_calls_of_other_lengths_and_batches(calls, monkeypatch, name):
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
def test_buffers_grow_during_a_generation(calls, monkeypatch, name):
    monkeypatch.setattr(decode_cache, "bucket", lambda length: -(-length // 4) * 4)
    monkeypatch.setattr(decode_cache, "_ROOM", 2)
    model = varied_model(name)
    enable_cuda_graphs(model)
    ids = token_ids(2, LENGTH)
    options = dict(do_sample=False, max_new_tokens=50)
    assert torch.equal(model.generate(ids, **options), plain(model, ids, **options))
    assert calls.captures > 2 and calls.replays > 40


def test_memory_follows_what_is_generated_not_what_is_allowed(llama):
    llama.generate(token_ids(1, LENGTH), max_new_tokens=100_000, eos_token_id=list(range(96)))
    assert llama.generate.__self__ is llama
    layer = llama.get_compiled_call.__self__._session.layers[0]
    assert layer.keys.shape[2] == decode_cache.bucket(LENGTH + 1024)


@pytest.mark.parametrize("options", [{"min_new_tokens": 12}, {"min_new_tokens": 4}, {}])
def test_stops_at_eos(llama, calls, options):
    ids = token_ids(3, LENGTH)
    free = plain(llama, ids, do_sample=False, max_new_tokens=30)
    options = dict(do_sample=False, max_new_tokens=30, eos_token_id=free[:, LENGTH + 6].tolist(), **options)
    expected = plain(llama, ids, **options)
    assert torch.equal(llama.generate(ids, **options), expected)
    assert calls.replays > 0


def test_chunked_prefill(llama, calls):
    ids = token_ids(2, 23)
    options = dict(do_sample=False, max_new_tokens=8, prefill_chunk_size=5)
    assert torch.equal(llama.generate(ids, **options), plain(llama, ids, **options))
    assert calls.replays == 6


@pytest.mark.parametrize("name", ["llama", "gemma3+sliding"])
def test_returned_scores_and_cache_are_the_callers_own(calls, name):
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


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"num_beams": 3}, "beam search is not supported"),
        ({"prompt_lookup_num_tokens": 3}, "assisted generation is not supported"),
        ({"return_dict_in_generate": True, "output_hidden_states": True}, "output_hidden_states are not"),
    ],
)
def test_what_is_not_supported_falls_back_and_says_so(llama, calls, warnings, options, reason):
    ids = token_ids(1, LENGTH)
    options = dict(do_sample=False, max_new_tokens=8, **options)
    expected = plain(llama, ids, **options)
    assert not warnings
    got = llama.generate(ids, **options)
    if isinstance(got, torch.Tensor):
        assert torch.equal(got, expected)
    else:
        assert torch.equal(got.sequences, expected.sequences)
        assert len(got.hidden_states) == 8
    assert calls.captures == 0
    (message,) = warnings
    assert reason in message
    # ... and the next call is served again.
    llama.generate(ids, do_sample=False, max_new_tokens=8)
    assert calls.replays == 6


@pytest.mark.parametrize(
    "options",
    [
        {"disable_compile": True},
        {"cache_implementation": "dynamic"},
        {"use_cache": False},
        {"compile_config": CompileConfig(backend="eager")},
    ],
)
def test_an_explicit_wish_wins_silently(llama, calls, warnings, options):
    llama.generate(token_ids(1, LENGTH), do_sample=False, max_new_tokens=4, **options)
    assert calls.captures == 0 and not warnings


def test_the_models_state_can_speak_against_it(calls, warnings):
    def reason(model) -> str:
        warnings.clear()
        model.generate(token_ids(1, LENGTH), do_sample=False, max_new_tokens=4)
        return warnings[0] if warnings else ""

    model = varied_model("llama")
    enable_cuda_graphs(model)
    assert reason(model) == ""
    handle = model.model.layers[0].register_forward_hook(lambda *_: None)
    assert "model.layers.0 has a forward hook" in reason(model)
    handle.remove()
    assert "training mode" in reason(model.train())
    model.eval().hf_device_map = {"model": 0, "lm_head": 1}
    assert "several devices" in reason(model)
    del model.hf_device_map
    forward = model.forward
    model.forward = torch.compile(forward, backend="eager")
    assert "forward was replaced" in reason(model)
    del model.forward
    assert reason(model) == ""
    # transformers' own hooks do nothing unless asked to.
    model(token_ids(), output_hidden_states=True)
    assert reason(model) == ""
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    assert "adapters" in reason(adapted)
    assert reason(adapted.merge_and_unload()) == ""


def test_a_model_that_cannot_be_captured(calls, warnings):
    model = varied_model("llama")
    enable_cuda_graphs(model)
    rotary = model.model.rotary_emb
    forward = type(rotary).forward

    def reads_back(self, x, position_ids):
        position_ids.max().item()
        return forward(self, x, position_ids)

    rotary.__class__ = type("Rotary", (type(rotary),), {"forward": reads_back})
    ids = token_ids(2, LENGTH)
    options = dict(do_sample=False, max_new_tokens=12)
    expected = plain(model, ids, **options)
    for _ in range(2):
        assert torch.equal(model.generate(ids, **options), expected)
    assert calls.captures == 0
    assert all("cannot be captured" in message for message in warnings) and warnings


def test_changed_weights_make_new_graphs(llama, calls):
    ids = token_ids(2, LENGTH)
    options = dict(do_sample=False, max_new_tokens=12)
    for change in (
        lambda: llama.load_state_dict({k: v.flip(0) for k, v in llama.state_dict().items()}),
        lambda: setattr(llama.lm_head, "weight", torch.nn.Parameter(llama.lm_head.weight.flip(1))),
        lambda: llama.half().float(),
    ):
        captures = calls.captures
        before = llama.generate(ids, **options)
        change()
        expected = plain(llama, ids, **options)
        assert torch.equal(llama.generate(ids, **options), expected)
        assert calls.captures > captures
        del before


def test_inference_mode_and_back(llama, calls):
    ids = token_ids(2, LENGTH)
    expected = plain(llama, ids, do_sample=False, max_new_tokens=6)
    for inference in (True, False, True):
        with torch.inference_mode(inference):
            assert torch.equal(llama.generate(ids, do_sample=False, max_new_tokens=6), expected)
    assert calls.captures == 3


def test_copies_pickles_and_files_of_a_model(llama, calls, tmp_path):
    ids = token_ids(2, LENGTH)
    options = dict(do_sample=False, max_new_tokens=8)
    expected = llama.generate(ids, **options)
    twins = [copy.deepcopy(llama), pickle.loads(pickle.dumps(llama))]
    llama.save_pretrained(tmp_path)
    assert not any("graph" in path.read_text() for path in tmp_path.glob("*.json"))
    for twin in twins:
        hooks = twin.get_compiled_call.__self__
        assert hooks is not llama.get_compiled_call.__self__ and hooks._session is None
        with torch.no_grad():
            twin.lm_head.weight.neg_()
        captures = calls.captures
        assert torch.equal(twin.generate(ids, **options), plain(twin, ids, **options))
        assert calls.captures > captures
    assert torch.equal(llama.generate(ids, **options), expected)


def test_a_deleted_model_is_freed_at_once(calls):
    model = varied_model("llama")
    enable_cuda_graphs(model)
    model.generate(token_ids(1, LENGTH), do_sample=False, max_new_tokens=6)
    session = weakref.ref(model.get_compiled_call.__self__._session)
    gc.collect()
    gc.disable()
    try:
        gone = weakref.ref(model)
        del model
        assert gone() is None and session() is None
    finally:
        gc.enable()


def test_disabling_frees_and_restores(llama, calls):
    ids = token_ids(1, LENGTH)
    expected = llama.generate(ids, do_sample=False, max_new_tokens=6)
    session = weakref.ref(llama.get_compiled_call.__self__._session)
    disable_cuda_graphs(llama)
    assert session() is None
    replays = calls.replays
    assert torch.equal(llama.generate(ids, do_sample=False, max_new_tokens=6), expected)
    assert calls.replays == replays
    disable_cuda_graphs(llama)  # twice changes nothing


def test_two_threads_do_not_share_a_cache(llama, calls):
    prompts = [token_ids(1, 5), token_ids(2, 12)]
    options = dict(do_sample=False, max_new_tokens=25)
    expected = [plain(llama, ids, **options) for ids in prompts]
    together = threading.Barrier(2)
    results: list[torch.Tensor | None] = [None, None]

    class Meet:
        """Both threads are in the middle of their generation at once."""

        def __call__(self, input_ids, scores, **kwargs):
            together.wait(timeout=60)
            return torch.zeros(len(input_ids), dtype=torch.bool)

    def work(index: int) -> None:
        results[index] = llama.generate(prompts[index], stopping_criteria=[Meet()], **options)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(got, want) for got, want in zip(results, expected, strict=True))


def test_a_failed_generation_leaves_nothing_behind(llama, calls):
    ids = token_ids(2, LENGTH)
    options = dict(do_sample=False, max_new_tokens=10)
    expected = plain(llama, ids, **options)

    def fails(input_ids, scores, **kwargs):
        if input_ids.shape[1] > LENGTH + 4:
            raise KeyboardInterrupt
        return torch.zeros(len(input_ids), dtype=torch.bool)

    with pytest.raises(KeyboardInterrupt):
        llama.generate(ids, stopping_criteria=[fails], **options)
    assert torch.equal(llama.generate(ids, **options), expected)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_int4_models_use_graphs_unless_told_not_to(calls, tmp_path, name):
    make_model(name, torch.float32).save_pretrained(tmp_path / name)
    ids = token_ids(2, LENGTH)
    options = dict(do_sample=False, max_new_tokens=10)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / name, quantization_config=HadaCoreConfig())
    assert torch.equal(model.generate(ids, **options), plain(model, ids, **options))
    assert calls.replays == 8
    model.save_pretrained(tmp_path / "int4")

    for quantization in (HadaCoreConfig(cuda_graphs=False), HadaCoreConfig(dequantize=True)):
        other = AutoModelForCausalLM.from_pretrained(tmp_path / "int4", quantization_config=quantization)
        other.generate(ids, **options)
    model.dequantize()
    model.generate(ids, **options)
    assert calls.replays == 8


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


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("chunks", [(3,), (5,), (9,), (2, 2, 7), (4, 1, 1), (6, 3, 1, 1), (1,) * 12])
def test_appending_is_a_dynamic_layer(monkeypatch, window, chunks):
    monkeypatch.setattr(decode_cache, "bucket", lambda length: -(-length // 4) * 4)
    monkeypatch.setattr(decode_cache, "_ROOM", 1)
    layer = DecodeLayer(window, Progress())
    reference = DynamicLayer() if window is None else DynamicSlidingWindowLayer(sliding_window=window)
    for chunk in chunks:
        states = torch.randn(2, 2, 3, chunk, 4)
        assert layer.get_mask_sizes(chunk) == reference.get_mask_sizes(chunk)
        for got, want in zip(layer.update(*states), reference.update(*states), strict=True):
            assert torch.equal(got, want)
        assert layer.get_seq_length() == reference.get_seq_length()
    assert torch.equal(layer.contents()[0], reference.keys)


@pytest.mark.parametrize("prompt", [2, 5, 9])
def test_decoding_steps_of_a_window(prompt):
    window, steps = 5, 8
    layer = DecodeLayer(window, Progress())
    cache = DecodeCache([layer], limit=prompt + steps, keep=False)
    states = torch.randn(2, 2, 3, prompt + steps, 4)
    layer.update(*states[:, :, :, :prompt])
    cache.start_decoding()
    for now in range(prompt, prompt + steps):
        size, first = layer.get_mask_sizes(1)
        keys, _ = layer.update(*states[:, :, :, now : now + 1])
        cache.progress.position.add_(1)
        assert keys.shape[2] == size == window
        seen = range(first, min(first + size, now + 1))
        assert torch.equal(keys[:, :, : len(seen)], states[0][:, :, first : now + 1])


@pytest.mark.parametrize("heads", [2, 8])
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("kind", ["boolean", "additive", "none"])
def test_decode_attention_is_sdpa(heads, tokens, kind):
    query = torch.randn(3, heads, tokens, 16)
    key, value = torch.randn(2, 3, 2, 24, 16)
    mask = torch.rand(3, 1, tokens, 24) < 0.7
    mask[..., 5] = True
    masks = {
        "boolean": mask,
        "none": None,
        "additive": torch.zeros(mask.shape).masked_fill(~mask, -torch.inf),
    }
    module = torch.nn.Module()
    module.num_key_value_groups = heads // 2
    expected, _ = sdpa_attention_forward(module, query, key, value, masks[kind], scaling=0.3)
    got, weights = decode_attention_forward(module, query, key, value, masks[kind], scaling=0.3)
    torch.testing.assert_close(got, expected)
    assert weights is None


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


def test_what_the_first_step_prepares_does_not_count(llama, calls):
    verdicts = iter(["waits", None])
    calls.rehearse = lambda function: (function(), next(verdicts))
    llama.generate(token_ids(2, LENGTH), max_new_tokens=8)
    assert (calls.captures, calls.replays) == (1, 5)
