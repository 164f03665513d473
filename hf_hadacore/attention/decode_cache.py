"""A key/value cache that grows like transformers' dynamic one and can be written by a CUDA graph.

A prompt is appended as to a `DynamicCache`: attention sees the tokens there are and nothing else, so prefill
has the same masks, kernels and numbers. In decoding, every layer hands out its whole buffer (masked beyond
the current token) and writes at an index that is read from device memory: the same kernels on the same
addresses in each step, which is what a captured graph replays.
"""

import sys
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticCache,
    StaticLayer,
    StaticSlidingWindowLayer,
)

_NO_WINDOW = sys.maxsize
# Room made for new tokens beyond the prompt; longer generations double the buffers when they get there, so
# that a generous `max_new_tokens` costs neither memory nor time before it is used.
_ROOM = 1024


def bucket(length: int) -> int:
    """The capacity, in tokens, of a buffer that has to hold `length`: at most a quarter more from 2048 on."""
    step = max(256, 1 << max(0, (length - 1).bit_length() - 3))
    return -(-length // step) * step


class Progress:
    """What all layers of a cache share.

    Attributes:
        decoding: whether one token is added per step, at `position`.
        limit: tokens that the current `generate` call can add up to.
        device_offsets: whether masks are made by functions that read offsets on the device, as `decode_mask`.
        position: int64 ``[1]``, tokens seen so far; made by `start_decoding`, advanced on the device.
        counters: what else counts steps on the device.
        allocations: how often a layer's buffers were (re)allocated; graphs captured before are void.
    """

    def __init__(self) -> None:
        self.decoding = False
        self.limit = 0
        self.device_offsets = False
        self.position: Any = None
        self.counters: list[torch.Tensor] = []
        self.allocations = 0

    def advance(self) -> None:
        """Move on by a step, on the device."""
        for counter in (self.position, *self.counters):
            counter.add_(1)


class DecodeLayer(CacheLayerMixin):
    """Keys and values of one attention layer, ``[B, H, size, D]``.

    Args:
        window: tokens that a query sees, itself included; None for all.
        progress: shared with the other layers.

    Attributes:
        length: tokens seen.
        capacity: tokens for which there is room; the buffers' size is that or the window if it is smaller.
    """

    is_compileable = True
    supports_early_init = False
    # None until the first `update`.
    keys: Any
    values: Any

    def __init__(self, window: int | None, progress: Progress):
        super().__init__()
        self.window = _NO_WINDOW if window is None else window
        self.is_sliding = window is not None
        self.progress = progress
        self.length = 0
        self.capacity = 0

    @property
    def size(self) -> int:
        return min(self.window, self.capacity)

    @property
    def end(self) -> int:
        """The length up to which tokens can be added in decoding without `make_room`."""
        return self.capacity

    @property
    def masks_in_graph_until(self) -> int:
        """The length up to which a graph can make masks: a full window may begin where only Python knows."""
        return _NO_WINDOW if self.progress.device_offsets else self.window

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Make room for a first batch of tokens, in the buffers of an earlier `generate` call if they fit."""
        wanted = self._capacity_for(key_states.shape[-2])
        if self._fits(key_states, value_states) and wanted <= self.capacity <= 4 * wanted:
            # What a masked token's value holds is multiplied by zero, which must not give NaN.
            for buffer in self.buffers():
                buffer.zero_()
        else:
            self.keys = self.values = None
            self._allocate(wanted, key_states, value_states)
        self.dtype, self.device = key_states.dtype, key_states.device
        self.batch_size = key_states.shape[0]
        self.is_initialized = True

    def buffers(self) -> list[torch.Tensor]:
        """What holds the tokens."""
        return [self.keys, self.values]

    def _fits(self, key_states: torch.Tensor, value_states: torch.Tensor) -> bool:
        if self.keys is None:
            return False
        return all(
            old.shape[:2] == new.shape[:2]
            and old.shape[-1] == new.shape[-1]
            and old.dtype == new.dtype
            and old.device == new.device
            for old, new in ((self.keys, key_states), (self.values, value_states))
        )

    def _capacity_for(self, length: int) -> int:
        room = max(length + _ROOM, 2 * self.length)
        return bucket(max(length, min(self.progress.limit, room)))

    def _allocate(self, capacity: int, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.capacity = capacity
        self.keys = key_states.new_zeros((*key_states.shape[:2], self.size, key_states.shape[-1]))
        self.values = value_states.new_zeros((*value_states.shape[:2], self.size, value_states.shape[-1]))
        self.progress.allocations += 1

    def start_decoding(self) -> None:
        """Called before the first step."""

    def make_room(self) -> None:
        """Let the buffers hold one more token."""
        self.grow(self.length + 1)

    def grow(self, length: int) -> None:
        """Move to larger buffers if there is no room for `length` tokens."""
        if length <= self.capacity:
            return
        keys, values, held = self.keys, self.values, min(self.length, self.size)
        self._allocate(self._capacity_for(length), keys, values)
        self.keys[:, :, :held] = keys[:, :, :held]
        self.values[:, :, :held] = values[:, :, :held]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add tokens.

        Args:
            key_states, value_states: ``[B, H, S, D]``; S = 1 in decoding.

        Returns:
            What attention reads, ``[B, H, L, D]`` each: the L of `get_mask_sizes` before the call.
        """
        if self.progress.decoding:
            return self._step(key_states, value_states)
        start, end = self.length, self.length + key_states.shape[-2]
        if start == 0:
            self.lazy_initialization(key_states, value_states)
        else:
            self.grow(end)
        self.length = end
        if end <= self.size:
            self.keys[:, :, start:end] = key_states
            self.values[:, :, start:end] = value_states
            if start == 0:
                return key_states, value_states
            return self.keys[:, :, :end], self.values[:, :, :end]
        held = min(start, self.size)
        keys = torch.cat((self.keys[:, :, :held], key_states), dim=2)
        values = torch.cat((self.values[:, :, :held], value_states), dim=2)
        self.keys.copy_(keys[:, :, -self.size :])
        self.values.copy_(values[:, :, -self.size :])
        # No new token sees the oldest of a full window.
        oldest = held - min(start, self.window - 1)
        return keys[:, :, oldest:], values[:, :, oldest:]

    def _step(
        self, key_states: torch.Tensor, value_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        for buffer, states in ((self.keys, key_states), (self.values, value_states)):
            if self.is_full:
                buffer.copy_(torch.cat((buffer[:, :, 1:], states), dim=2))
            else:
                buffer.index_copy_(2, self.progress.position, states)
        self.length += 1
        return self.keys, self.values

    @property
    def is_full(self) -> bool:
        """Whether a new token pushes out the oldest; each case needs a graph of its own."""
        return self.length >= self.size

    def get_mask_sizes(self, query_length: int) -> tuple[int, Any]:
        """Number of keys that attention sees with `query_length` new tokens, and the first's position.

        In decoding the position may be an int64 tensor ``[]``, see `Progress.device_offsets`.
        """
        if self.progress.decoding:
            if self.is_full and self.progress.device_offsets:
                return self.size, self.progress.position[0] - (self.size - 1)
            return self.size, max(self.length - self.size + 1, 0)
        seen = min(self.length, self.window - 1)
        return seen + query_length, self.length - seen

    def get_seq_length(self) -> Any:
        """Tokens seen: in decoding an int64 tensor ``[]`` on the device, so that graphs read it anew."""
        return self.progress.position[0] if self.progress.decoding else self.length

    def get_max_length(self) -> int:
        """-1: there is no maximum."""
        return -1

    def reset(self) -> None:
        """Forget all tokens; the buffers are kept."""
        self.length = 0

    def contents(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of the keys and values that a next token sees, ``[B, H, min(length, window - 1), D]``."""
        held = min(self.length, self.size)
        first = held - min(held, self.window - 1)
        return self.keys[:, :, first:held], self.values[:, :, first:held]


class DecodeCache(DynamicCache):
    """The cache of one `generate` call, on buffers that outlive it.

    Args:
        layers: as made by `decode_layers`; emptied.
        limit: tokens that the call can add up to.
        keep: whether `finish` has to leave behind a cache that does not depend on the buffers.
    """

    layers: list[Any]

    def __init__(self, layers: list[DecodeLayer], *, limit: int, keep: bool):
        super().__init__()
        self.layer_class_to_replicate = None
        self.layers = list(layers)
        self.progress = layers[0].progress
        self.progress.decoding = False
        self.progress.limit = limit
        self.keep = keep
        self.in_use = True
        self._masks_in_graph_until = min(layer.masks_in_graph_until for layer in layers)
        for layer in layers:
            layer.reset()

    @property
    def is_decoding(self) -> bool:
        return self.in_use and self.progress.decoding

    @property
    def masks_in_graph(self) -> bool:
        """Whether a graph can make every layer's mask for the next token."""
        return self.layers[0].length < self._masks_in_graph_until

    def start_decoding(self) -> None:
        """From here on one token is added per step."""
        progress, layer = self.progress, self.layers[0]
        if progress.position is None or progress.position.device != layer.keys.device:
            progress.position = torch.empty(1, dtype=torch.int64, device=layer.keys.device)
            progress.allocations += 1
        progress.position.fill_(layer.length)
        progress.decoding = True
        for layer in self.layers:
            layer.start_decoding()
        self._end = min(layer.end for layer in self.layers)

    def make_room(self) -> None:
        """Let the buffers hold the next token; to be called before its mask is made."""
        # All layers have the same length.
        if self.layers[0].length == self._end:
            for layer in self.layers:
                if layer.length == layer.end:
                    layer.make_room()
            self._end = min(layer.end for layer in self.layers)

    def finish(self, config: PreTrainedConfig) -> None:
        """Give the buffers back. A cache that is kept becomes a dynamic one with the same contents.

        Args:
            config: the model's.
        """
        self.progress.decoding = False
        self.in_use = False
        if not self.keep:
            return
        dynamic = self.as_dynamic(config)
        self.__dict__.clear()
        self.__dict__.update(dynamic.__dict__)
        self.__class__ = type(dynamic)  # type: ignore[assignment]

    def as_dynamic(self, config: PreTrainedConfig) -> DynamicCache:
        """A dynamic cache with the same contents, in memory of its own.

        Args:
            config: the model's.
        """
        cache = DynamicCache(config=config)
        for layer, source in zip(cache.layers, self.layers, strict=True):
            assert isinstance(layer, DynamicLayer)
            layer.update(*source.contents())
            if isinstance(layer, DynamicSlidingWindowLayer):
                layer.cumulative_length = source.length
        return cache


def decode_layers(config: PreTrainedConfig) -> list[DecodeLayer] | None:
    """The cache layers of a model, empty.

    Args:
        config: the model's.

    Returns:
        None if the model needs other kinds of layers than full and sliding-window attention.
    """
    windows = layer_windows(config)
    if windows is None:
        return None
    progress = Progress()
    return [DecodeLayer(window, progress) for window in windows]


def layer_windows(config: PreTrainedConfig) -> list[int | None] | None:
    """The sliding window of every layer of a model, None where there is none.

    Args:
        config: the model's.

    Returns:
        None if the model needs other kinds of layers than full and sliding-window attention.
    """
    text_config = config.get_text_config(decoder=True)
    if getattr(text_config, "attention_chunk_size", None) or getattr(
        text_config, "num_kv_shared_layers", None
    ):
        return None
    dynamic = DynamicCache(config=config).layers
    static = StaticCache(config=text_config, max_cache_len=_NO_WINDOW).layers
    windows: list[int | None] = []
    for layer, twin in zip(dynamic, static, strict=True):
        if type(layer) is DynamicLayer and type(twin) is StaticLayer:
            windows.append(None)
        elif type(layer) is DynamicSlidingWindowLayer and type(twin) is StaticSlidingWindowLayer:
            windows.append(layer.sliding_window)
        else:
            return None
    return windows or None
