"""8-bit attention in transformers' models: masks, arguments, and what is refused."""

import pytest
import torch
from tiny_models import token_ids
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM
from transformers.masking_utils import (
    AttentionMaskInterface,
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    chunked_causal_mask_function,
    create_causal_mask,
    or_masks,
    packed_sequence_mask_function,
    sdpa_mask,
    sliding_window_bidirectional_mask_function,
    sliding_window_causal_mask_function,
)
from varied_models import varied_model

from hf_hadacore import HadaCoreCache, HadaCoreConfig
from hf_hadacore.attention import interface
from hf_hadacore.attention.interface import attention_forward, interval_mask, plain_window
from hf_hadacore.errors import UnsupportedError
from hf_hadacore.hadamard_matrices import hadamard_matrix

pytestmark = pytest.mark.transformers_versions

MODES = {"hadacore": "fp8", "hadacore-int8-fp8": "int8-fp8"}
# What is left to the kernel's own rounding: weights become e4m3, off by up to 2^-4, evenly.
WEIGHT_ROUNDING = 2**-4 / 3**0.5


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def padding(batch: int, tokens: int, side: str) -> torch.Tensor | None:
    """A 2-D mask; every sequence has another number of tokens."""
    if side == "none":
        return None
    mask = torch.ones(batch, tokens, dtype=torch.bool)
    for row in range(batch):
        if side in ("left", "both"):
            mask[row, : 2 * row] = False
        if side in ("right", "both"):
            mask[row, tokens - 3 * row :] = False
        if side == "gaps":
            mask[row, 3 + row : 5 + row] = False
    return mask


def as_dense(mask: torch.Tensor | None, tokens: int, keys: int) -> torch.Tensor:
    """What `attention_8bit` makes of an interval mask, ``[B or 1, 1, tokens, keys]``."""
    n = torch.arange(keys)
    position, window = torch.arange(keys - tokens, keys)[:, None], 0
    seen = n <= position
    if mask is not None and mask.dtype == torch.int32:
        start, end = mask[0, 0, 0, :, None, None], mask[-1, 0, 0, :, None, None]
        window = mask.shape[2] if mask.shape[2] > 1 else 0
        seen = seen & (n >= start) & ((n < end) | (len(mask) == 1))
    if window:
        seen = seen & (n > position - window)
    return seen.view(-1, 1, tokens, keys)


@pytest.mark.parametrize("side", ["none", "left", "right", "both", "all"])
@pytest.mark.parametrize("window", [0, 1, 4, 64])
@pytest.mark.parametrize(("past", "tokens"), [(0, 11), (7, 4), (10, 1)])
def test_plain_masks_stay_intervals(side, window, past, tokens):
    keys = past + tokens
    mask = torch.ones(3, keys, dtype=torch.bool) if side == "all" else padding(3, keys, side)
    function = sliding_window_causal_mask_function(window) if window else causal_mask_function
    # A layer with a window may have dropped the first tokens.
    for dropped in {0, max(0, past - window + 1) if window else 0}:
        arguments = dict(
            batch_size=3,
            q_length=tokens,
            kv_length=keys - dropped,
            q_offset=past,
            kv_offset=dropped,
            mask_function=function,
            attention_mask=mask,
        )
        got = interval_mask(**arguments)
        dense = sdpa_mask(**arguments, allow_is_causal_skip=False)
        if window == 1:
            assert torch.equal(got, dense)
            continue
        assert got is None or got.dtype == torch.int32
        # A tensor of queries by keys is what there must not be.
        assert got is None or got.untyped_storage().nbytes() <= 2 * 3 * 4
        if side in ("none", "all") and (not window or keys - dropped <= window):
            assert got is None
        assert torch.equal(as_dense(got, tokens, keys - dropped).expand_as(dense), dense)


def test_gaps_are_dense():
    mask = padding(2, 12, "gaps")
    got = interval_mask(2, 12, 12, attention_mask=mask)
    assert torch.equal(got, sdpa_mask(2, 12, 12, attention_mask=mask))


def test_masks_of_static_caches_are_dense():
    got = interval_mask(2, 3, 16, q_offset=4)
    assert torch.equal(got, sdpa_mask(2, 3, 16, q_offset=4, allow_is_causal_skip=False))
    assert got[0, 0, 0].sum() == 5


def test_which_functions_are_plain():
    assert plain_window(causal_mask_function) == 0
    assert plain_window(sliding_window_causal_mask_function(5)) == 5
    for other in (
        bidirectional_mask_function,
        chunked_causal_mask_function(4, torch.zeros(1, dtype=torch.int64)),
        sliding_window_bidirectional_mask_function(5),
        and_masks(packed_sequence_mask_function(torch.zeros(1, 4)), causal_mask_function),
        or_masks(causal_mask_function, bidirectional_mask_function),
        and_masks(sliding_window_causal_mask_function(5), causal_mask_function),
        lambda batch, head, query, key: query >= key,
    ):
        assert plain_window(other) is None


