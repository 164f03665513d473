"""The buffers of decode graphs hold what transformers' dynamic cache does."""

import pytest
import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from hf_hadacore.attention import decode_cache
from hf_hadacore.attention.decode_cache import DecodeCache, DecodeLayer, Progress

pytestmark = pytest.mark.transformers_versions


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
