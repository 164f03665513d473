"""The 8-bit cache: models compute with it what they compute without."""

import copy

import pytest
import torch
from kv_cache_cases import CLOSE, MODELS, hadacore_model, logits_in_chunks, relative_error
from tiny_models import TINY_CONFIGS, token_ids
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    DynamicCache,
    Gemma3TextConfig,
    Qwen3NextConfig,
)

from hf_hadacore import HadaCoreCache
from hf_hadacore.attention import decode_cache, kv_cache
from hf_hadacore.errors import ConfigError, UnsupportedError

pytestmark = pytest.mark.transformers_versions


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
