"""HadaCoreHfQuantizer: transformers' hooks, each a call into the rooms of this package."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from . import compat, int4, integrity
from .attention.key_means import add_key_means, key_mean_parameters, remove_key_means
from .attention.operands import ATTENTION_NAMES
from .config import DERIVED_OPTIONS, HadaCoreConfig
from .decoding.compile_ahead import compile_ahead
from .decoding.generation import disable_cuda_graphs, enable_cuda_graphs
from .errors import CheckpointError, ConfigError, QuantizationError, UnsupportedError
from .fusion.fuse import fuse, joined_layers, unfuse
from .layer_plan import LayerPlan, plan_layers
from .modules.experts import HadaCoreExperts, dequantize_experts, swap_experts
from .modules.linear import HadaCoreLinear
from .modules.stream_rotation import StreamRotation, fold_stream_rotation, rotate_stream
from .name_patterns import name_prefix
from .parallel.tensor_parallel import complete_plan, keep_local, tensor_parallel_size
from .solvers.rtn import quantize_weight

logger = logging.get_logger(__name__)

# A step of one sequence, and a short prompt.
_TOKENS_COMPILED_AHEAD = (1, 128)
_SUFFIXES = ("", "_scale", "_zero")
_INPUT_PERM = "input_perm"


class HadaCoreHfQuantizer(compat.Quantizer):
    """Makes `from_pretrained` load models with int4 weights.

    Full-precision checkpoints are quantized while they load, weight by weight; checkpoints saved by this
    class load as they are.

    Args:
        quantization_config: the options.
        pre_quantized: whether the checkpoint already holds int4 weights.
    """

    requires_calibration = False
    quantization_config: HadaCoreConfig

    def __init__(self, quantization_config: HadaCoreConfig, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        quantization_config.validate()
        if quantization_config.dequantize and not self.pre_quantized:
            raise ConfigError("dequantize=True needs a quantized checkpoint; this one is in full precision")
        if not self.pre_quantized:
            _refuse_offline_options(quantization_config)
        self._plan = LayerPlan()
        self._damaged: list[str] = []

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse placements that cannot work, before anything is loaded.

        Raises:
            ConfigError: on-the-fly quantization or `dequantize=True` with disk offload.
        """
        if not isinstance(device_map, dict) or "disk" not in device_map.values():
            return
        if not self.pre_quantized:
            raise ConfigError(
                "device_map puts modules on disk, but offloaded weights are read from the original "
                "full-precision files; quantize offline first (hadacore quantize SRC DST), then load DST "
                "with this device_map, or leave disk out of it"
            )
        if self.quantization_config.dequantize:
            raise ConfigError("dequantize=True cannot be combined with modules on disk in device_map")

    def update_device_map(self, device_map: Any) -> Any:
        """Default to the current GPU, where there is one: int4 weights are made for it."""
        if device_map is not None or not torch.cuda.is_available() or torch.distributed.is_initialized():
            return device_map
        device = torch.cuda.current_device()
        logger.info(f"HadaCore: no device_map given, loading on cuda:{device}")
        return {"": device}

    def choose_attention(self, config: PreTrainedConfig) -> None:
        """8-bit attention of the text model if the options say so, and `from_pretrained` nothing else."""
        mode = self.quantization_config.attention
        text_config: Any = config.get_text_config(decoder=True)
        if (
            mode is not None
            and not self.quantization_config.dequantize
            and text_config._attn_implementation is None
        ):
            text_config._attn_implementation = ATTENTION_NAMES[mode]

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Scales, activations and what stays in full precision are fp16, bf16 or fp32.

        Raises:
            ConfigError: any other dtype.
        """
        if dtype not in (torch.float16, torch.bfloat16, torch.float32):
            raise ConfigError(f"HadaCore models run in float16, bfloat16 or float32, got dtype={dtype}")
        return dtype

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        """Swap modules for int4 ones on the meta device, and check the files that will be read."""
        config = self.quantization_config
        self._plan = plan = plan_layers(model, config, strict=not self.pre_quantized)
        if not self.pre_quantized:
            logger.warning(f"HadaCore: {plan.describe()}")
        if not (plan.linears or plan.experts or plan.tied_head):
            raise ConfigError(
                f"nothing in {type(model).__name__} can be quantized with this config: {plan.describe()}"
            )
        self._check_options_for_ranks(model)
        swap_modules(model, plan)
        prefix = name_prefix(model)
        add_key_means(model, lambda name: config.key_mean_shape(prefix + name))
        complete_plan(model, on_the_fly=not self.pre_quantized)
        self._check_files(model, checkpoint_files)
        for name, parameter in _own_parameters(model):
            # Not to be drawn at random before loading: `normal_` has no int32 version.
            parameter._is_hf_initialized = True  # type: ignore[attr-defined]
            if not self.pre_quantized and self._is_packed(model, name):
                _as_load_placeholder(model, name)

    def _check_options_for_ranks(self, model: PreTrainedModel) -> None:
        if self._plan.experts and compat.uses_expert_parallelism(model):
            raise UnsupportedError(
                "expert parallelism does not work with int4 experts; use tp_size, which divides every "
                "expert, or device_map"
            )
        if tensor_parallel_size(model) == 1:
            return
        if self.quantization_config.dequantize:
            raise ConfigError("dequantize=True cannot be combined with tensor parallelism")
        if self._plan.tied_head is not None:
            raise ConfigError(
                "quantize_lm_head=True cannot untie the output head under tensor parallelism; quantize "
                "offline (hadacore quantize SRC DST) and load DST"
            )

    def _check_files(self, model: PreTrainedModel, files: list[str] | None) -> None:
        if not files or not all(str(file).endswith(".safetensors") for file in files):
            return
        headers = integrity.verify_files(files)
        if self.pre_quantized:
            sources = compat.checkpoint_names(model, list(headers), self)
            # Scales may be stored in another floating-point dtype than the one asked for.
            expected = {
                sources.get(name, name): (None if p.is_floating_point() else p.dtype, tuple(p.shape))
                for name, p in _own_parameters(model)
            }
            integrity.verify_quantized(headers, expected)
            integrity.verify_permutations(
                headers, [name for name in expected if name.endswith(f".{_INPUT_PERM}")]
            )

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        """Whether a full-precision tensor of this name becomes int4 while it loads."""
        return not self.pre_quantized and self._is_packed(model, param_name)

    def _is_packed(self, model: PreTrainedModel, param_name: str) -> bool:
        module, name = _owner(model, param_name)
        if isinstance(module, HadaCoreLinear):
            return name == "weight"
        return isinstance(module, HadaCoreExperts) and name in module.projections

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: torch.Tensor) -> float:
        """Bytes per element of what will be in memory, placeholders and `dequantize=True` included."""
        module, _ = _owner(model, param_name)
        is_int4 = isinstance(module, HadaCoreLinear | HadaCoreExperts)
        if is_int4 and self._is_packed(model, param_name):
            if self.quantization_config.dequantize:
                return int4.NIBBLES_PER_WORD * model.dtype.itemsize
            return torch.int32.itemsize
        return param.element_size()

    def get_quantize_ops(self) -> Any:
        """The conversion that turns a loaded full-precision tensor into its int4 tensors."""
        return compat.make_quantize_op(self, self._quantize_or_record)

    def _quantize_or_record(
        self, model: PreTrainedModel, name: str, value: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        try:
            return self.quantize_tensor(model, name, value)
        except QuantizationError as error:
            # The loader would swallow it into a RuntimeError of its own; `raise_recorded` comes after.
            self._damaged.append(str(error))
            return self.quantize_tensor(model, name, torch.zeros_like(value))

    def raise_recorded(self) -> None:
        """Raise what went wrong while weights were quantized by the loader.

        Raises:
            QuantizationError: naming every weight that could not be quantized.
        """
        if self._damaged:
            raise QuantizationError("; ".join(self._damaged))

    def quantize_tensor(
        self, model: PreTrainedModel, name: str, value: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Quantize one weight of the model.

        Args:
            model: with swapped modules.
            name: full name of the Parameter.
            value: ``[N, K]``, or fused experts in the model's own order.

        Returns:
            The int4 tensors under their full names; the value itself if it stays in full precision.

        Raises:
            QuantizationError: the weight holds NaN or infinite values.
        """
        if not self._is_packed(model, name):
            return {name: value}
        module, leaf = _owner(model, name)
        if isinstance(module, HadaCoreExperts) and module.is_transposed:
            value = value.transpose(-1, -2)
        weight = quantize_weight(
            value,
            group_size=module.group_size,
            symmetric=module._parameters[f"{leaf}_zero"] is None,
            name=name,
        )
        tensors = (weight.packed, weight.scale, weight.zero)
        return {
            name + suffix: nn.Parameter(tensor, requires_grad=False)
            for suffix, tensor in zip(_SUFFIXES, tensors, strict=True)
            if tensor is not None
        }

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        self.raise_recorded()
        keep_local(model)
        for name, parameter in _own_parameters(model):
            # The loader lets every floating-point Parameter require a gradient.
            parameter.requires_grad_(False)
            if name.endswith("_scale") and not parameter.is_meta and not parameter.isfinite().all():
                raise CheckpointError(f"{name} holds NaN or infinite scales; the checkpoint is damaged")
        compat.drop_converters_of(model, [name for name, _ in _int4_parameters(model)])
        if self.quantization_config.dequantize:
            return self._dequantize(model)
        if self.quantization_config.stream_rotation is not None:
            rotate_stream(model, StreamRotation(**self.quantization_config.stream_rotation))
        if self._plan.tied_head is not None:
            quantize_tied_head(model, self._plan.tied_head, self.quantization_config)
        for module in model.modules():
            if isinstance(module, HadaCoreLinear | HadaCoreExperts):
                module.prepare()
        if any(parameter.device.type == "cuda" for parameter in model.parameters()):
            fuse(model)
            compile_ahead(model, joined_layers(model), _TOKENS_COMPILED_AHEAD)
        if self.quantization_config.cuda_graphs:
            enable_cuda_graphs(model)
        return model

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        # `model.config.dtype` is a string after `save_pretrained`.
        resolved: torch.dtype | None = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        if tensor_parallel_size(model) > 1:
            raise UnsupportedError("a model that is divided among ranks cannot be dequantized")
        for name, module in list(model.named_modules()):
            if not isinstance(module, HadaCoreLinear | HadaCoreExperts):
                continue
            if any(p.is_meta for p in module.parameters(recurse=False)):
                raise UnsupportedError(
                    f"{name} is offloaded; load the model without offloading to dequantize it"
                )
            if isinstance(module, HadaCoreExperts):
                dequantize_experts(module, resolved)
            else:
                _replace_module(model, name, module.dequantize(resolved))
        if self.quantization_config.stream_rotation is not None:
            fold_stream_rotation(model, StreamRotation(**self.quantization_config.stream_rotation))
        compat.restore_converters(model)
        remove_key_means(model)
        unfuse(model)
        disable_cuda_graphs(model)
        return model

    def is_serializable(self) -> bool:
        """Whether `save_pretrained` works."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether adapters can be trained on the model; the int4 weights themselves are frozen."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Whether `torch.compile` works."""
        return True