class Attention(torch.nn.Module):
    is_causal = True


def operands(batch=3, heads=4, key_heads=2, tokens=33, keys=33, d=16):
    generator = torch.Generator().manual_seed(0)

    def normal(heads: int, tokens: int) -> torch.Tensor:
        return torch.randn(batch, heads, tokens, d, generator=generator)

    return normal(heads, tokens), normal(key_heads, keys), normal(key_heads, keys)


def exact(query, key, value, seen, *, scale, softcap=None, sinks=None, bias=None, offset=0.0):
    """Attention in float64, ``[B, S, H, D]``; queries that see nothing give 0."""
    query, key, value = (x.double() for x in (query, key, value))
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, 1) for x in (key, value))
    logits = query @ key.mT * scale + offset
    if softcap:
        logits = softcap * (logits / softcap).tanh()
    if bias is not None:
        logits = logits + bias
    logits = logits.masked_fill(~seen, -torch.inf)
    if sinks is not None:
        extra = sinks.double().view(1, -1, 1, 1).expand(*logits.shape[:3], 1)
        logits = torch.cat([logits, extra], -1)
    weights = logits.softmax(-1).nan_to_num(0)[..., : key.shape[2]]
    return (weights @ value).transpose(1, 2)


def quantized(x: torch.Tensor, dtype: torch.dtype, tokens: int, power_of_2: bool = False) -> torch.Tensor:
    """``[B, H, S, D]`` rounded to a grid of 8 bits, which has one scale for so many tokens."""
    largest = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}[dtype]
    blocks = x.double().abs().amax(-1, keepdim=True).split(tokens, dim=2)
    scale = torch.cat([b.amax(2, keepdim=True).expand_as(b) for b in blocks], 2) / largest
    if power_of_2:
        scale = scale.log2().ceil().exp2()
    grid = x.double() / scale
    return (grid.round() if dtype == torch.int8 else grid.float().to(dtype).double()) * scale


def emulated(query, key, value, keep, mode, scale) -> dict[str, torch.Tensor]:
    """Arguments of `exact`, rotated and rounded as 8-bit attention is to round them."""
    dtype = torch.int8 if mode == "int8-fp8" else torch.float8_e4m3fn
    # Heads of 16 are filled up with zeros to the kernels' smallest.
    rotation = hadamard_matrix(64)[: query.shape[-1]].double() / 8
    tokens = keep[:, None, :, None]
    mean = (key * tokens).sum(2, keepdim=True) / tokens.sum(2, keepdim=True)
    group = query.shape[1] // key.shape[1]
    return {
        "query": quantized(query.double() @ rotation, dtype, 1),
        "key": quantized((key - mean).double() @ rotation, dtype, 128),
        "value": quantized(value, torch.float8_e4m3fn, 128, power_of_2=True),
        "offset": scale * query.double() @ mean.double().repeat_interleave(group, 1).mT,
    }


@pytest.mark.parametrize("mode", MODES.values())
@pytest.mark.parametrize("side", ["none", "left", "right", "both", "gaps"])
@pytest.mark.parametrize("window", [0, 7])
@pytest.mark.parametrize("extra", [{}, {"softcap": 3.0}, {"s_aux": torch.tensor([0.5, -1.0, 2.0, 0.0])}])
@pytest.mark.parametrize("tokens", [33, 5])
def test_against_float64(mode, side, window, extra, tokens):
    query, key, value = operands(tokens=tokens)
    # What the constant is for, and what must not go wrong with softcap or sinks.
    key = key + 3 * torch.randn(1, 2, 1, 16, generator=torch.Generator().manual_seed(1))
    mask = padding(3, 33, side)
    function = sliding_window_causal_mask_function(window) if window else causal_mask_function
    arguments = dict(q_offset=33 - tokens, mask_function=function, attention_mask=mask)
    seen = sdpa_mask(3, tokens, 33, **arguments, allow_is_causal_skip=False)
    got, _ = attention_forward(
        Attention(),
        query,
        key,
        value,
        interval_mask(3, tokens, 33, **arguments),
        scaling=0.25,
        sliding_window=window or None,
        mode=mode,
        **extra,
    )
    keep = torch.ones(3, 33, dtype=torch.bool) if mask is None else mask
    if side == "gaps":
        # All that a mask of queries by keys tells.
        keep = seen.any((1, 2))
    expected = exact(
        **emulated(query, key, value, keep, mode, 0.25),
        seen=seen,
        scale=0.25,
        softcap=extra.get("softcap"),
        sinks=extra.get("s_aux"),
    )
    assert got.dtype == query.dtype
    assert relative_error(got, expected) < WEIGHT_ROUNDING


