"""What decode graphs do not serve, and what becomes of them when a model changes."""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import token_ids
from transformers import CompileConfig
from varied_models import LENGTH, plain, varied_model

from hf_hadacore.decoding import generation
from hf_hadacore.decoding.generation import disable_cuda_graphs, enable_cuda_graphs
from hf_hadacore.modules.stream_rotation import StreamRotation, rotate_stream

pytestmark = pytest.mark.transformers_versions


@pytest.fixture
def warnings(monkeypatch) -> list[str]:
    messages: list[str] = []
    monkeypatch.setattr(generation.logger, "warning_once", messages.append)
    return messages


@pytest.fixture
def llama(recorder):
    model = varied_model("llama")
    enable_cuda_graphs(model)
    return model


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"num_beams": 3}, "beam search is not supported"),
        ({"prompt_lookup_num_tokens": 3}, "assisted generation is not supported"),
        ({"return_dict_in_generate": True, "output_hidden_states": True}, "output_hidden_states are not"),
    ],
)
def test_what_is_not_supported_falls_back_and_says_so(llama, recorder, warnings, options, reason):
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
    assert recorder.captures == 0
    (message,) = warnings
    assert reason in message
    # ... and the next call is served again.
    llama.generate(ids, do_sample=False, max_new_tokens=8)
    assert recorder.replays == 6


@pytest.mark.parametrize(
    "options",
    [
        {"disable_compile": True},
        {"cache_implementation": "dynamic"},
        {"use_cache": False},
        {"compile_config": CompileConfig(backend="eager")},
    ],
)
def test_an_explicit_wish_wins_silently(llama, recorder, warnings, options):
    llama.generate(token_ids(1, LENGTH), do_sample=False, max_new_tokens=4, **options)
    assert recorder.captures == 0 and not warnings


def test_the_models_state_can_speak_against_it(recorder, warnings):
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
    # The rotation of a residual stream consists of kernels alone.
    rotate_stream(model, StreamRotation("model.embed_tokens", "model.norm"))
    assert reason(model) == ""

    # Other hooks of this package, as calibration and evaluation register them, may do anything.
    def see(*_):
        pass

    see.__module__ = generation.__name__
    handle = model.lm_head.register_forward_pre_hook(see)
    assert "lm_head has a forward hook" in reason(model)
    handle.remove()
    # transformers' own hooks do nothing unless asked to.
    model(token_ids(), output_hidden_states=True)
    assert reason(model) == ""
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    assert "adapters" in reason(adapted)
    assert reason(adapted.merge_and_unload()) == ""


def test_a_model_that_cannot_be_captured(recorder, warnings):
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
    assert recorder.captures == 0
    assert all("cannot be captured" in message for message in warnings) and warnings


def test_changed_weights_make_new_graphs(llama, recorder):
    ids = token_ids(2, LENGTH)
    options = dict(do_sample=False, max_new_tokens=12)
    for change in (
        lambda: llama.load_state_dict({k: v.flip(0) for k, v in llama.state_dict().items()}),
        lambda: setattr(llama.lm_head, "weight", torch.nn.Parameter(llama.lm_head.weight.flip(1))),
        lambda: llama.half().float(),
    ):
        captures = recorder.captures
        before = llama.generate(ids, **options)
        change()
        expected = plain(llama, ids, **options)
        assert torch.equal(llama.generate(ids, **options), expected)
        assert recorder.captures > captures
        del before


def test_inference_mode_and_back(llama, recorder):
    ids = token_ids(2, LENGTH)
    expected = plain(llama, ids, do_sample=False, max_new_tokens=6)
    for inference in (True, False, True):
        with torch.inference_mode(inference):
            assert torch.equal(llama.generate(ids, do_sample=False, max_new_tokens=6), expected)
    assert recorder.captures == 3


def test_copies_pickles_and_files_of_a_model(llama, recorder, tmp_path):
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
        captures = recorder.captures
        assert torch.equal(twin.generate(ids, **options), plain(twin, ids, **options))
        assert recorder.captures > captures
    assert torch.equal(llama.generate(ids, **options), expected)


def test_a_deleted_model_is_freed_at_once(recorder):
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


def test_disabling_frees_and_restores(llama, recorder):
    ids = token_ids(1, LENGTH)
    expected = llama.generate(ids, do_sample=False, max_new_tokens=6)
    session = weakref.ref(llama.get_compiled_call.__self__._session)
    disable_cuda_graphs(llama)
    assert session() is None
    replays = recorder.replays
    assert torch.equal(llama.generate(ids, do_sample=False, max_new_tokens=6), expected)
    assert recorder.replays == replays
    disable_cuda_graphs(llama)  # twice changes nothing


def test_two_threads_do_not_share_a_cache(llama, recorder):
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


def test_a_failed_generation_leaves_nothing_behind(llama, recorder):
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