def swap_modules(model: PreTrainedModel, plan: LayerPlan) -> None:
    """Replace the modules that a plan names by int4 ones with empty Parameters.

    Args:
        model: on the meta device; the default dtype is that of the scales.
        plan: made for this model.
    """
    for name, spec in plan.linears.items():
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        replacement = HadaCoreLinear(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            group_size=spec.group_size,
            symmetric=spec.symmetric,
            input_perm=spec.input_perm,
            dtype=linear.weight.dtype,
            device=linear.weight.device,
        )
        replacement.bias = linear.bias
        model.set_submodule(name, replacement.train(linear.training))
    for name, spec in plan.experts.items():
        module = model.get_submodule(name)
        dtype = next(module.parameters()).dtype
        swap_experts(module, group_size=spec.group_size, symmetric=spec.symmetric, dtype=dtype)


def quantize_tied_head(model: PreTrainedModel, name: str, config: HadaCoreConfig) -> None:
    """Give an output head that shares the embedding's weight an int4 weight of its own.

    Args:
        model: loaded; its config is changed to say that the embedding is no longer tied.
        name: of the head.
        config: gives group size and symmetry.

    Raises:
        UnsupportedError: the head is offloaded.
    """
    head = model.get_submodule(name)
    assert isinstance(head, nn.Linear)
    if head.weight.is_meta:
        raise UnsupportedError(f"quantize_lm_head=True cannot untie {name} while it is offloaded")
    _replace_module(model, name, HadaCoreLinear.from_linear(head, config, name=name))
    model.all_tied_weights_keys = {
        target: source for target, source in model.all_tied_weights_keys.items() if target != f"{name}.weight"
    }
    for part in (model.config, model.config.get_text_config()):
        part.tie_word_embeddings = False