def test_a_window_counts_also_where_a_model_only_masks_it():
    query, key, value = operands()
    mask = interval_mask(3, 33, 33, mask_function=sliding_window_causal_mask_function(7))
    named, _ = attention_forward(Attention(), query, key, value, mask, sliding_window=7, mode="fp8")
    masked, _ = attention_forward(Attention(), query, key, value, mask, mode="fp8")
    assert torch.equal(named, masked)
    without, _ = attention_forward(Attention(), query, key, value, None, mode="fp8")
    assert not torch.equal(named, without)


@pytest.mark.parametrize("kind", ["boolean", "additive", "heads", "bias", "bias and intervals", "not causal"])
def test_other_masks(kind):
    query, key, value = operands()
    generator = torch.Generator().manual_seed(2)
    seen = torch.rand(3, 1, 33, 33, generator=generator) < 0.6
    seen[..., 0] = True
    causal = torch.ones(33, 33, dtype=torch.bool).tril()
    bias = torch.randn(1, 4, 33, 33, generator=generator)
    module, options, mask, added = Attention(), {}, seen, None
    if kind == "additive":
        mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    elif kind == "heads":
        mask = seen = seen & (torch.rand(1, 4, 1, 33, generator=generator) < 0.8)
    elif kind == "bias":
        options, added = {"position_bias": bias}, bias
    elif kind == "bias and intervals":
        options, added, seen = {"position_bias": bias}, bias, causal
        mask = None
    elif kind == "not causal":
        module.is_causal, mask, seen = False, None, torch.ones(33, 33, dtype=torch.bool)
    got, _ = attention_forward(module, query, key, value, mask, mode="fp8", **options)
    keep = torch.ones(3, 33, dtype=torch.bool)
    expected = exact(**emulated(query, key, value, keep, "fp8", 0.25), seen=seen, scale=0.25, bias=added)
    assert relative_error(got, expected) < WEIGHT_ROUNDING


