"""What an 8-bit cache gives a model in the place of keys and values: its new tokens, for attention to store.

A cache does not know which tokens are padding, which the mean of its keys leaves out; attention does.
"""

from typing import TYPE_CHECKING, Any, NoReturn

import torch

from ..errors import UnsupportedError
from .operands import ATTENTION_NAMES, QuantizedKeyValue, pad_heads, padded_size

if TYPE_CHECKING:
    from .kv_layer import HadaCoreLayer


class NewTokens:
    """Keys and values on their way from `Cache.update` to attention, which has them stored.

    Args:
        layer: that stores them.
        key, value: ``[B, Hkv, S, D]``, rotary embeddings applied; heads may differ in size.

    Attributes:
        shape: of the keys.
        value_dim: head size of the values.
    """

    def __init__(self, layer: "HadaCoreLayer", key: torch.Tensor, value: torch.Tensor):
        self.layer = layer
        self.shape = key.shape
        self.value_dim = value.shape[-1]
        self._size = padded_size(max(key.shape[-1], value.shape[-1]))
        self.key, self.value = pad_heads(key, self._size), pad_heads(value, self._size)

    @property
    def are_first(self) -> bool:
        """Whether the layer is empty."""
        return self.layer.length == 0

    def store(
        self, query: torch.Tensor, is_token: torch.Tensor | None, constant: torch.Tensor | None = None
    ) -> QuantizedKeyValue:
        """Put the tokens into the layer.

        Args:
            query: ``[B, Hq, S, D]`` of the tokens, with heads like those of the keys.
            is_token: boolean ``[B or 1, S]``, False for padding; None if there is none.
            constant: as of `HadaCoreLayer.store`, for keys of the size that `update` was given.

        Returns:
            All keys and values that attention reads.
        """
        if constant is not None:
            constant = pad_heads(constant, self._size)
        return self.layer.store(pad_heads(query, self._size), self.key, self.value, is_token, constant)

    # Whatever else attention would do with a tensor ends here.
    @classmethod
    def __torch_function__(cls, *args: Any, **kwargs: Any) -> NoReturn:
        raise UnsupportedError(
            "a HadaCoreCache holds 8-bit keys and values, which only "
            + " and ".join(f"attn_implementation={name!r}" for name in ATTENTION_NAMES.values())
            + " can read, and no model that does something else with them; use transformers' DynamicCache"
        )

    def __getitem__(self, index: Any) -> NoReturn:
        self.__torch_function__()

    def transpose(self, *dims: int) -> NoReturn:
        self.__torch_function__()
