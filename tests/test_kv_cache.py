"""The 8-bit cache: what it stores, and that models compute with it what they compute without."""

import copy

import pytest
import torch
from graph_recorder import CountedCaptures
from tiny_models import TINY_CONFIGS, token_ids
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    DynamicCache,
    Gemma3TextConfig,
    MistralConfig,
    Qwen3NextConfig,
)
from varied_models import LENGTH, left_padded, varied_model

from hf_hadacore import HadaCoreCache, HadaCoreConfig
from hf_hadacore.attention import decode_cache, kv_cache, kv_layer
from hf_hadacore.attention.decode_cache import Progress
from hf_hadacore.attention.kv_layer import Cursor, HadaCoreLayer
from hf_hadacore.decoding import generation
from hf_hadacore.decoding.generation import DecodeGraphs, enable_cuda_graphs
from hf_hadacore.errors import ConfigError, UnsupportedError
from hf_hadacore.hadamard_matrices import hadamard_matrix
from hf_hadacore.kernels.attention_reference import deinterleave_tokens

pytestmark = pytest.mark.transformers_versions

HEADS, D = 2, 64
# A sum in another order may push a number of the second layer's over the edge between two 8-bit ones.
CLOSE = 0.01
MODELS = ["llama", "qwen3", "gemma3+sliding", "gpt-oss+sliding", "mistral"]


