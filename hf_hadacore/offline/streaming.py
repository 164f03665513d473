"""A full-precision checkpoint as a stream of the tensors that its quantized model is saved with.

The model is built on the meta device and prepared as `from_pretrained` prepares it: the same quantizer,
the same renames, the same conversions that fuse experts. Then transformers' own loader is called with
the source tensors of one Parameter at a time, and what it makes of them is taken off the model again.
So the result is what loading on the fly and saving would give, bit for bit, and no more than one
Parameter is ever in memory.
"""

import copy
import ctypes
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .. import compat
from ..architecture import find_model_class, load_model_config
from ..config import HadaCoreConfig
from ..errors import CheckpointError
from ..int4 import Int4Weight
from ..integrity import TensorInfo, checkpoint_files, verify_files
from ..layer_plan import LayerPlan
from ..modules.experts import expert_projections
from ..modules.stream_rotation import rotate_stream
from ..quantizer import HadaCoreHfQuantizer, swap_modules
from .layer_record import LayerRecord, make_record
from .rotation_search import choose_rotation, plan_rotation
from .weight_rotation import WeightRotation


class Unit(NamedTuple):
    """What is converted and written in one go.

    Attributes:
        name: the Parameter (or buffer) of the model that the tensors belong to.
        sources: `{key given to the loader: tensor of the source checkpoint}`.
    """

    name: str
    sources: dict[str, str]