def _replace_module(model: PreTrainedModel, name: str, replacement: nn.Module) -> None:
    """Set a submodule; the accelerate hook of the one it replaces goes over to it."""
    hook = getattr(model.get_submodule(name), "_hf_hook", None)
    model.set_submodule(name, replacement)
    if hook is not None:
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(replacement, hook)


def _refuse_offline_options(config: HadaCoreConfig) -> None:
    """Options of checkpoints, which loading a full-precision one cannot fulfil."""
    if config.method != "rtn":
        raise ConfigError(
            f"method={config.method!r} needs calibration data: quantize offline (hadacore quantize --method "
            f'{config.method} SRC DST) and load DST, or use method="rtn"'
        )
    for option in DERIVED_OPTIONS:
        if getattr(config, option):
            raise ConfigError(f"{option} describes a quantized checkpoint; this one is in full precision")


def _owner(model: nn.Module, param_name: str) -> tuple[Any, str]:
    module_name, _, name = param_name.rpartition(".")
    return model.get_submodule(module_name), name


def _int4_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Packed weights, scales, zeros and input_perm (not biases) of every int4 module, with full names."""
    found = []
    for module_name, module in model.named_modules():
        if isinstance(module, HadaCoreLinear):
            names = [f"weight{suffix}" for suffix in _SUFFIXES] + [_INPUT_PERM]
        elif isinstance(module, HadaCoreExperts):
            names = [name + suffix for name in module.projections for suffix in _SUFFIXES]
        else:
            continue
        for name in names:
            parameter = module._parameters[name]
            if parameter is not None:
                found.append((f"{module_name}.{name}" if module_name else name, parameter))
    return found


def _own_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """What this package has given a model: that of its int4 modules, and the means of keys."""
    return [*_int4_parameters(model), *key_mean_parameters(model).items()]


def _as_load_placeholder(model: nn.Module, name: str) -> None:
    """Give a packed placeholder the dtype in which its full-precision source shall be read.

    transformers casts what it reads to the placeholder's dtype, and int32 would make weights zero.
    """
    module, leaf = _owner(model, name)
    packed = module.get_parameter(leaf)
    scale = module.get_parameter(f"{leaf}_scale")
    placeholder = nn.Parameter(torch.empty_like(packed, dtype=scale.dtype), requires_grad=False)
    placeholder._is_hf_initialized = True  # type: ignore[attr-defined]
    setattr(module, leaf, placeholder)
