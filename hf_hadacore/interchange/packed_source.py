"""Checkpoints of other int4 libraries in the hadacore format: the same integers and scales, in other places.

Groups that act-order has scattered over a row are made contiguous by reordering the row, which `input_perm`
undoes on the activations. Where the layers before can deliver their outputs in that order, it is baked into
their rows instead (see `permutation`), so that nothing is left to do at run time on any number of GPUs.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .. import compat, int4
from ..architecture import load_model_config, read_config_file
from ..config import HadaCoreConfig, LayerSpec
from ..errors import CheckpointError, FormatError, UnsupportedError
from ..int4 import Int4Weight
from ..integrity import TensorInfo, verify_quantized
from ..layer_plan import LayerPlan, plan_layers
from ..modules.experts import expert_projections
from ..name_patterns import name_patterns
from ..offline.layer_record import LayerRecord, make_record
from ..offline.streaming import SourceModel, Unit, check_conversions, take_loaded
from ..parallel.permutation import PermutationGroup, permute_outputs
from ..parallel.permutation_search import permutation_groups
from .packed_formats import PackedFormat, group_order, packed_format

_SUFFIXES = ("", "_scale", "_zero")


class PackedSource(SourceModel):
    """A checkpoint of another int4 library, and the hadacore model that it becomes.

    Args:
        folder: local checkpoint.
        tensor_parallel: make full-precision weights of layers that act-order would keep from being divided
            among GPUs.

    Raises:
        CheckpointError: the checkpoint is damaged, incomplete, not quantized or hadacore's own.
        UnsupportedError: something in it has no place in the hadacore format.
    """

    _format: PackedFormat

    def __init__(self, folder: Path, *, tensor_parallel: bool = False):
        self._tensor_parallel = tensor_parallel
        super().__init__(folder, HadaCoreConfig())
        self.provenance["imported_from"] = self._format.title
        if self._orders:
            modules = [_module_of(name) for name in self._sources]
            self.provenance["act_order"] = {
                "baked": name_patterns(self._baked, modules),
                "input_perm": name_patterns(self._stored_orders, modules),
                "not_row_parallel": name_patterns(self._not_row_parallel, modules),
                "dequantized": name_patterns(self._dequantized, modules),
            }

    def _read_source(self) -> tuple[dict[str, TensorInfo], PreTrainedConfig]:
        """Packed layers look like the full-precision weights that they stand for."""
        self._format = _read_format(self.folder)
        self._parts = _packed_layers(self.stored, self._format)
        if not self._parts:
            raise CheckpointError(
                f"{self.folder}: config.json says {self._format.title}, but no tensor is called "
                f"*.{self._format.weight}"
            )
        self._specs: dict[str, LayerSpec] = {}
        self._orders: dict[str, torch.Tensor] = {}
        owned = {f"{layer}.{suffix}" for layer, parts in self._parts.items() for suffix in parts}
        headers = {name: info for name, info in self.stored.items() if name not in owned}
        for layer, parts in self._parts.items():
            rows, in_features, self._specs[layer] = self._check_headers(layer, parts)
            weight, scale = parts[self._format.weight], parts[self._format.scale]
            nbytes = sum(info.nbytes for info in parts.values())
            headers[f"{layer}.weight"] = TensorInfo(
                scale.dtype, (rows, in_features), weight.file, nbytes, weight.offset
            )
            order = self._check_values(layer, parts, rows, self._specs[layer])
            if order is not None:
                self._orders[layer] = order
        return headers, load_model_config(self.folder, quantized=True)

    def _check_headers(self, layer: str, parts: Mapping[str, TensorInfo]) -> tuple[int, int, LayerSpec]:
        """N, K and the spec of a packed layer."""
        weight = parts[self._format.weight]
        if weight.dtype != torch.int32 or len(weight.shape) != 2:
            raise CheckpointError(
                f"{layer}.{self._format.weight}: expected int32 with two dimensions, found {weight.dtype} "
                f"{list(weight.shape)}"
            )
        rows, in_features = self._format.shape(weight)
        spec = self._format.spec(layer, in_features, parts)
        expected = self._format.expected(rows, in_features, spec)
        if self._format.group_of in parts:
            expected[self._format.group_of] = (torch.int32, (in_features,))
        verify_quantized(
            {f"{layer}.{suffix}": info for suffix, info in parts.items()},
            {f"{layer}.{suffix}": form for suffix, form in expected.items()},
        )
        return rows, in_features, spec

    def _check_values(
        self, layer: str, parts: Mapping[str, TensorInfo], rows: int, spec: LayerSpec
    ) -> torch.Tensor | None:
        """Check scales, zeros and group numbers before anything is written; the order of the columns."""
        names = self._format
        tensors = self._read(layer, [s for s in (names.scale, names.zero, names.group_of) if s in parts])
        if not tensors[names.scale].isfinite().all():
            raise CheckpointError(f"{layer}.{names.scale} holds NaN or infinite values")
        if names.zero in tensors:
            self._check_zeros(f"{layer}.{names.zero}", tensors[names.zero], rows, spec)
        if names.group_of not in tensors:
            return None
        return group_order(tensors[names.group_of], spec.group_size, f"{layer}.{names.group_of}")

    def _check_zeros(self, name: str, words: torch.Tensor, rows: int, spec: LayerSpec) -> None:
        try:
            zero = self._format.unpack_zero(words, rows)
        except FormatError as error:
            raise CheckpointError(f"{name}: {error}") from None
        others = zero[zero != int4.SYMMETRIC_ZERO]
        if spec.symmetric and others.numel():
            raise CheckpointError(
                f"{name}: expected {int4.SYMMETRIC_ZERO} everywhere, as config.json says that weights are "
                f"symmetric, found {int(others[0])} (read as {self._format.title})"
            )

    def _read(self, layer: str, suffixes: Iterable[str]) -> dict[str, torch.Tensor]:
        parts = self._parts[layer]
        with ExitStack() as stack:
            files = {parts[suffix].file for suffix in suffixes}
            opened = {file: stack.enter_context(safe_open(file, framework="pt")) for file in files}
            return {suffix: opened[parts[suffix].file].get_tensor(f"{layer}.{suffix}") for suffix in suffixes}

    def _are_equal(self, one: dict[str, str], other: dict[str, str]) -> bool:
        if any(self._layer_of(source) for source in (*one.values(), *other.values())):
            return False
        return super()._are_equal(one, other)

    def _layer_of(self, source: str) -> str | None:
        """The packed layer that a source stands for; None for a tensor that is stored as it is."""
        layer = source.removesuffix(".weight")
        return layer if layer in self._parts and source.endswith(".weight") else None

    def _recipe(self, config: HadaCoreConfig, plain: PreTrainedModel) -> HadaCoreConfig:
        """The config that makes int4 modules of exactly the packed layers."""
        self._check_unused()
        packed = {name: layers for name in self._sources if (layers := self._layers_of(name))}
        modules: dict[str, list[str]] = {}
        for name, layers in packed.items():
            modules.setdefault(_module_of(name), []).extend(layers)
        self._plan_orders(plain, modules)
        packed = {
            name: layers for name, layers in packed.items() if _module_of(name) not in self._dequantized
        }
        specs = {_module_of(name): self._common_spec(name, modules[_module_of(name)]) for name in packed}
        common = Counter(specs.values()).most_common(1)[0][0]
        config.group_size, config.symmetric = common.group_size, common.symmetric
        if self._format.title.startswith("gptq"):
            config.method = "gptq"
            config.act_order = "permuted" if self._orders else False
        candidates = [
            name for name, m in plain.named_modules() if isinstance(m, nn.Linear) or expert_projections(m)
        ]
        planned = plan_layers(plain, config)
        by_default = {*planned.linears, *planned.experts}

        def override(names: Iterable[str], **options: Any) -> None:
            for pattern in name_patterns(names, candidates):
                config.overrides.setdefault(pattern, {}).update(options)

        override(by_default - specs.keys(), skip=True)
        override(specs.keys() - by_default, skip=False)
        for spec in set(specs.values()) - {common}:
            names = [name for name in specs if specs[name] == spec]
            override(names, group_size=spec.group_size, symmetric=spec.symmetric)
        config.input_permutations = name_patterns(self._stored_orders, candidates)
        config.validate()
        self._check_plan(plan_layers(plain, config), packed, plain)
        return config

    def _check_unused(self) -> None:
        """Refuse to lose what the architecture has no place for; biases of zeros may go."""
        for source in self.unused:
            layer, _, leaf = source.rpartition(".")
            if self._layer_of(source):
                raise CheckpointError(f"{layer} is packed, but the model has no such layer")
            if leaf == "bias" and layer in self._parts and self._is_nonzero(source):
                raise CheckpointError(f"{source} is not zero, but the model has no bias there")

    def _is_nonzero(self, source: str) -> bool:
        with safe_open(self.stored[source].file, framework="pt") as file:
            return bool(file.get_tensor(source).any())

    def _layers_of(self, parameter: str) -> list[str]:
        """The packed layers that a Parameter is made of; empty if it is none of them."""
        sources = self._sources[parameter].values()
        layers = [layer for source in sources if (layer := self._layer_of(source))]
        if layers and len(layers) < len(sources):
            raise UnsupportedError(f"{parameter}: only {len(layers)} of its {len(sources)} parts are packed")
        return layers

    def _common_spec(self, module: str, layers: list[str]) -> LayerSpec:
        specs = {self._specs[layer] for layer in layers}
        if len(specs) > 1:
            raise UnsupportedError(
                f"{module}: its {len(layers)} parts have several group sizes or symmetries"
            )
        return specs.pop()

    def _plan_orders(self, plain: PreTrainedModel, modules: Mapping[str, list[str]]) -> None:
        """Where the order of each layer's columns goes: into the rows before it, or beside the weight."""
        self._stored_orders: dict[str, torch.Tensor] = {}
        self._row_orders: dict[str, torch.Tensor] = {}
        self._baked: set[str] = set()
        self._not_row_parallel: set[str] = set()
        self._dequantized: set[str] = set()
        if not self._orders:
            return
        groups = {name: group for group in permutation_groups(plain) for name in group.consumers}
        for name, layers in modules.items():
            ordered = [layer for layer in layers if layer in self._orders]
            if not ordered:
                continue
            if len(layers) > 1:
                raise UnsupportedError(
                    f"{ordered[0]}: act-order in one of the parts of {name} is not imported"
                )
            order = self._orders[ordered[0]]
            group = groups.get(name)
            if group is not None and group.producers:
                if self._bake(group, order, plain):
                    self._baked.add(name)
                    continue
                if self._tensor_parallel:
                    self._dequantized.add(name)
                    continue
                self._not_row_parallel.add(name)
            self._stored_orders[name] = order

    def _bake(self, group: PermutationGroup, order: torch.Tensor, plain: PreTrainedModel) -> bool:
        """Put an order into the rows of the layers before; False if that cannot be."""
        if len(group.consumers) > 1:
            return False
        try:
            orders = {
                name: group.output_order(order, plain.get_parameter(f"{name}.weight").shape[0])
                for name in group.producers
            }
        except FormatError:  # channels leave their head
            return False
        self._row_orders.update(orders)
        return True

    def _check_plan(self, plan: LayerPlan, packed: Mapping[str, list[str]], plain: PreTrainedModel) -> None:
        planned = {f"{name}.weight" for name in plan.linears}
        for name in plan.experts:
            planned |= {f"{name}.{leaf}" for leaf in expert_projections(plain.get_submodule(name))}
        for name in sorted(planned ^ packed.keys()):
            if name in packed:
                is_tied = name == f"{plan.tied_head}.weight"
                reason = "tied by config.json" if is_tied else plan.kept.get(name, "no layer of a known kind")
                raise UnsupportedError(f"{packed[name][0]} is packed, but cannot be int4 here: {reason}")
            raise UnsupportedError(
                f"{name} is in full precision, though other weights of its module are packed"
            )

    def _output_dtypes(self, loaded: Mapping[str, torch.Tensor]) -> dict[str, torch.dtype]:
        """Scales stay as they are, so that the weights do."""
        dtypes = super()._output_dtypes(loaded)
        for name in self._packed_names():
            source = next(iter(self._sources[name].values()))
            dtypes[f"{name}_scale"] = self.headers[source].dtype
        return dtypes

    def realise(self, unit: Unit) -> tuple[dict[str, torch.Tensor], list[LayerRecord]]:
        """As `SourceModel.realise`, without quantizing anything.

        Raises:
            CheckpointError: transformers could not convert the tensors.
        """
        rows = self._row_orders.get(_module_of(unit.name))
        layers = self._layers_of(unit.name)
        if layers and _module_of(unit.name) in self._dequantized:
            return self._on_disk({unit.name: self._full_precision(unit.name, layers[0])}), []
        if not layers:
            tensors, records = super().realise(unit)
            if rows is not None:
                tensors = {name: tensor.index_select(0, rows) for name, tensor in tensors.items()}
            return tensors, records
        weights = {
            key: self._weight(layer)
            for key, source in unit.sources.items()
            if (layer := self._layer_of(source))
        }
        tensors = {
            unit.name + suffix: self._fuse(unit.name, {key: weight[part] for key, weight in weights.items()})
            for part, suffix in enumerate(_SUFFIXES)
            if next(iter(weights.values()))[part] is not None
        }
        weight = Int4Weight(
            tensors[unit.name],
            tensors[f"{unit.name}_scale"],
            tensors.get(f"{unit.name}_zero"),
            next(iter(weights.values())).group_size,
        )
        if rows is not None:
            weight, _ = permute_outputs(weight, None, rows)
            tensors.update(
                {unit.name + s: t for s, t in zip(_SUFFIXES, weight[:3], strict=True) if t is not None}
            )
        module = _module_of(unit.name)
        if module in self._stored_orders:
            tensors[f"{module}.input_perm"] = self._stored_orders[module].to(torch.int32)
        return self._on_disk(tensors), [make_record(unit.name, None, weight)]

    def _weight(self, layer: str) -> Int4Weight:
        """A packed layer, its groups contiguous."""
        spec = self._specs[layer]
        unpacked = self._format.unpack(self._read(layer, self._parts[layer]), spec)
        order = self._orders.get(layer)
        q = unpacked.q if order is None else unpacked.q.index_select(1, order)
        return Int4Weight(int4.pack(q), unpacked.scale, unpacked.zero, spec.group_size)

    def _full_precision(self, name: str, layer: str) -> torch.Tensor:
        """A packed layer as the library that made it dequantizes it, in the dtype of the model."""
        weight = self._weight(layer).dequantize()
        natural = torch.empty_like(weight).index_copy_(1, self._orders[layer], weight)
        return natural.to(self._plain.get_parameter(name).dtype)

    def _fuse(self, name: str, tensors: Mapping[str, Any]) -> torch.Tensor:
        """Let transformers make one tensor of those of a Parameter's sources, as it does with weights."""
        module, leaf = self._plain.get_submodule(_module_of(name)), name.rpartition(".")[2]
        parameter, like = module._parameters[leaf], next(iter(tensors.values()))
        assert parameter is not None
        shape = (*parameter.shape[:-1], like.shape[-1])
        placeholder = torch.empty(shape, dtype=like.dtype, device="meta")
        module._parameters[leaf] = nn.Parameter(placeholder, requires_grad=False)
        info = compat.load_tensors(self._plain, self._plain_loading, tensors, self._device)
        fused = take_loaded(self._plain)
        module._parameters[leaf] = parameter
        check_conversions(name, info)
        return fused[name]


