"""Decoding with one CUDA graph per step, inside transformers' own `generate`.

`enable_cuda_graphs` binds six of the methods that `generate` calls on its model. They give it a
`DecodeCache` and, where transformers would `torch.compile` the forward pass for decoding (a minute or
more), a function that captures it in a CUDA graph at the second step and replays it from then on. Logits
processing, sampling, stopping and streaming stay transformers' own, and what cannot be served takes the
ordinary path.
"""

import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.generation import GenerationMode
from transformers.masking_utils import create_masks_for_generate
from transformers.utils import logging
from transformers.utils.generic import ModelOutput, is_flash_attention_requested

from ..attention.decode_cache import DecodeCache, decode_layers, layer_windows
from ..attention.interface import find_intervals
from ..attention.kv_cache import QuantizedDecodeCache, attention_mode, quantized_layers, quantized_windows
from ..modules.stream_rotation import is_rotation
from .graph import CudaCapture, Session, UnsupportedInput, run_step

logger = logging.get_logger(__name__)

_MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
# What a text model's decoding step is given besides tokens, cache and mask.
_TEXT_INPUTS = {"position_ids", "logits_to_keep", "use_cache"}
_HOOKS = (
    "_prepare_cache_for_generation",
    "_valid_auto_compile_criteria",
    "_optimize_model_for_decode",
    "get_compiled_call",
    "create_masks_for_generate",
)
# Replaced only where a model has no way of its own to make inputs.
_INPUTS_HOOK = "prepare_inputs_for_generation"


def enable_cuda_graphs(model: PreTrainedModel) -> None:
    """Let `model.generate` decode with CUDA graphs.

    Works for any decoder-only model of transformers that can be compiled in one graph, quantized or not; for
    others it changes nothing. The key/value buffers and graphs of the last `generate` call are kept for the
    next one; `disable_cuda_graphs` frees them.

    Args:
        model: loaded.
    """
    if isinstance(model, GenerationMixin) and all(
        getattr(type(model), hook) is getattr(base, hook, None)
        for hook in (*_HOOKS[:4], "_sample", "generate")
        for base in (GenerationMixin if hasattr(GenerationMixin, hook) else PreTrainedModel,)
    ):
        graphs = DecodeGraphs(model)
        for hook in (*_HOOKS, _INPUTS_HOOK):
            if hook != _INPUTS_HOOK or getattr(type(model), hook) is getattr(GenerationMixin, hook):
                setattr(model, hook, getattr(graphs, hook))


def disable_cuda_graphs(model: PreTrainedModel) -> None:
    """Undo `enable_cuda_graphs` and free what was kept.

    Args:
        model: enabled or not.
    """
    for hook in (*_HOOKS, _INPUTS_HOOK):
        model.__dict__.pop(hook, None)


