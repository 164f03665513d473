"""Measuring the means of keys with calibration tokens: see `attention.key_means`."""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging

from ..attention.key_means import K_MEAN
from ..attention.kv_cache import quantized_windows
from ..kernels.key_mean import key_mean
from ..probing import PROBE, registered
from .tiny_model import probe_logits, tiny_model

logger = logging.get_logger(__name__)


def key_shapes(model: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """The attention modules whose keys an 8-bit cache would hold, found out by running a tiny model.

    Args:
        model: on any device.

    Returns:
        Key/value heads and head size, by the module's full name. Empty for models that have no such cache,
        or cannot be made tiny.
    """
    if quantized_windows(model.config) is None:
        return {}
    shapes: dict[nn.Module, tuple[int, int]] = {}

    def see(module: nn.Module, key: torch.Tensor) -> None:
        shapes[module] = (key.shape[1], key.shape[3])

    try:
        tiny = tiny_model(model)
        with seeing_keys(tiny, see):
            probe_logits(tiny)
    except Exception as error:  # hundreds of architectures fail in as many ways, and all work without
        logger.warning(f"HadaCore: the means of keys are not measured: no tiny model could be run: {error}")
        return {}
    return {name: shapes[module] for name, module in tiny.named_modules() if module in shapes}


@contextmanager
def seeing_keys(model: PreTrainedModel, see: Callable[[nn.Module, torch.Tensor], None]) -> Iterator[None]:
    """Call a function with every attention module that runs and its keys.

    Args:
        model: in full precision.
        see: gets the keys ``[B, Hkv, L, D]``, rotary embeddings applied.
    """
    config: Any = model.config.get_text_config(decoder=True)
    name = config._attn_implementation

    def attend(
        module: nn.Module, query: Any, key: torch.Tensor, value: Any, *args: Any, **kwargs: Any
    ) -> Any:
        see(module, key)
        own: Any = ALL_ATTENTION_FUNCTIONS.get(name)
        own = own or sys.modules[type(module).__module__].eager_attention_forward
        return own(module, query, key, value, *args, **kwargs)

    masks: Any = ALL_MASK_ATTENTION_FUNCTIONS
    with registered(ALL_ATTENTION_FUNCTIONS, attend), registered(masks, masks[name]):
        config._attn_implementation = PROBE
        try:
            yield
        finally:
            config._attn_implementation = name


class KeyMeans:
    """The means of the keys of one decoder layer.

    Args:
        name: of the layer.
        layer: whose attention modules will run.
        wanted: full names of those whose keys count.
    """

    def __init__(self, name: str, layer: nn.Module, wanted: Mapping[str, tuple[int, int]]):
        names = {module: f"{name}.{part}".rstrip(".") for part, module in layer.named_modules()}
        self._names = {module: full for module, full in names.items() if full in wanted}
        self._sums: dict[str, torch.Tensor] = {}
        self._tokens: dict[str, int] = {}

    def see(self, module: nn.Module, key: torch.Tensor) -> None:
        """Count the keys ``[B, Hkv, L, D]`` of a module."""
        if (name := self._names.get(module)) is None:
            return
        tokens = key.shape[0] * key.shape[2]
        total = key_mean(key).mean(0) * tokens
        self._sums[name] = self._sums[name] + total if name in self._sums else total
        self._tokens[name] = self._tokens.get(name, 0) + tokens

    def tensors(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """What is stored of them, ``[Hkv, D]`` by full name."""
        return {
            f"{name}.{K_MEAN}": (total / self._tokens[name]).to(dtype) for name, total in self._sums.items()
        }