class SourceModel:
    """A full-precision checkpoint and the quantized model that it becomes.

    Args:
        folder: local checkpoint.
        config: the options of the quantizer.
        dtype: of scales and of what stays in full precision; None takes the checkpoint's own.
        device: where weights are quantized.
        rotation: of the weights before they are quantized, see `rotation_search.plan_rotation`; "auto" is
            that of `choose_rotation`.

    Attributes:
        folder: local checkpoint.
        stored: what the headers of its files say.
        headers: the source tensors, as the loader sees them.
        model: the quantized model, on the meta device.
        layer_plan: what is quantized, how, and what is not.
        units: the work, in the order of the model's Parameters.
        total_parameters: elements of the quantized model's Parameters, tied ones counted once.
        unused: source tensors that the model has no place for.
        outputs: `{name on disk: meta tensor}` in the order in which `save_pretrained` writes them.
        provenance: what else the tensors depend on, for the report.
        read_back: reads a tensor that was written before, by its name on disk; set before the first unit.

    Raises:
        CheckpointError: the checkpoint is damaged, incomplete, already quantized, or its architecture
            is none of transformers' own.
        ConfigError: the config does not fit the model.
        UnsupportedError: the model cannot be rotated so.
    """

    def __init__(
        self,
        folder: Path,
        config: HadaCoreConfig,
        *,
        dtype: str | torch.dtype | None = None,
        device: str | torch.device = "cpu",
        rotation: str = "none",
    ):
        self.folder = folder
        files = checkpoint_files(folder)
        self.stored = verify_files(files)
        self.headers, model_config = self._read_source()
        model_class = find_model_class(model_config, folder)
        self._device = torch.device(device)
        self.provenance: dict[str, Any] = {}
        self.read_back: Callable[[str], torch.Tensor]

        try:
            plain, loading = compat.meta_model(model_class, model_config, None, dtype, files)
        except Exception as error:  # hostile values fail in as many ways as there are models
            raise CheckpointError(f"{folder}: no model can be built from its config.json: {error}") from error
        self._rotation = (
            choose_rotation(plain) if rotation == "auto" else plan_rotation(plain, rotation, keep_tied=True)
        )
        if self._rotation.kind != "none":
            self.provenance["rotation"] = self._rotation.kind
        if self._rotation.stream is not None:
            rotate_stream(plain, self._rotation.stream)
        self._tied: dict[str, str] = dict(plain.all_tied_weights_keys)
        targets = compat.target_names(plain, loading, self.headers)
        self.unused = [name for name, target in targets.items() if target is None]
        self._sources = self._group_sources(targets)
        self._check_against(plain, loading)
        self._plain, self._plain_loading = plain.eval(), loading
        if self._rotation.norms:
            norms = [self._sources[name] for name in self._rotation.norms]
            self._load_plain({key: source for sources in norms for key, source in sources.items()}, "norms")
            self._rotation.set_gains(take_loaded(plain))

        recipe = self._recipe(config, plain)
        recipe.stream_rotation = None if self._rotation.stream is None else self._rotation.stream._asdict()
        self._quantizer = _RecordingQuantizer(recipe, self._rotation)
        self.model, self._loading = compat.meta_model(
            model_class, model_config, self._quantizer, dtype, files
        )
        self.layer_plan = self._quantizer.layer_plan
        if self.layer_plan.tied_head is not None:
            self._untie(self.layer_plan.tied_head)
        compat.target_names(self.model, self._loading, self.headers)
        self._conversions = compat.used_conversions(self._loading)

        state = {name: tensor for name, tensor in self.model.state_dict().items() if name not in self._tied}
        self.units = [Unit(name, self._sources[name]) for name in state if name in self._sources]
        parameters = dict(self.model.named_parameters())
        self.total_parameters = sum(t.numel() for name, t in state.items() if name in parameters)
        dtypes = self._output_dtypes(plain.state_dict())
        self.outputs = self._on_disk(
            {name: torch.empty_like(t, dtype=dtypes.get(name, t.dtype)) for name, t in state.items()}
        )

    def realise(self, unit: Unit) -> tuple[dict[str, torch.Tensor], list[LayerRecord]]:
        """Read, convert and quantize the tensors of one unit.

        Args:
            unit: one of `units`.

        Returns:
            The tensors under their names on disk, and a record of each weight that was quantized.

        Raises:
            QuantizationError: a weight holds NaN or infinite values.
            CheckpointError: transformers could not convert the tensors.
        """
        self._quantizer.records.clear()
        _return_freed_memory()
        with self._open(unit) as tensors:
            info = compat.load_tensors(self.model, self._loading, tensors, self._device)
            loaded = take_loaded(self.model)
        self._quantizer.raise_recorded()
        check_conversions(unit.name, info)
        if not loaded:
            raise CheckpointError(
                f"{unit.name}: transformers made no tensor of {', '.join(unit.sources.values())}"
            )
        # What is int4 by now was rotated before.
        rotated = {
            name: self._rotation.rotate(name, tensor) if tensor.is_floating_point() else tensor
            for name, tensor in loaded.items()
        }
        return self._on_disk(rotated), list(self._quantizer.records)

    def _load_plain(self, sources: dict[str, str], name: str) -> None:
        """Give Parameters of the full-precision model the values that they have in the source."""
        with self._open(Unit(name, sources)) as tensors:
            info = compat.load_tensors(self._plain, self._plain_loading, tensors, self._device)
        check_conversions(name, info)

    def _read_source(self) -> tuple[dict[str, TensorInfo], PreTrainedConfig]:
        """The source tensors as the loader sees them, and the config of the model that they belong to."""
        return self.stored, load_model_config(self.folder)

    def _recipe(self, config: HadaCoreConfig, plain: PreTrainedModel) -> HadaCoreConfig:
        """The config of the quantized model; of its own, because a quantizer changes it."""
        config = copy.deepcopy(config)
        config.key_means = {}
        return config

    @contextmanager
    def _open(self, unit: Unit) -> Iterator[dict[str, Any]]:
        """Lazy slices of the unit's source tensors.

        The files are closed after each unit: as long as one is mapped, every page that was read of it
        counts as memory of this process.
        """
        with ExitStack() as stack:
            files = {self.headers[source].file for source in unit.sources.values()}
            opened = {file: stack.enter_context(safe_open(file, framework="pt")) for file in files}
            yield {
                key: opened[self.headers[source].file].get_slice(source)
                for key, source in unit.sources.items()
            }

    def _group_sources(self, targets: Mapping[str, str | None]) -> dict[str, dict[str, str]]:
        """`{Parameter: its sources}`; of a tied pair only what the model needs.

        Args:
            targets: source tensor -> Parameter.
        """
        groups: dict[str, dict[str, str]] = {}
        for source, target in targets.items():
            if target is not None:
                groups.setdefault(target, {})[source] = source
        for target, origin in list(self._tied.items()):
            if target not in groups:
                continue
            if origin not in groups:
                groups[origin] = _as_key(origin, groups.pop(target))
            elif self._are_equal(groups[target], groups[origin]):
                del groups[target]
            else:
                # The config says tied, the data does not: transformers then keeps both.
                del self._tied[target]
        return groups

    def _are_equal(self, one: dict[str, str], other: dict[str, str]) -> bool:
        if len(one) != 1 or len(other) != 1:
            return False
        with self._open(
            Unit("", {"one": next(iter(one.values())), "other": next(iter(other.values()))})
        ) as tensors:
            first, second = tensors["one"], tensors["other"]
            if first.get_shape() != second.get_shape() or first.get_dtype() != second.get_dtype():
                return False
            return torch.equal(first[...], second[...])

    def _check_against(self, plain: PreTrainedModel, loading: Any) -> None:
        """Check names and shapes by loading meta tensors; the model then has the dtypes of a real loading."""
        tensors = {
            key: torch.empty(self.headers[source].shape, dtype=self.headers[source].dtype, device="meta")
            for sources in self._sources.values()
            for key, source in sources.items()
        }
        info = compat.load_tensors(plain, loading, tensors, torch.device("meta"))
        for name, found, expected in sorted(info.mismatched_keys):
            raise CheckpointError(
                f"{name}: expected shape {list(expected)}, found {list(found)} in the checkpoint"
            )
        for name, error in info.conversion_errors.items():
            raise CheckpointError(f"{name}: cannot be converted: {error}")
        missing = sorted(info.missing_keys - set(self._tied))
        if missing:
            more = f" and {len(missing) - 1} more tensors" if len(missing) > 1 else ""
            raise CheckpointError(
                f"the source checkpoint lacks {missing[0]!r}{more} of {type(plain).__name__}"
            )

    def _untie(self, head: str) -> None:
        """Let a tied head have an int4 weight, made of the tensor that it shares."""
        name = f"{head}.weight"
        swap_modules(
            self.model, LayerPlan(linears={head: self._quantizer.quantization_config.layer_spec(head)})
        )
        layer: Any = self.model.get_submodule(head)
        # The loader reads the source in the dtype of the placeholder.
        as_read = torch.empty_like(layer.weight, dtype=layer.weight_scale.dtype)
        layer.weight = nn.Parameter(as_read, requires_grad=False)
        for part in (self.model.config, self.model.config.get_text_config()):
            part.tie_word_embeddings = False
        origin = self._tied.pop(name, None)
        if origin is not None:
            self._sources[name] = _as_key(name, self._sources[origin])

    def _packed_names(self) -> list[str]:
        """The Parameters that hold nibbles."""
        linears = [*self.layer_plan.linears, *filter(None, [self.layer_plan.tied_head])]
        experts = [
            f"{name}.{projection}"
            for name in self.layer_plan.experts
            for projection in expert_projections(self.model.get_submodule(name))
        ]
        return [f"{name}.weight" for name in linears] + experts

    def _output_dtypes(self, loaded: Mapping[str, torch.Tensor]) -> dict[str, torch.dtype]:
        """Dtypes of the tensors that will be written, from those that loading gave in full precision.

        The placeholders of the meta model say less: some models keep Parameters in fp32.
        """
        dtypes = {name: tensor.dtype for name, tensor in loaded.items()}
        for name in self._packed_names():
            dtypes[f"{name}_scale"] = dtypes[name]
            dtypes[name] = torch.int32
        return dtypes

    def _on_disk(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tensors of the model under their names on disk, without those that are never saved."""
        ignored = self.model._keys_to_ignore_on_save or ()
        self.model._weight_conversions = self._conversions  # type: ignore[assignment]
        compat.drop_converters_of(self.model, self._packed_names())
        return compat.names_on_disk(self.model, {n: t for n, t in tensors.items() if n not in ignored})


class _RecordingQuantizer(HadaCoreHfQuantizer):
    """The quantizer, rotating weights first, and noting what it did to them."""

    def __init__(self, config: HadaCoreConfig, rotation: WeightRotation):
        # What needs calibration is refused while loading, and can be had here.
        loadable = config.without_derived()
        loadable.method, loadable.act_order = "rtn", False
        super().__init__(loadable, pre_quantized=False)
        self.quantization_config = config
        self.records: list[LayerRecord] = []
        self._rotation = rotation

    @property
    def layer_plan(self) -> LayerPlan:
        """What the quantizer decided for the model."""
        return self._plan

    def quantize_tensor(
        self, model: PreTrainedModel, name: str, value: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        if self._is_packed(model, name):
            value = self._rotation.rotate(name, value)
        tensors = super().quantize_tensor(model, name, value)
        if f"{name}_scale" in tensors:
            self.records.append(_record(model, name, value, tensors))
        return tensors


def _return_freed_memory() -> None:
    """Give freed blocks back to the system (glibc keeps them, and a long run would grow by what it keeps)."""
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@cache
def _malloc_trim() -> Any:
    """glibc's `malloc_trim`, or None with another C library."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None


def _as_key(key: str, sources: dict[str, str]) -> dict[str, str]:
    """The single source of a tied tensor, given to the loader under another Parameter's name."""
    (source,) = sources.values()
    return {key: source}


def check_conversions(name: str, info: Any) -> None:
    """Raise what transformers' loader has swallowed.

    Args:
        name: of the unit that was loaded.
        info: what the loader returned.

    Raises:
        CheckpointError: tensors could not be converted.
    """
    if info.conversion_errors:
        raise CheckpointError(f"{name}: cannot be converted: {next(iter(info.conversion_errors.values()))}")


def take_loaded(model: nn.Module) -> dict[str, torch.Tensor]:
    """Take every tensor off the model that the loader has put there; meta tensors take their places."""
    loaded = {name: tensor for name, tensor in model.state_dict().items() if not tensor.is_meta}
    for name, tensor in loaded.items():
        module_name, _, leaf = name.rpartition(".")
        module = model.get_submodule(module_name)
        on_meta = torch.empty_like(tensor, device="meta")
        if leaf in module._parameters:
            module._parameters[leaf] = nn.Parameter(on_meta, requires_grad=False)
        else:
            module._buffers[leaf] = on_meta
    return loaded


def _record(
    model: nn.Module, name: str, value: torch.Tensor, tensors: Mapping[str, torch.Tensor]
) -> LayerRecord:
    module: Any = model.get_submodule(name.rpartition(".")[0])
    weight = Int4Weight(
        tensors[name], tensors[f"{name}_scale"], tensors.get(f"{name}_zero"), int(module.group_size)
    )
    is_transposed = getattr(module, "is_transposed", False)
    return make_record(name, value.transpose(-1, -2) if is_transposed else value, weight)
