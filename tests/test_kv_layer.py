"""What a layer of the 8-bit cache stores."""

import pytest
import torch

from hf_hadacore.attention.decode_cache import Progress
from hf_hadacore.attention.kv_layer import Cursor, HadaCoreLayer
from hf_hadacore.hadamard_matrices import hadamard_matrix
from hf_hadacore.kernels.attention_reference import deinterleave_tokens

pytestmark = pytest.mark.transformers_versions
HEADS, D = 2, 64


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
