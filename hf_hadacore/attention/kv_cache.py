"""The 8-bit key/value cache of `attn_implementation="hadacore"`, which `generate` uses with it."""

import copy
import functools
from typing import Any

from transformers import GenerationConfig, GenerationMixin, PreTrainedConfig
from transformers.cache_utils import DynamicCache
from transformers.generation import GenerationMode
from transformers.utils import logging

from ..errors import ConfigError, UnsupportedError
from .decode_cache import DecodeCache, Progress, layer_windows
from .kv_layer import Cursor, HadaCoreLayer
from .operands import ATTENTION_NAMES, MODES

logger = logging.get_logger(__name__)


class HadaCoreCache(DynamicCache):
    """An 8-bit key/value cache, for models with `attn_implementation="hadacore"` or "hadacore-int8-fp8".

    `generate` makes one of its own accord; with `past_key_values=HadaCoreCache(model.config)` it can be kept
    between calls. As in `DynamicCache` tokens are added without a limit, and `crop`, `reorder_cache`,
    `batch_repeat_interleave` and `batch_select_indices` change what is held.

    Args:
        config: the model's.
        mode: "fp8" or "int8-fp8"; None for that of the model's attention.
        offloading: keep layers without a window on the CPU, except while they are read.
        offload_only_non_sliding: False keeps those with a window there, too.

    Raises:
        ConfigError: there is no such mode.
        UnsupportedError: the model has layers other than full and sliding-window attention, or caches
            something else than their keys and values.
    """

    layers: list[Any]

    def __init__(
        self,
        config: PreTrainedConfig,
        mode: str | None = None,
        offloading: bool = False,
        offload_only_non_sliding: bool = True,
    ):
        super().__init__(offloading=offloading, offload_only_non_sliding=offload_only_non_sliding)
        self.layer_class_to_replicate = None
        self.layers = quantized_layers(config, mode)

    @property
    def is_compileable(self) -> bool:
        """False: its buffers move as they grow. `hf_hadacore.decoding.generation` has one for CUDA graphs."""
        return False

    @property
    def bytes_per_token(self) -> int:
        """Of a token in all layers together, scales included; 0 before the first."""
        return sum(layer.bytes_per_token for layer in self.layers)


class QuantizedDecodeCache(DecodeCache):
    """A `DecodeCache` of 8-bit layers."""

    def as_dynamic(self, config: PreTrainedConfig) -> DynamicCache:
        cache = HadaCoreCache(config)
        cache.layers = copy.deepcopy(self.layers)
        return cache


def attention_mode(config: PreTrainedConfig) -> str | None:
    """The mode of a model's attention, "fp8" or "int8-fp8"; None if it is not 8-bit.

    Args:
        config: the model's.
    """
    implementation = config.get_text_config(decoder=True)._attn_implementation
    return next((mode for mode, name in ATTENTION_NAMES.items() if name == implementation), None)


def quantized_windows(config: PreTrainedConfig) -> list[int | None] | None:
    """What `layer_windows` gives, for a model whose cache can be 8-bit; else None.

    Args:
        config: the model's.
    """
    # Multi-head latent attention caches what keys and values are computed from.
    is_latent = getattr(config.get_text_config(decoder=True), "kv_lora_rank", None) is not None
    return None if is_latent else layer_windows(config)


def quantized_layers(config: PreTrainedConfig, mode: str | None = None) -> list[HadaCoreLayer]:
    """The layers of an 8-bit cache, empty.

    Args:
        config, mode: as for `HadaCoreCache`.

    Raises:
        ConfigError, UnsupportedError: as there.
    """
    mode = mode or attention_mode(config) or "fp8"
    if mode not in MODES:
        raise ConfigError(f"mode must be one of {tuple(MODES)}, got {mode!r}")
    windows = quantized_windows(config)
    if windows is None:
        raise UnsupportedError(
            f"models with {type(config).__name__} cache something else than keys and values of full and "
            "sliding-window attention, which has no 8-bit form; use transformers' DynamicCache"
        )
    progress = Progress()
    cursors: dict[int | None, Cursor] = {}
    layers = []
    for window in windows:
        leads = window not in cursors
        cursor = cursors.setdefault(window, Cursor(progress))
        layers.append(HadaCoreLayer(window, progress, cursor, leads, MODES[mode]))
    return layers


def use_quantized_caches() -> None:
    """Have `generate` make a `HadaCoreCache` for every model with 8-bit attention, from now on.

    transformers asks nobody which cache a model's attention can read, and models that were not loaded by
    this package have no hooks of ours. All other models, and whoever names a cache, get what they got.
    """
    make_cache = GenerationMixin._prepare_cache_for_generation

    @functools.wraps(make_cache)
    def _prepare_cache_for_generation(
        self: Any,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: GenerationMode,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        if (
            _takes_default_cache(self, generation_config, model_kwargs)
            and attention_mode(self.config) is not None
        ):
            if quantized_windows(self.config) is not None:
                is_offloaded = generation_config.cache_implementation == "offloaded"
                cache = HadaCoreCache(self.config, offloading=is_offloaded)
                if generation_config.is_assistant:
                    cache.activate_past_recording()
                model_kwargs["past_key_values"] = cache
                return
            logger.warning_once(
                f"HadaCore: {type(self).__name__} caches something else than keys and values of full and "
                "sliding-window attention; keys and values are quantized again at every step"
            )
        make_cache(self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length)

    GenerationMixin._prepare_cache_for_generation = _prepare_cache_for_generation  # type: ignore


def _takes_default_cache(
    model: Any, generation_config: GenerationConfig, model_kwargs: dict[str, Any]
) -> bool:
    return (
        generation_config.use_cache is not False
        and generation_config.cache_implementation in (None, "dynamic", "offloaded")
        and model_kwargs.get("past_key_values") is None
        and not model.config.is_encoder_decoder
        and model._supports_default_dynamic_cache()
    )