@pytest.fixture
def small_buffers(monkeypatch):
    """Buffers that grow, and windows that move, every few tokens."""
    monkeypatch.setattr(decode_cache, "bucket", lambda length: -(-length // 16) * 16)
    monkeypatch.setattr(decode_cache, "_ROOM", 8)
    monkeypatch.setattr(kv_layer, "window_room", lambda window: window + 31)
    monkeypatch.setattr(kv_layer, "BUFFER_STEP", 16)


def hadacore_model(name: str, implementation: str = "hadacore"):
    if name == "mistral":
        torch.manual_seed(0)
        common = TINY_CONFIGS["llama"]().to_dict()
        keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        config = MistralConfig(**{key: common[key] for key in keys}, num_key_value_heads=2, sliding_window=12)
        model = AutoModelForCausalLM.from_config(config).eval()
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0, 0.3)
    else:
        model = varied_model(name)
    model.set_attn_implementation(implementation)
    return model


def make_layer(window: int | None = None, dtype: torch.dtype = torch.float8_e4m3fn) -> HadaCoreLayer:
    progress = Progress()
    return HadaCoreLayer(window, progress, Cursor(progress), True, dtype)


def states(batch: int, tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    key, value = torch.randn(
        2, batch, HEADS, tokens, D, generator=torch.Generator().manual_seed(seed)
    ).bfloat16()
    return key + 4, value


def contents(layer: HadaCoreLayer) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values in the buffers as they were before, fp32 ``[B, H, held, D]``."""
    held = layer.length - layer.first
    rotation = hadamard_matrix(D).float() / D**0.5
    keys = layer.keys.float() * layer.key_scale[..., None] @ rotation + layer.constant[:, :, None]
    values = deinterleave_tokens(layer.values.float(), layer.size).mT * layer.value_scale[..., None]
    return keys[:, :, :held], values[:, :, :held]


def assert_holds(layer: HadaCoreLayer, key: torch.Tensor, value: torch.Tensor) -> None:
    """That the buffers hold tokens, off by no more than 8 bits of the largest in 128 tokens make it."""
    got_key, got_value = contents(layer)
    first = layer.first
    centered = (key - layer.constant[:, :, None]).norm(dim=-1, keepdim=True)
    error = (got_key - key[:, :, first:]).norm(dim=-1, keepdim=True)
    if layer.key_dtype == torch.int8:
        assert (error <= centered.amax(2, keepdim=True) / 127 * D**0.5).all()
    else:
        assert (error <= 2**-4 * centered[:, :, first:] + 1e-2).all()
    assert ((got_value - value[:, :, first:]).abs() <= 2**-4 * value[:, :, first:].abs() + 1e-2).all()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
@pytest.mark.parametrize("window", [None, 5, 20])
@pytest.mark.parametrize("chunks", [(3,), (40,), (17, 1, 1), (40, 30, 2, 1), (1,) * 70, (150, 1, 70)])
def test_what_is_stored(small_buffers, dtype, window, chunks):
    layer = make_layer(window, dtype)
    key, value = states(3, sum(chunks))
    for chunk in chunks:
        start = layer.length
        size, first = layer.get_mask_sizes(chunk)
        new_key, new_value = (x[:, :, start : start + chunk] for x in (key, value))
        new, _ = layer.update(new_key, new_value)
        stored = new.store(new_key, None)
        assert layer.get_seq_length() == start + chunk
        # What masks are made for is what attention gets, at least.
        assert first + size == start + chunk
        assert stored.key.shape[2] >= size
        if stored.query_start is not None:
            assert first == layer.first and stored.query_start.tolist() == [start - first] * 3
        # The window of the oldest of the new tokens.
        assert first <= max(0, start - (window or 1000) + 1)
        assert layer.first % 16 == 0
        assert_holds(layer, key[:, :, : start + chunk], value[:, :, : start + chunk])
    torch.testing.assert_close(layer.constant, key[:, :, : chunks[0]].float().mean(2))
    if window is not None and sum(chunks) > 100:
        assert layer.size < sum(chunks)


def test_layers_share_what_says_where_tokens_go():
    progress = Progress()
    cursor = Cursor(progress)
    layers = [HadaCoreLayer(None, progress, cursor, i == 0, torch.int8) for i in range(2)]
    key, value = states(2, 9)
    starts = []
    for chunk in (slice(0, 5), slice(5, 6), slice(6, 9)):
        new = [key[:, :, chunk], value[:, :, chunk]]
        stored = [layer.update(*new)[0].store(new[0], None) for layer in layers]
        assert stored[0].query_start is stored[1].query_start
        if chunk.start:
            starts.append(stored[0].query_start.tolist())
    assert starts == [[5, 5], [6, 6]]


def test_padding_is_not_in_the_constant():
    layer = make_layer()
    key, value = states(2, 12)
    is_token = torch.ones(2, 12, dtype=torch.bool)
    is_token[1, :5] = False
    layer.update(key, value)[0].store(key, is_token)
    torch.testing.assert_close(layer.constant[0], key[0].float().mean(1))
    torch.testing.assert_close(layer.constant[1], key[1, :, 5:].float().mean(1))
    nothing = make_layer()
    nothing.update(key, value)[0].store(key, torch.zeros(2, 12, dtype=torch.bool))
    assert torch.equal(nothing.constant, torch.zeros(2, HEADS, D))


def test_bytes_per_token():
    common = dict(vocab_size=96, hidden_size=64, intermediate_size=64, num_hidden_layers=2, head_dim=64)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512)
    windows = dict(sliding_window=12, layer_types=["sliding_attention", "full_attention"])
    model = AutoModelForCausalLM.from_config(Gemma3TextConfig(**common, **heads, **windows)).bfloat16()
    ids = token_ids(3, 512)

    def filled(implementation: str, cache: DynamicCache) -> DynamicCache:
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            return model(ids, past_key_values=cache).past_key_values

    assert HadaCoreCache(model.config).bytes_per_token == 0
    cache = filled("hadacore", HadaCoreCache(model.config))
    plain = filled("sdpa", DynamicCache(config=model.config))
    # Of each head: half of what bf16 takes, and two fp32 scales.
    (window, full), reference = cache.layers, plain.layers[1]
    per_token = (reference.keys.nbytes + reference.values.nbytes) / (3 * 512)
    assert full.bytes_per_token == per_token / 2 + 2 * 2 * 4
    assert cache.bytes_per_token == 2 * full.bytes_per_token
    buffers = [full.keys, full.values, full.key_scale, full.value_scale]
    assert sum(buffer.nbytes for buffer in buffers) == full.size * 3 * full.bytes_per_token
    # No room for more than the prompt was asked for; windows hold what they see and some more.
    assert full.size == 512 and window.size == 256


def logits_in_chunks(model, ids, chunks, cache=None, mask=None):
    """Logits of tokens that are read in several forward passes."""
    cache = HadaCoreCache(model.config) if cache is None else cache
    parts, start = [], cache.get_seq_length()
    position = 0
    with torch.no_grad():
        for chunk in chunks:
            end = position + chunk
            inputs = {} if mask is None else {"attention_mask": mask[:, : start + end].long()}
            if mask is not None:
                positions = (mask.long().cumsum(1) - 1).masked_fill(~mask, 0)
                inputs["position_ids"] = positions[:, start + position : start + end]
            parts.append(model(ids[:, position:end], past_key_values=cache, **inputs).logits)
            position = end
    return torch.cat(parts, 1)


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("implementation", ["hadacore", "hadacore-int8-fp8"])
def test_with_a_cache_as_without(small_buffers, name, implementation):
    model = hadacore_model(name, implementation)
    ids = token_ids(2, 60)
    with torch.no_grad():
        without = model(ids, use_cache=False).logits
        model.set_attn_implementation("eager")
        exact = model(ids, use_cache=False).logits
        model.set_attn_implementation(implementation)
    # In one pass the same numbers go through the same products.
    assert torch.equal(logits_in_chunks(model, ids, (60,)), without)
    own = relative_error(without, exact)
    for chunks in ((30, 30), (30, 7, 1, 1, 1, 20), (20, *(1,) * 40)):
        got = logits_in_chunks(model, ids, chunks)
        # Another constant, and a scale for each token after the first pass.
        assert relative_error(got, exact) < 1.5 * own
    # With one constant, and scales of tokens, how tokens are grouped does not matter.
    one = logits_in_chunks(model, ids, (20, *(1,) * 40))
    assert relative_error(logits_in_chunks(model, ids, (20, 40)), one) < CLOSE
    assert own < 0.3


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(small_buffers, name, side):
    """A padded batch against its sequences alone."""
    model = hadacore_model(name)
    lengths, longest, new = (30, 17, 24), 30, 9
    rows = [token_ids(1, length + new) for length in lengths]
    ids, mask = torch.zeros(3, longest, dtype=torch.int64), torch.zeros(3, longest + new, dtype=torch.bool)
    for row, (length, tokens) in enumerate(zip(lengths, rows, strict=True)):
        where = slice(longest - length, longest) if side == "left" else slice(0, length)
        ids[row, where] = tokens[0, :length]
        mask[row, where] = True
    mask[:, longest:] = True
    ids = torch.cat([ids, torch.cat([tokens[:, -new:] for tokens in rows])], 1)
    got = logits_in_chunks(model, ids, (longest, 4, *(1,) * 5), mask=mask)
    for row, (length, tokens) in enumerate(zip(lengths, rows, strict=True)):
        alone = logits_in_chunks(model, tokens, (length, 4, *(1,) * 5))
        # Padding has a part in scales of 128 tokens. A window counts padding between two tokens as a token.
        kept = mask[row].clone()
        if side == "right" and name not in ("llama", "qwen3"):
            kept[longest:] = False
        assert relative_error(got[row, kept], alone[0, : kept.sum()]) < 0.15


@pytest.mark.parametrize("name", MODELS)
def test_sequences_are_reordered(small_buffers, name):
    model = hadacore_model(name)
    ids, more = token_ids(3, 30), token_ids(4, 8)
    for change, order in (
        (lambda cache: cache.reorder_cache(torch.tensor([2, 2, 0])), [2, 2, 0]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        (lambda cache: cache.batch_select_indices(torch.tensor([1, 2])), [1, 2]),
        (lambda cache: cache.batch_select_indices(torch.tensor([True, False, True])), [0, 2]),
    ):
        cache = HadaCoreCache(model.config)
        logits_in_chunks(model, ids, (25, 5), cache)
        change(cache)
        assert cache.batch_size == len(order)
        expected_cache = HadaCoreCache(model.config)
        logits_in_chunks(model, ids[order], (25, 5), expected_cache)
        following = more.repeat(2, 1)[: len(order)]
        got = logits_in_chunks(model, following, (3, 1, 4), cache)
        expected = logits_in_chunks(model, following, (3, 1, 4), expected_cache)
        assert relative_error(got, expected) < CLOSE


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("records", [False, True])
def test_crop(small_buffers, name, records):
    model = hadacore_model(name)
    ids = token_ids(2, 90)
    cache = HadaCoreCache(model.config)
    logits_in_chunks(model, ids[:, :40], (40,), cache)
    if records:
        cache.activate_past_recording()
    for start, wrong in ((40, 5), (46, 7), (54, 1), (56, 9)):
        expected_cache = copy.deepcopy(cache)
        if records:
            # Several passes, as of an assistant, taken back together.
            logits_in_chunks(model, token_ids(2, 4 * wrong), (wrong,) * 4, cache)
            cache.crop(-4 * wrong)
        else:
            logits_in_chunks(model, token_ids(2, wrong), (wrong,), cache)
            cache.crop(-wrong)
        assert cache.get_seq_length() == expected_cache.get_seq_length()
        chunk = ids[:, start : start + 6]
        got = logits_in_chunks(model, chunk, (6,), cache)
        expected = logits_in_chunks(model, chunk, (6,), expected_cache)
        assert relative_error(got, expected) < CLOSE
        cache.crop(0)
    assert cache.is_croppable


def test_crop_says_what_it_cannot():
    model = hadacore_model("gemma3+sliding")
    cache = HadaCoreCache(model.config)
    logits_in_chunks(model, token_ids(2, 300), (300,), cache)
    with pytest.raises(UnsupportedError, match="negative number, got 5"):
        cache.crop(5)
    with pytest.raises(UnsupportedError, match="a layer with a window of 12 has dropped"):
        cache.crop(-200)


def test_reset():
    model = hadacore_model("gemma3+sliding")
    cache = HadaCoreCache(model.config)
    expected = logits_in_chunks(model, token_ids(2, 20), (15, 5), cache)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(logits_in_chunks(model, token_ids(2, 20), (15, 5), cache), expected)


def test_what_a_cache_says_of_itself():
    model = hadacore_model("gemma3+sliding")
    cache = HadaCoreCache(model.config)
    assert len(cache) == 2 and cache.is_sliding == [True, False]
    assert cache.get_seq_length() == 0 and cache.get_max_length() == -1
    assert cache.get_mask_sizes(7, 0) == (7, 0)
    assert not cache.is_compileable and cache.is_croppable
    logits_in_chunks(model, token_ids(2, 20), (20,), cache)
    assert cache.get_seq_length() == 20 and cache.get_mask_sizes(2, 1) == (22, 0)


def test_offloaded_layers_come_and_go(monkeypatch):
    layer = make_layer()
    moves = []
    monkeypatch.setattr(layer, "_move", lambda device: moves.append(str(device)))
    key, value = states(2, 12)
    new, _ = layer.update(key, value)
    layer.offload()
    assert moves == []  # not before what is on its way has arrived
    new.store(key, None)
    assert moves == ["cpu"]
    layer.device = torch.device("meta")  # where it will be wanted
    layer.prefetch()
    assert moves == ["cpu", "meta"]


def test_which_models_and_modes():
    config = TINY_CONFIGS["llama"]()
    assert [layer.key_dtype for layer in HadaCoreCache(config).layers] == [torch.float8_e4m3fn] * 2
    assert HadaCoreCache(config, mode="int8-fp8").layers[0].key_dtype == torch.int8
    config._attn_implementation = "hadacore-int8-fp8"
    assert HadaCoreCache(config).layers[0].key_dtype == torch.int8
    with pytest.raises(ConfigError, match="mode must be one of"):
        HadaCoreCache(config, mode="fp4")
    for other in (Qwen3NextConfig(), DeepseekV3Config()):
        with pytest.raises(UnsupportedError, match=f"{type(other).__name__} cache something else"):
            HadaCoreCache(other)


def generate(model, *, inputs=None, new=30, **options):
    inputs = {"inputs": token_ids(2, LENGTH)} if inputs is None else inputs
    return model.generate(**inputs, do_sample=False, max_new_tokens=new, **options)


def teacher_forced(model, tokens, prompt, mask=None):
    """Logits of each new token, from one pass over all of them that follows one over the prompt."""
    if mask is not None:
        mask = torch.nn.functional.pad(mask, (0, tokens.shape[1] - prompt), value=1).bool()
    logits = logits_in_chunks(model, tokens, (prompt, tokens.shape[1] - prompt), mask=mask)
    return logits[:, prompt - 1 : -1]


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
def test_graphs(small_buffers, monkeypatch, name, padded):
    model = hadacore_model(name)
    inputs = left_padded() if padded else {"inputs": token_ids(2, LENGTH)}
    options = dict(inputs=inputs, new=45, return_dict_in_generate=True, output_logits=True)
    expected = generate(model, **options)
    calls = CountedCaptures()
    monkeypatch.setattr(DecodeGraphs, "device_types", ("cpu",))
    monkeypatch.setattr(DecodeGraphs, "capture", calls)
    enable_cuda_graphs(model)
    captures = []
    for _ in range(2):
        got = generate(model, **options)
        assert torch.equal(got.sequences, expected.sequences)
        assert relative_error(torch.stack(got.logits), torch.stack(expected.logits)) < CLOSE
        captures.append(calls.captures)
    # A step runs as it is, and another is captured, after each growth of the buffers; these are there then.
    assert captures[0] > 1 and captures[1] == captures[0]
    assert calls.replays == 2 * 44 - captures[0]
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


def test_graphs_leave_masks_with_gaps_alone(monkeypatch):
    messages = []
    monkeypatch.setattr(generation.logger, "warning_once", messages.append)
    calls = CountedCaptures()
    monkeypatch.setattr(DecodeGraphs, "device_types", ("cpu",))
    monkeypatch.setattr(DecodeGraphs, "capture", calls)
    model = hadacore_model("llama")
    enable_cuda_graphs(model)
    ids, mask = token_ids(2, LENGTH), torch.ones(2, LENGTH, dtype=torch.int64)
    mask[1, 3:5] = 0
    inputs = {"inputs": ids, "attention_mask": mask}
    got = generate(model, inputs=inputs, new=12)
    assert "padding on the right" in messages[0] and calls.captures == 0
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


def test_models_with_other_layers_say_so(monkeypatch):
    messages = []
    monkeypatch.setattr(kv_cache.logger, "warning_once", messages.append)
    torch.manual_seed(0)
    config = TINY_CONFIGS["gemma3"]()
    config.num_kv_shared_layers = 1
    config._attn_implementation = "hadacore"
    assert decode_cache.layer_windows(config) is None
    model = hadacore_model("gemma3")
    model.config.num_kv_shared_layers = 1
    kwargs = {}
    model._prepare_cache_for_generation(model.generation_config, kwargs, None, 1, 10)
    assert type(kwargs["past_key_values"]) is DynamicCache
    assert "quantized again at every step" in messages[0]


def test_int4_weights(llama_dir, monkeypatch):
    calls = CountedCaptures()
    monkeypatch.setattr(DecodeGraphs, "device_types", ("cpu",))
    monkeypatch.setattr(DecodeGraphs, "capture", calls)
    config = HadaCoreConfig(attention="int8-fp8")
    model = AutoModelForCausalLM.from_pretrained(llama_dir, quantization_config=config, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    got = generate(model, new=12)
    assert calls.replays == 10
    assert torch.equal(teacher_forced(model, got, LENGTH).argmax(-1), got[:, LENGTH:])