def test_padding_is_not_in_the_constant():
    query, key, value = operands(batch=1)
    mask = torch.ones(1, 33, dtype=torch.bool)
    mask[:, :9] = False
    # Their mean, subtracted from the others, would leave little of those.
    key[:, :, :9] = 200
    intervals = interval_mask(1, 33, 33, attention_mask=mask)
    got, _ = attention_forward(Attention(), query, key, value, intervals, mode="fp8")
    seen = sdpa_mask(1, 33, 33, attention_mask=mask, allow_is_causal_skip=False)
    expected = exact(**emulated(query, key, value, mask, "fp8", 0.25), seen=seen, scale=0.25)
    assert relative_error(got, expected) < WEIGHT_ROUNDING


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3+sliding", "gpt-oss+sliding"])
@pytest.mark.parametrize("implementation", MODES)
@pytest.mark.parametrize("side", ["none", "left", "right", "gaps"])
def test_models_without_a_cache(monkeypatch, name, implementation, side):
    """What each layer of a model makes of its queries, keys and values."""
    model = varied_model(name)
    model.set_attn_implementation(implementation)
    mask = padding(3, 40, side)
    keep = torch.ones(3, 40, dtype=torch.bool) if mask is None else mask
    attend = AttentionInterface()[implementation]
    errors = []

    def watched(module, query, key, value, attention_mask, scaling=None, **kwargs):
        got, _ = attend(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        n = torch.arange(40)
        seen = (n <= n[:, None]) & keep[:, None, None]
        if getattr(module, "sliding_window", None):
            seen = seen & (n > n[:, None] - module.sliding_window)
        operands = emulated(query, key, value, keep, MODES[implementation], scaling)
        expected = exact(**operands, seen=seen, scale=scaling, sinks=kwargs.get("s_aux"))
        errors.append(relative_error(got[keep], expected[keep]))
        return got, None

    monkeypatch.setitem(AttentionInterface._global_mapping, implementation, watched)
    with torch.no_grad():
        model(token_ids(3, 40), attention_mask=None if mask is None else mask.long(), use_cache=False)
    assert len(errors) == 2
    assert max(errors) < WEIGHT_ROUNDING


def test_packed_sequences_do_not_see_each_other(monkeypatch):
    model = varied_model("llama")
    model.set_attn_implementation("hadacore")
    ids = token_ids(1, 20)
    positions = torch.cat([torch.arange(12), torch.arange(8)])[None]
    other = torch.cat([token_ids(2, 12)[1:], ids[:, 12:]], 1)
    with torch.no_grad():
        packed = model(ids, position_ids=positions, use_cache=False).logits[:, 12:]
        assert not torch.equal(ids, other)
        # Only the constant, which is the mean of all keys, knows of the first sequence.
        again = model(other, position_ids=positions, use_cache=False).logits[:, 12:]
        alone = model(ids[:, 12:], use_cache=False).logits
        model.set_attn_implementation("eager")
        expected = model(ids[:, 12:], use_cache=False).logits
    error = relative_error(alone, expected)
    assert relative_error(packed, expected) < 2 * error
    assert relative_error(again, expected) < 2 * error


def test_overlays_are_dense():
    model = varied_model("llama")
    model.config._attn_implementation = "hadacore"
    mask = create_causal_mask(
        model.config,
        torch.zeros(1, 6, 8),
        None,
        None,
        or_mask_function=lambda batch, head, query, key: (query < 3) & (key < 3),
    )
    assert mask.dtype == torch.bool and mask[0, 0, 0, :4].tolist() == [True, True, True, False]


@pytest.mark.parametrize("name", MODES)
def test_both_interfaces_know_both_names(name):
    assert name in AttentionInterface().valid_keys()
    assert AttentionMaskInterface()[name] is interval_mask


def test_what_is_refused():
    query, key, value = operands()
    with pytest.raises(UnsupportedError, match="no dropout"):
        attention_forward(Attention(), query, key, value, None, dropout=0.1, mode="fp8")
    with pytest.raises(UnsupportedError, match="generate_batch"):
        attention_forward(Attention(), query, key, value, None, cache=object(), mode="fp8")
    query.requires_grad_()
    output, _ = attention_forward(Attention(), query, key, value, None, mode="fp8")
    with pytest.raises(UnsupportedError, match="no gradient"):
        output.sum().backward()


def test_continuous_batching_says_what_works():
    model = varied_model("llama")
    model.set_attn_implementation("hadacore")
    with pytest.raises(ValueError, match="sdpa"):
        model.generate_batch([[1, 2, 3]], max_new_tokens=2)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_other_attention_cannot_read_the_cache(implementation):
    model = varied_model("llama")
    model.set_attn_implementation(implementation)
    with torch.no_grad(), pytest.raises(UnsupportedError, match="attn_implementation='hadacore'"):
        model(token_ids(), past_key_values=HadaCoreCache(model.config))


def test_a_cache_that_is_not_8bit_is_slow_and_right(monkeypatch):
    messages = []
    monkeypatch.setattr(interface.logger, "warning_once", messages.append)
    model = varied_model("llama")
    model.set_attn_implementation("hadacore")
    ids = token_ids(2, 20)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits[:, -1]
        past = model(ids[:, :-1], use_cache=True).past_key_values
        assert not messages
        got = model(ids[:, -1:], past_key_values=past).logits[:, -1]
    assert "HadaCoreCache(model.config)" in messages[0]
    assert relative_error(got, expected) < 0.3  # the mean, and so every rounding, is another


@pytest.mark.parametrize("mode", MODES.values())
def test_the_config_chooses(llama_dir, tmp_path, mode):
    name = next(name for name in MODES if MODES[name] == mode)

    def load(path, *config, **options):
        options |= {"quantization_config": config[0]} if config else {}
        return AutoModelForCausalLM.from_pretrained(path, **options)

    def implementation(*arguments, **options) -> str:
        return load(*arguments, **options).config._attn_implementation

    model = load(llama_dir, HadaCoreConfig(attention=mode))
    assert model.config._attn_implementation == name
    ids = token_ids(2, 20)
    with torch.no_grad():
        expected = model(ids).logits
    model.save_pretrained(tmp_path / "int4")
    assert AutoConfig.from_pretrained(tmp_path / "int4").quantization_config["attention"] == mode
    again = load(tmp_path / "int4")
    with torch.no_grad():
        assert torch.equal(again(ids).logits, expected)

    assert implementation(llama_dir, HadaCoreConfig()) == "sdpa"
    # An explicit wish wins, in both places.
    assert implementation(llama_dir, HadaCoreConfig(attention=mode), attn_implementation="eager") == "eager"
    assert implementation(tmp_path / "int4", attn_implementation="sdpa") == "sdpa"
    # Options about something else leave it; it can be changed, and comes with int4 weights.
    assert implementation(tmp_path / "int4", HadaCoreConfig(cuda_graphs=False)) == name
    other = next(other for other in MODES if other != name)
    assert implementation(tmp_path / "int4", HadaCoreConfig(attention=MODES[other])) == other
    assert implementation(tmp_path / "int4", HadaCoreConfig(dequantize=True)) == "sdpa"