class DecodeGraphs:
    """The hooks of one model, and what is kept between `generate` calls.

    Args:
        model: held by a weak reference, so that deleting it frees its memory at once.

    Attributes:
        capture: makes graphs.
        device_types: where graphs are used.
    """

    capture: type[CudaCapture] = CudaCapture
    device_types: tuple[str, ...] = ("cuda",)

    def __init__(self, model: PreTrainedModel):
        self._model_reference = weakref.ref(model)
        self._session: Session | None = None
        self._last_cache: Callable[[], DecodeCache | None] = lambda: None
        # Why a capture failed, and of which state of the model.
        self._failure: str | None = None
        self._failed_fingerprint: tuple[Any, ...] = ()
        # `generate` may run in several threads; each has its own cache.
        self._thread = threading.local()

    # Copies and pickles of a model get hooks of their own.
    def __deepcopy__(self, memo: dict[int, Any]) -> "DecodeGraphs":
        return type(self)(memo.get(id(self._model), self._model))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._model,)

    @property
    def _model(self) -> Any:
        model = self._model_reference()
        assert model is not None, "a hook was called without its model"
        return model

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: GenerationMode,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """Hook: put a cache into `model_kwargs`."""
        model = self._model
        self._thread.cache = lambda: None
        if self._is_wanted(generation_config):
            obstacle = self._obstacle(generation_config, model_kwargs, generation_mode)
            if obstacle is None:
                cache = self._new_cache(max_cache_length, bool(generation_config.return_dict_in_generate))
                model_kwargs["past_key_values"] = cache
                return
            _tell(obstacle)
        type(model)._prepare_cache_for_generation(
            model, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )

    def _is_wanted(self, generation_config: GenerationConfig) -> bool:
        """Whether the user has not asked for something else."""
        return (
            self._model.device.type in self.device_types
            and not generation_config.disable_compile
            and generation_config.compile_config is None
            and generation_config.cache_implementation in (None, "static")
            and generation_config.use_cache is not False
        )

    def _obstacle(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], mode: GenerationMode
    ) -> str | None:
        """Why this call cannot use graphs, if so."""
        if generation_config.is_assistant or mode not in _MODES:
            kind = "assisted generation" if generation_config.is_assistant else mode.value.replace("_", " ")
            return f"{kind} is not supported"
        if generation_config.output_attentions or generation_config.output_hidden_states:
            return "output_attentions and output_hidden_states are not supported"
        if model_kwargs.get("past_key_values") is not None:
            return "past_key_values was given"
        if attention_mode(self._model.config) is not None:
            if quantized_windows(self._model.config) is None:
                return f"{type(self._model).__name__} is not supported with 8-bit attention"
            mask = model_kwargs.get("attention_mask")
            if mask is not None and _has_gaps(mask):
                return "the attention mask has gaps, or padding on the right"
        if self._failure is not None and self._failed_fingerprint == _fingerprint(self._model):
            return self._failure
        return model_obstacle(self._model)

    def _new_cache(self, limit: int, keep: bool) -> DecodeCache:
        model = self._model
        fingerprint = _fingerprint(model)
        session = self._session
        is_quantized = attention_mode(model.config) is not None
        # A cache that is still in use (another thread, a custom loop that has kept it) keeps its session.
        if session is None or session.fingerprint != fingerprint or _in_use(self._last_cache()):
            layers = (quantized_layers if is_quantized else decode_layers)(model.config)
            assert layers is not None, "checked by model_obstacle"
            self._session = session = Session(list(layers), fingerprint)
        session.layers[0].progress.device_offsets = model.config._attn_implementation == "sdpa"
        kind = QuantizedDecodeCache if is_quantized else DecodeCache
        cache = kind(session.layers, limit=limit, keep=keep)
        cache.session = session  # type: ignore[attr-defined]
        self._last_cache = self._thread.cache = weakref.ref(cache)
        return cache

    def _valid_auto_compile_criteria(
        self, model_kwargs: dict[str, Any], generation_config: GenerationConfig
    ) -> bool:
        """Hook: whether `get_compiled_call` is asked for."""
        if isinstance(model_kwargs.get("past_key_values"), DecodeCache):
            return True
        return type(self._model)._valid_auto_compile_criteria(self._model, model_kwargs, generation_config)

    def get_compiled_call(self, compile_config: Any) -> Callable[..., ModelOutput]:
        """Hook: the forward pass for decoding."""
        if self._current_cache() is not None:
            return self._step
        return type(self._model).get_compiled_call(self._model, compile_config)

    def _current_cache(self) -> DecodeCache | None:
        cache = getattr(self._thread, "cache", lambda: None)()
        return cache if _in_use(cache) else None

    @contextmanager
    def _optimize_model_for_decode(self) -> Iterator[None]:
        """Hook: entered after prefill, left after the last token."""
        model, cache = self._model, self._current_cache()
        with type(model)._optimize_model_for_decode(model):
            if cache is None:
                yield
                return
            cache.start_decoding()
            try:
                yield
            finally:
                cache.finish(model.config)

    def create_masks_for_generate(self, *args: Any, **kwargs: Any) -> Any:
        """Hook: 4-D masks for a forward pass.

        In decoding they are left to the model, and so become part of the graph, except where a graph cannot
        make them: those of eager attention are filled from the host, and for other attention than "sdpa" a
        full window's depend on a number that only Python knows.
        """
        cache = kwargs.get("past_key_values")
        if isinstance(cache, DecodeCache) and cache.is_decoding:
            cache.make_room()
            if self._masks_in_graph(cache):
                return kwargs["attention_mask"]
        create = getattr(type(self._model), "create_masks_for_generate", create_masks_for_generate)
        return create(*args, **kwargs)

    def _masks_in_graph(self, cache: DecodeCache) -> bool:
        return cache.masks_in_graph and self._model.config._attn_implementation != "eager"

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Any = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Hook: the inputs of a forward pass.

        In decoding they are the last columns of what `generate` keeps. transformers' general function gives
        the same, but takes its time while the GPU waits for the next step.
        """
        model, cache = self._model, past_key_values
        if (
            isinstance(cache, DecodeCache)
            and cache.is_decoding
            and next_sequence_length == 1
            and not is_first_iteration
            and kwargs.keys() <= _TEXT_INPUTS
            and self._masks_in_graph(cache)
            and input_ids.device == cache.progress.position.device
            and not model.is_remote_code()
        ):
            inputs = {"input_ids": input_ids[:, -1:], "past_key_values": cache}
            if kwargs.get("position_ids") is not None:
                inputs["position_ids"] = kwargs["position_ids"][..., -1:]
            if attention_mask is not None:
                inputs["attention_mask"] = attention_mask
            return inputs | {name: value for name, value in kwargs.items() if name != "position_ids"}
        return type(model).prepare_inputs_for_generation(
            model,
            input_ids,
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )

    def _step(self, **inputs: Any) -> ModelOutput:
        """The forward pass: a graph's, if it is a decoding step, else the model's own (chunked prefill)."""
        model = self._model
        cache = inputs.pop("past_key_values")
        if not cache.is_decoding:
            return model(past_key_values=cache, **inputs)
        cache.make_room()
        session: Session = cache.session
        try:
            graph = session.graph(inputs)
        except UnsupportedInput as error:
            _tell(f"the model's inputs have {error}")
            return run_step(model, cache, inputs)
        output = graph.run(model, cache, inputs, self.capture)
        if graph.obstacle is not None:
            self._failure = f"the model cannot be captured: {graph.obstacle}"
            self._failed_fingerprint = session.fingerprint
            _tell(self._failure)
        return output


def _tell(reason: str) -> None:
    logger.warning_once(f"HadaCore: generating without CUDA graphs, which is slower: {reason}")


def _in_use(cache: Any) -> bool:
    # One that was kept has become a dynamic one.
    return isinstance(cache, DecodeCache) and cache.in_use


def _has_gaps(attention_mask: torch.Tensor) -> bool:
    """Whether decoding needs more of a mask than where each sequence starts."""
    if attention_mask.dim() != 2:
        return True
    (_, end), _, has_gaps = find_intervals(attention_mask.bool())
    return has_gaps or bool((end != attention_mask.shape[1]).any())


def model_obstacle(model: Any) -> str | None:
    """Why a model cannot decode with CUDA graphs.

    Args:
        model: loaded.

    Returns:
        None if nothing speaks against it.
    """
    if model.config.is_encoder_decoder:
        return "encoder-decoder models are not supported"
    if model.training:
        return "the model is in training mode"
    if not model._can_compile_fullgraph or layer_windows(model.config) is None:
        return f"{type(model).__name__} is not supported"
    if is_flash_attention_requested(model.config) or model.config._attn_implementation == "flex_attention":
        return f"attn_implementation={model.config._attn_implementation!r} is not supported; use 'sdpa'"
    if "forward" in model.__dict__ or model._compiled_call_impl is not None:
        return "the model's forward was replaced, by torch.compile or a hook"
    if len(set(getattr(model, "hf_device_map", {"": None}).values())) > 1:
        return "the model is on several devices"
    peft = sys.modules.get("peft.tuners.tuners_utils")
    # Of hundreds of modules, at every call of `generate`.
    for module in model.modules():
        state = module.__dict__
        if "_hf_hook" in state:
            return f"{_name_of(module, model)} is offloaded"
        if peft is not None and isinstance(module, peft.BaseTunerLayer):
            return "adapters are not supported; merge them first"
        hooks = (*state["_forward_hooks"].values(), *state["_forward_pre_hooks"].values())
        if hooks and any(map(_is_foreign, hooks)):
            return f"{_name_of(module, model)} has a forward hook, which a graph would not run"
    return None


def _name_of(module: Any, model: Any) -> str:
    return next(name for name, other in model.named_modules() if other is module) or "the model"


def _is_foreign(hook: Callable[..., Any]) -> bool:
    """Whether a forward hook may do more than launch kernels (transformers' record outputs when asked to)."""
    return not (is_rotation(hook) or (getattr(hook, "__module__", None) or "").startswith("transformers."))


def _fingerprint(model: Any) -> tuple[Any, ...]:
    """What a graph depends on besides its inputs: a change of it makes captured graphs void."""
    tensors = [
        # A divided Parameter has no address, its local part has.
        getattr(tensor, "_local_tensor", tensor)
        for module in model.modules()
        for tensor in (*module._parameters.values(), *module._buffers.values())
        if tensor is not None
    ]
    return (
        model.config._attn_implementation,
        # Tensors made in inference mode cannot be written outside of it.
        torch.is_inference_mode_enabled(),
        # In-place changes count too: an int4 layer may keep its weight in another order as well.
        tuple((t.data_ptr(), None if t.is_inference() else t._version) for t in tensors),
    )
