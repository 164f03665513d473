"""A layer of the 8-bit key/value cache.

Keys are rotated and quantized, values quantized, as they come in, and never read in another form. Before
that a constant vector is subtracted from the keys of a sequence and head, which changes nothing in a softmax
and keeps outlier channels out of the rotation: the mean that a checkpoint holds (see `key_means`), or else
that of the first prefill, of the tokens that are no padding. A cache knows neither, but attention does: so
`update` hands new tokens on to attention, which has the layer store them: see `new_tokens`.
"""

import sys
from typing import Any

import torch

from ..errors import UnsupportedError
from ..kernels.attention_reference import BLOCK_SIZE
from ..kernels.quantize_step import quantize_step_into_cache
from .decode_cache import DecodeLayer, Progress
from .new_tokens import NewTokens
from .operands import VALUE_DTYPE, QuantizedKeyValue, mean_key, quantize_key_value

# Buffers have a multiple of so many tokens.
BUFFER_STEP = 128
# Buffers of a window begin at such tokens, so that values, interleaved by 16, move with a plain copy.
_STEP = 16
_STATE = ("keys", "values", "key_scale", "value_scale", "constant")


class Cursor:
    """Where the next token goes in decoding, in all layers of a cache that have one window.

    Attributes:
        column: int64 ``[1]``, in the buffers.
        query_start: the same as int32 ``[B]``.
        first: int64 ``[]``, position of the token in column 0.
    """

    column: torch.Tensor
    query_start: torch.Tensor
    first: torch.Tensor

    def __init__(self, progress: Progress):
        self.progress = progress
        self._shape: tuple[Any, ...] = ()
        self._where: tuple[Any, ...] = ()

    def place(self, column: int, first: int, batch: int, device: torch.device) -> None:
        """Set it, at an address that stays the same for a batch size and device."""
        if self._shape != (batch, device):
            counters = self.progress.counters
            if self._shape:
                counters[:] = [c for c in counters if c is not self.column and c is not self.query_start]
            self._shape = (batch, device)
            self.column = torch.empty(1, dtype=torch.int64, device=device)
            self.query_start = torch.empty(batch, dtype=torch.int32, device=device)
            self.first = torch.empty((), dtype=torch.int64, device=device)
            counters += [self.column, self.query_start]
            self.progress.allocations += 1
        self.column.fill_(column)
        self.query_start.fill_(column)
        self.first.fill_(first)

    def where(self, column: int, batch: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """`column` and `query_start` for a column that Python knows, made once for all layers."""
        key = (column, batch, device)
        if self._where[:3] != key:
            tensors = (
                torch.full((1,), column, dtype=torch.int64, device=device),
                torch.full((batch,), column, dtype=torch.int32, device=device),
            )
            self._where = (*key, tensors)
        return self._where[3]


class HadaCoreLayer(DecodeLayer):
    """8-bit keys ``[B, Hkv, size, D]`` and values ``[B, Hkv, D, size]`` of one attention layer.

    D is that of the kernels: see `padded_size`.

    Tokens are appended. Where a layer has a sliding window and the buffers are full, what is still seen is
    moved to their beginning; there is room for a quarter of the window between two moves.

    Args:
        window: tokens that a query sees, itself included; None for all.
        progress: shared with the other layers.
        cursor: shared with the layers that have the same window.
        leads: whether it is the one of them that places the cursor.
        dtype: of keys, torch.float8_e4m3fn or torch.int8.

    Attributes:
        key_scale, value_scale: fp32 ``[B, Hkv, size]``.
        constant: fp32 ``[B, Hkv, D]``, subtracted from keys.
        first: position of the token in the buffers' first column, a multiple of 16.
        record_past: whether `crop` may take back all tokens since it was last called.
    """

    is_croppable = True
    # None until the first tokens are stored.
    key_scale: Any
    value_scale: Any
    constant: Any

    def __init__(
        self, window: int | None, progress: Progress, cursor: Cursor, leads: bool, dtype: torch.dtype
    ):
        super().__init__(window, progress)
        self.cursor = cursor
        self.leads = leads
        self.key_dtype = dtype
        self.key_scale = self.value_scale = self.constant = None
        self.first = 0
        self.record_past = False
        self._last_crop = 0
        self._offloads = False

    @property
    def size(self) -> int:
        return 0 if self.keys is None else self.keys.shape[2]

    @property
    def end(self) -> int:
        return min(self.capacity, self.first + self.size)

    @property
    def masks_in_graph_until(self) -> int:
        return sys.maxsize

    @property
    def is_full(self) -> bool:
        """Never: decoding steps are the same wherever the next token goes."""
        return False

    @property
    def bytes_per_token(self) -> int:
        """Of a token in the buffers, 0 while there are none."""
        if self.keys is None:
            return 0
        heads, _, d = self.keys.shape[1:]
        itemsize = self.keys.itemsize + self.values.itemsize
        return heads * (d * itemsize + self.key_scale.itemsize + self.value_scale.itemsize)

    def buffers(self) -> list[torch.Tensor]:
        return [getattr(self, name) for name in _STATE]

    def _fits(self, key_states: torch.Tensor, value_states: torch.Tensor) -> bool:
        if self.keys is None:
            return False
        batch, heads, _, d = key_states.shape
        return self.constant.shape == (batch, heads, d) and self.keys.device == key_states.device

    def _allocate(self, capacity: int, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self._allocate_for(key_states, capacity, self._size_for(capacity, 0))

    def _allocate_for(self, states: torch.Tensor, capacity: int, size: int) -> None:
        batch, heads, _, d = states.shape
        self.capacity = capacity
        self.keys = states.new_zeros((batch, heads, size, d), dtype=self.key_dtype)
        self.values = states.new_zeros((batch, heads, d, size), dtype=VALUE_DTYPE)
        self.key_scale, self.value_scale = states.new_zeros((2, batch, heads, size), dtype=torch.float32)
        self.constant = states.new_zeros((batch, heads, d), dtype=torch.float32)
        self.progress.allocations += 1

    def _size_for(self, capacity: int, tokens: int) -> int:
        """Columns of the buffers.

        Args:
            capacity: of a layer without a window.
            tokens: that they have to hold.
        """
        return min(capacity, _round_up(max(window_room(self.window), tokens), BUFFER_STEP))

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Hand new tokens on to attention.

        Args:
            key_states, value_states: fp16, bf16 or fp32 ``[B, Hkv, S, D]``; S = 1 in decoding.

        Returns:
            `NewTokens`, in the place of keys and in that of values.
        """
        tokens = NewTokens(self, key_states, value_states)
        return tokens, tokens

    def store(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        is_token: torch.Tensor | None,
        constant: torch.Tensor | None = None,
    ) -> QuantizedKeyValue:
        """Quantize and add tokens.

        Args:
            query, key, value: of one head size.
            is_token: boolean ``[B or 1, S]``, False for padding; None if there is none.
            constant: fp32 ``[1, Hkv, D]``, to be subtracted from all keys if these are the first; None for
                their mean.

        Returns:
            What attention reads.
        """
        self.prefetch()
        if self.length:
            stored = self._append(query, key, value)
        else:
            stored = self._store_first(key, value, mean_key(key, is_token) if constant is None else constant)
        if self._offloads:
            # Attention still has them.
            self._move("cpu")
            self._offloads = False
        return stored

    def _append(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> QuantizedKeyValue:
        tokens = key.shape[2]
        if self.progress.decoding:
            column, query_start = self.cursor.column, self.cursor.query_start
        else:
            self._make_room(tokens)
            start = self.length - self.first
            column, query_start = self.cursor.where(start, key.shape[0], key.device)
        buffers = (self.keys, self.values, self.key_scale, self.value_scale)
        quantized = quantize_step_into_cache(query, key, value, *buffers, column, constant=self.constant)
        self.length += tokens
        return QuantizedKeyValue(*buffers, self.constant, query_start, quantized)

    def _store_first(
        self, key: torch.Tensor, value: torch.Tensor, constant: torch.Tensor
    ) -> QuantizedKeyValue:
        """Attention reads the tokens as quantized here, also where the layer keeps only a window of them."""
        self.lazy_initialization(key, value)
        self.constant.copy_(constant)
        new = quantize_key_value(key, value, self.constant, self.key_dtype)
        tokens = key.shape[2]
        self.length, self.first = tokens, 0
        self.first = first = self._oldest()
        held = tokens - first
        if held > self.size:
            self._allocate_for(key, self.capacity, self._size_for(self.capacity, held))
            self.constant.copy_(new.constant)
        self.keys[:, :, :held] = new.key[:, :, first:]
        self.values[..., : new.value.shape[-1] - first] = new.value[..., first:]
        for buffer, scale in ((self.key_scale, new.key_scale), (self.value_scale, new.value_scale)):
            buffer[:, :, :held] = scale.repeat_interleave(BLOCK_SIZE, 2)[:, :, first:tokens]
        return new

    def _oldest(self) -> int:
        """The first token that has to be kept, rounded down to a multiple of 16."""
        length = min(self.length, self._last_crop) if self.record_past else self.length
        return max(self.first, (length - self.window + 1) // _STEP * _STEP)

    def _first_with(self, tokens: int) -> int:
        """What `first` becomes when tokens are added."""
        fits = self.length + tokens - self.first <= self.size
        return self.first if fits else self._oldest()

    def _make_room(self, tokens: int) -> None:
        """Make space for tokens behind those that are held."""
        first = self._first_with(tokens)
        held, end = self.length - first, self.length + tokens
        capacity = self.capacity if end <= self.capacity else self._capacity_for(end)
        old, skip = self.buffers(), first - self.first
        size = self._size_for(capacity, held + tokens)
        if size > self.size:
            self._allocate_for(self.keys, capacity, size)
        elif capacity > self.capacity:
            # Graphs read masks as wide as the capacity.
            self.capacity = capacity
            self.progress.allocations += 1
        if skip == 0 and self.keys is old[0]:
            return
        columns = _round_up(held, _STEP)
        for name, source in zip(_STATE, old, strict=True):
            target, dim = getattr(self, name), 2 if name == "keys" else -1
            if name != "constant":
                source = source.narrow(dim, skip, columns)
                target = target.narrow(dim, 0, columns)
            if source.data_ptr() != target.data_ptr():
                # They may overlap.
                target.copy_(source.clone() if skip else source)
        self.first = first

    def grow(self, length: int) -> None:
        self._make_room(length - self.length)

    def make_room(self) -> None:
        super().make_room()
        self.start_decoding()

    def start_decoding(self) -> None:
        if self.leads:
            column = self.length - self.first
            self.cursor.place(column, self.first, self.keys.shape[0], self.keys.device)

    def get_mask_sizes(self, query_length: int) -> tuple[int, Any]:
        """Number of keys that attention sees with `query_length` new tokens, and the first's position.

        In decoding the position is a tensor on the device, which `interval_mask` knows to read.
        """
        if self.progress.decoding:
            return self.size, self.cursor.first
        first = self._first_with(query_length)
        return self.length + query_length - first, first

    def reset(self) -> None:
        """Forget all tokens; the buffers are kept."""
        self.length = self.first = self._last_crop = 0

    def activate_past_recording(self) -> None:
        """From here on `crop` can take back all tokens since it was last called, windows notwithstanding."""
        self.record_past = True
        self._last_crop = self.length

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens.

        Args:
            tokens_to_remove: how many, as a negative number.

        Raises:
            UnsupportedError: the number is positive, or the window before the tokens is no longer held.
        """
        if tokens_to_remove > 0:
            raise UnsupportedError(
                f"crop takes the number of tokens to remove as a negative number, got {tokens_to_remove}"
            )
        length = max(0, self.length + tokens_to_remove)
        if self.first > max(0, length - self.window + 1):
            raise UnsupportedError(
                f"cannot remove {-tokens_to_remove} of {self.length} tokens: a layer with a window of "
                f"{self.window} has dropped what would be seen then; call activate_past_recording() first"
            )
        self.length = self._last_crop = length

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Let sequence i become what sequence beam_idx[i] was."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence."""
        if self.keys is not None:
            batch = torch.arange(self.keys.shape[0], device=self.keys.device)
            self.batch_select_indices(batch.repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep some of the sequences.

        Args:
            indices: int64 ``[any]``, or boolean ``[B]``.
        """
        if self.keys is None:
            return
        for name, buffer in zip(_STATE, self.buffers(), strict=True):
            # Not every index operation knows 8-bit floats.
            whole = buffer.view(torch.int8) if buffer.itemsize == 1 else buffer
            setattr(self, name, whole[indices.to(buffer.device)].view(buffer.dtype))
        self.batch_size = self.keys.shape[0]

    def _move(self, device: torch.device | str) -> None:
        for name, buffer in zip(_STATE, self.buffers(), strict=True):
            setattr(self, name, buffer.to(device, non_blocking=True))

    def offload(self) -> None:
        """Move to the CPU as soon as the tokens that `update` was given are stored."""
        self._offloads = True

    def prefetch(self) -> None:
        """Move back to the device."""
        if self.keys is not None and self.keys.device != self.device:
            self._move(self.device)


def window_room(window: int) -> int:
    """Tokens for which a layer with a window has room, so that what is seen is not moved at every step."""
    return window + _STEP + max(BLOCK_SIZE, window // 4)


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step
