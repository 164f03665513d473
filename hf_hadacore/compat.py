"""Every difference between the transformers versions we support (5.17 to 5.x), in one place."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    ConversionOps,
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.distributed import tensor_parallel
from transformers.modeling_utils import LoadStateDictConfig, _get_dtype
from transformers.quantizers import auto, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging
from transformers.utils.loading_report import LoadStateDictInfo

# The tensor-parallel style of a Parameter that every rank keeps whole.
REPLICATE = "replicate"
if REPLICATE not in tensor_parallel.ALL_PARALLEL_STYLES:
    as_it_is: Any = tensor_parallel.TensorParallelLayer()
    tensor_parallel.ALL_PARALLEL_STYLES.register(REPLICATE, as_it_is)

TensorQuantizer = Callable[[PreTrainedModel, str, torch.Tensor], dict[str, torch.Tensor]]


def register(method: str, config_class: type, quantizer_class: type) -> None:
    """Make `from_pretrained` know a quantization method; doing it twice changes nothing.

    Args:
        method: the `quant_method` of configs.
        config_class: a `QuantizationConfigMixin`.
        quantizer_class: a `HfQuantizer`.
    """
    if method not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(method)(config_class)
    if method not in auto.AUTO_QUANTIZER_MAPPING:
        register_quantizer(method)(quantizer_class)
    # Without this a user's `dequantize=True` is ignored on a checkpoint that has a config of its own.
    if config_class not in auto.LOADING_ATTRIBUTES_CONFIG_TYPES:
        auto.LOADING_ATTRIBUTES_CONFIG_TYPES += (config_class,)  # type: ignore[assignment]


class Quantizer(HfQuantizer):
    """A quantizer that is shown the model's config before the model is made."""

    def update_attn_implementation(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """Hook since 5.18."""
        self.choose_attention(config)
        return config

    def update_tp_plan(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """Hook up to 5.20, and the only one of 5.17 that gets the config."""
        config = super().update_tp_plan(config)  # type: ignore[misc]
        self.choose_attention(config)
        return config

    def choose_attention(self, config: PreTrainedConfig) -> None:
        """Set the attention implementation, where the user has not.

        Args:
            config: the model's.
        """


class _QuantizeOp(ConversionOps):
    """The last step of loading a full-precision weight: quantize it."""

    def __init__(self, hf_quantizer: Any, quantize: TensorQuantizer):
        self.hf_quantizer = hf_quantizer  # transformers looks for this attribute
        self.quantize = quantize

    def convert(  # type: ignore[override]  # plain tensors are accepted, as in transformers' own quantizers
        self, input_dict: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, torch.Tensor]:
        tensors: dict[str, torch.Tensor] = {}
        for name, value in input_dict.items():
            tensor = value[0] if isinstance(value, list) else value
            tensors.update(self.quantize(kwargs["model"], name, tensor))
        return tensors


def make_quantize_op(hf_quantizer: Any, quantize: TensorQuantizer) -> ConversionOps:
    """A loading step that quantizes.

    Args:
        hf_quantizer: the quantizer that the loader asked.
        quantize: `(model, full name, value) -> tensors by full name`.
    """
    return _QuantizeOp(hf_quantizer, quantize)


def checkpoint_names(model: PreTrainedModel, names: Iterable[str], hf_quantizer: Any) -> dict[str, str]:
    """Which checkpoint tensor each Parameter is read from, for those that are read from just one.

    Args:
        model: on any device.
        names: of the tensors in the checkpoint.
        hf_quantizer: the model's quantizer.

    Returns:
        Parameter name -> tensor name.
    """
    mapping = deepcopy(get_model_conversion_mapping(model, None, hf_quantizer))
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    targets = model.state_dict()
    sources: dict[str, str] = {}
    for name in names:
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, targets)
        if target not in targets and name in targets:
            target, pattern = rename_source_key(name, [], [], model.base_model_prefix, targets)
        if pattern is None:
            sources[target] = name
    return sources


def drop_converters_of(model: PreTrainedModel, names: Iterable[str]) -> None:
    """Forget how Parameters were merged from several checkpoint tensors, so that they are saved as they are.

    Saving reverses the conversions of loading; packed weights cannot be split that way.

    Args:
        model: loaded.
        names: of the Parameters.
    """
    conversions = getattr(model, "_weight_conversions", None)
    if not conversions:
        return
    names = list(names)

    def makes_one_of_them(conversion: Any) -> bool:
        patterns = [pattern.replace("*", ".*") for pattern in conversion.target_patterns]
        return any(re.search(pattern, name) for pattern in patterns for name in names)

    model._weight_conversions = [  # type: ignore[assignment]
        conversion
        for conversion in conversions
        if not (isinstance(conversion, WeightConverter) and makes_one_of_them(conversion))
    ]


def meta_model(
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    hf_quantizer: Any,
    dtype: str | torch.dtype | None,
    files: Iterable[Path],
) -> tuple[PreTrainedModel, LoadStateDictConfig]:
    """A model on the meta device and the loader's options, as `from_pretrained` prepares them.

    Args:
        model_class: one of transformers' own.
        config: of the model; left unchanged.
        hf_quantizer: swaps the model's modules; None leaves the model as it is.
        dtype: None means "auto".
        files: of the checkpoint, in safetensors.
    """
    config = deepcopy(config)
    names = [str(file) for file in files]
    if hf_quantizer is not None:
        config.quantization_config = hf_quantizer.quantization_config
    config, resolved = _get_dtype(dtype or "auto", names, config, None, None, True, hf_quantizer)
    with ExitStack() as stack:
        for context in model_class.get_init_context(resolved, hf_quantizer is not None, False, None):
            stack.enter_context(context)
        model = model_class(config)
        if hf_quantizer is not None:
            hf_quantizer.preprocess_model(
                model=model, dtype=resolved, device_map=None, checkpoint_files=names, use_kernels=False
            )
    loading = LoadStateDictConfig(
        dtype=resolved,
        dtype_plan=model._get_dtype_plan(resolved),
        hf_quantizer=hf_quantizer,
        weight_mapping=get_model_conversion_mapping(model, None, hf_quantizer),  # type: ignore[arg-type]
    )
    return model, loading


def target_names(
    model: PreTrainedModel, loading: LoadStateDictConfig, names: Iterable[str]
) -> dict[str, str | None]:
    """Which Parameter (or buffer) the loader makes of each checkpoint tensor, renamed and converted.

    Args:
        model: as made by `meta_model`.
        loading: made with it; notes which of its conversions were used.
        names: of the checkpoint's tensors.

    Returns:
        Tensor name -> Parameter name, in the order of the names; None for tensors that have no place.
        What is split into several Parameters is listed under the first.
    """
    mapping = loading.weight_mapping or []
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    known = model.state_dict()
    targets: dict[str, str | None] = {}
    for name in sorted(names, key=dot_natural_key):
        target, _ = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        if target not in known and name in known:
            target, _ = rename_source_key(name, [], [], model.base_model_prefix, known)
        targets[name] = target if target in known else None
    return targets


def load_tensors(
    model: PreTrainedModel,
    loading: LoadStateDictConfig,
    tensors: Mapping[str, Any],
    device: torch.device,
) -> LoadStateDictInfo:
    """Let transformers convert (and quantize) some tensors of a checkpoint and put them into a model.

    Args:
        model, loading: as made by `meta_model`.
        tensors: by name in the checkpoint; lazy safetensors slices are read one conversion at a time.
        device: where they are converted and stay.

    Returns:
        What was missing, unexpected or of another shape, and the errors of conversions as text.
    """
    with _no_progress_bars():
        info, _ = convert_and_load_state_dict_in_model(
            model=model,
            state_dict=dict(tensors),
            load_config=replace(loading, device_map={"": device}),
            disk_offload_index=None,
        )
    model._adjust_missing_and_unexpected_keys(info)
    return info


def used_conversions(loading: LoadStateDictConfig) -> list[Any]:
    """The renames and conversions that `target_names` or loading came across."""
    return [conversion for conversion in loading.weight_mapping or [] if conversion.was_used()]


def names_on_disk(model: PreTrainedModel, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors as `save_pretrained` writes them: the renames of loading reversed.

    Args:
        model: its `_weight_conversions` are reversed.
        tensors: by Parameter name, on any device.
    """
    return revert_weight_conversion(model, dict(tensors))


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Silence transformers' progress bar, which would be drawn for every call."""
    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()


def restore_converters(model: PreTrainedModel) -> None:
    """Let a dequantized model be saved in its architecture's own checkpoint format again.

    Args:
        model: dequantized.
    """
    # Without the attribute transformers takes the conversions of the architecture.
    if hasattr(model, "_weight_conversions"):
        del model._weight_conversions


def tensor_parallel_plan(model: PreTrainedModel) -> dict[str, str]:
    """The tensor-parallel styles of a model's modules and Parameters, by name with ``*`` for layer numbers.

    Args:
        model: its own plan is taken, and what the user's `DistributedConfig` says.
    """
    given = getattr(getattr(model.config, "distributed_config", None), "tp_plan", None)
    # Not the property: that of 5.17 wants a plan for expert parallelism.
    return {**(model._tp_plan or {}), **(given if isinstance(given, dict) else {})}


def uses_expert_parallelism(model: PreTrainedModel) -> bool:
    """Whether whole experts are to be on different ranks.

    Args:
        model: not distributed yet.
    """
    given = getattr(model.config, "distributed_config", None)
    # The number of such ranks since 5.19.
    return bool(getattr(given, "enable_expert_parallel", False)) or (getattr(given, "ep_size", None) or 1) > 1


def sum_outputs(module: Any, mesh: DeviceMesh) -> None:
    """Sum the outputs of fused experts over the ranks, each of which holds a part of every expert.

    What transformers installs for this ("moe_tp_experts") looks for divided Parameters in some versions.

    Args:
        module: experts; `forward` of its class takes hidden states, indices and weights of the choices.
        mesh: of the ranks.
    """
    group = mesh.get_group() if mesh.ndim == 1 else mesh.get_group("tp")

    def forward(hidden_states: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled():
            hidden_states = tensor_parallel._AllReduceBackward.apply(hidden_states, group)
            weights = tensor_parallel._AllReduceBackward.apply(weights, group)
        output = type(module).forward(module, hidden_states, index, weights)
        return tensor_parallel._AllReduceForward.apply(output, group)

    module.forward = forward