def _module_of(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def _packed_layers(stored: Mapping[str, TensorInfo], names: PackedFormat) -> dict[str, dict[str, TensorInfo]]:
    """`{layer: {suffix: header}}` of everything that has packed integers."""
    layers = [name.removesuffix(f".{names.weight}") for name in stored if name.endswith(f".{names.weight}")]
    return {
        layer: {s: stored[f"{layer}.{s}"] for s in names.suffixes if f"{layer}.{s}" in stored}
        for layer in layers
    }


def _read_format(folder: Path) -> PackedFormat:
    content = read_config_file(folder)
    recipes = [
        part.get("quantization_config") for part in (content, *content.values()) if isinstance(part, dict)
    ]
    recipe = next((found for found in recipes if found is not None), None)
    legacy = folder / "quantize_config.json"  # AutoGPTQ, before transformers knew of it
    if recipe is None and legacy.is_file():
        try:
            recipe = json.loads(legacy.read_text("utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{legacy}: cannot be read: {error}") from None
        if isinstance(recipe, dict):
            recipe = {"quant_method": "gptq", **recipe}
    if recipe is None:
        raise CheckpointError(f"{folder}: is in full precision; quantize it (hadacore quantize SRC DST)")
    if not isinstance(recipe, dict):
        raise CheckpointError(
            f"{folder}: quantization_config must be an object, found {type(recipe).__name__}"
        )
    try:
        return packed_format(recipe)
    except (CheckpointError, UnsupportedError) as error:
        raise type(error)(f"{folder}: {error}") from None
