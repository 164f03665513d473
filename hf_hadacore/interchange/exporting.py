"""hadacore checkpoints in the format of compressed-tensors (pack-quantized), which serving engines load.

Both keep unsigned integers eight to a word along the inputs, lowest bits first, so integers and scales are
copied. Zeros become nibbles along the outputs, and fused experts are split into a layer for each.
"""

import os
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import nn

from .. import compat, int4
from ..architecture import find_model_class, load_model_config, read_recipe
from ..attention.key_means import is_key_mean
from ..config import LayerSpec
from ..errors import UnsupportedError
from ..int4 import Int4Weight
from ..integrity import checkpoint_files, verify_files
from ..layer_plan import plan_layers
from ..name_patterns import name_patterns
from ..offline.checkpoint import convert_checkpoint
from ..offline.layer_record import LayerRecord, make_record
from ..offline.streaming import Unit
from ..quantizer import HadaCoreHfQuantizer

EXPORT_FORMATS = ("compressed-tensors",)

_SUFFIXES = ("", "_scale", "_zero")


def export_checkpoint(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    max_shard_size: int | str = "5GB",
    resume: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Convert a hadacore checkpoint to compressed-tensors' pack-quantized format.

    Integers, zeros and scales stay as they are, bit for bit. Memory is needed for one Parameter at a time.

    Args:
        src: a local folder, or a model id on the Hub.
        dst: the folder to make; must not exist (an empty one is fine).
        max_shard_size, resume, progress: as of `quantize_checkpoint`.

    Returns:
        The report, which also lies in DST as `quantization_report.json`.

    Raises:
        CheckpointError: the source is damaged, incomplete or no hadacore checkpoint; dst exists or lies in
            src; the disk is too small.
        UnsupportedError: a layer cannot be said in that format: a last group that is short, or groups that
            act-order has scattered.
    """
    return convert_checkpoint(
        src,
        dst,
        HadaCoreSource,
        {},
        max_shard_size=max_shard_size,
        resume=resume,
        progress=progress,
        label="Exporting",
    )


class HadaCoreSource:
    """A hadacore checkpoint as a stream of compressed-tensors' tensors; a `checkpoint.Source`.

    Args:
        folder: local checkpoint.

    Raises:
        CheckpointError: the checkpoint is damaged, incomplete, or of another format.
        UnsupportedError: a layer cannot be said in the other format.
    """

    read_back: Callable[[str], torch.Tensor]

    def __init__(self, folder: Path):
        self.folder = folder
        self.provenance: dict[str, Any] = {"exported_to": EXPORT_FORMATS[0]}
        self.unused: list[str] = []
        config = read_recipe(folder)
        if config.stream_rotation is not None:
            raise UnsupportedError(
                f"{folder}: its residual stream is rotated at run time, not so in {EXPORT_FORMATS[0]}; "
                'quantize with rotation="none" (--rotate none)'
            )
        files = checkpoint_files(folder)
        self.stored = self.headers = verify_files(files)
        model_config = load_model_config(folder, quantized=True)
        model_class = find_model_class(model_config, folder)
        plain, loading = compat.meta_model(model_class, model_config, None, None, files)
        # Made in order to be checked: names, shapes, and that orders of inputs are orders.
        quantizer = HadaCoreHfQuantizer(config, pre_quantized=True)
        compat.meta_model(model_class, model_config, quantizer, None, files)
        self.model = plain
        self.layer_plan = plan_layers(plain, config, strict=False)
        self._specs = {**self.layer_plan.linears, **self.layer_plan.experts}

        targets = compat.target_names(plain, loading, self.headers)
        self._packed = {n: target for n in self.headers if self._is_packed(n) and (target := targets[n])}
        parts = {name: self._parts(name) for name in self._packed}
        belonging = {part for of_one in parts.values() for part in of_one.values()}
        self.units = [
            Unit(name, parts.get(name, {name: name}))
            for name in self.headers
            if name in parts or not (name in belonging or is_key_mean(name))
        ]
        self._columns = {name: self._natural_columns(name) for name in self._packed}
        self.outputs: dict[str, torch.Tensor] = {}
        self._schemes: dict[str, LayerSpec] = {}
        for unit in self.units:
            on_meta = {
                key: torch.empty(self.headers[name].shape, dtype=self.headers[name].dtype, device="meta")
                for key, name in unit.sources.items()
            }
            tensors = self._convert(unit.name, on_meta) if unit.name in self._packed else on_meta
            self.outputs.update(tensors)
        self.total_parameters = sum(self.layer_plan.sizes.values())
        plain.config.quantization_config = _Recipe(self._quantization_config())

    def realise(self, unit: Unit) -> tuple[dict[str, torch.Tensor], list[LayerRecord]]:
        """Read and convert the tensors of one unit.

        Args:
            unit: one of `units`.

        Returns:
            The tensors under their names on disk, and a record of the weight if it is int4.
        """
        tensors = self._read(unit.sources)
        if unit.name not in self._packed:
            return tensors, []
        weight = Int4Weight(
            tensors[""], tensors["_scale"], tensors.get("_zero"), self._spec(unit.name).group_size
        )
        columns = self._columns[unit.name]
        if columns is not None:
            weight = columns.restore(weight)
            tensors.update({s: t for s, t in zip(_SUFFIXES, weight[:3], strict=True) if t is not None})
        return self._convert(unit.name, tensors), [make_record(self._packed[unit.name], None, weight)]

    def _is_packed(self, name: str) -> bool:
        return self.headers[name].dtype == torch.int32 and f"{name}_scale" in self.headers

    def _parts(self, name: str) -> dict[str, str]:
        """`{suffix: tensor}` of a packed weight; the order of its inputs under the suffix "perm"."""
        parts = {suffix: name + suffix for suffix in _SUFFIXES if name + suffix in self.headers}
        perm = f"{name.removesuffix('weight')}input_perm"
        return {**parts, "perm": perm} if perm in self.headers else parts

    def _spec(self, name: str) -> LayerSpec:
        return self._specs[self._packed[name].rpartition(".")[0]]

    def _read(self, names: Mapping[str, str]) -> dict[str, torch.Tensor]:
        with ExitStack() as stack:
            files = {self.headers[name].file for name in names.values()}
            opened = {file: stack.enter_context(safe_open(file, framework="pt")) for file in files}
            return {key: opened[self.headers[name].file].get_tensor(name) for key, name in names.items()}

    def _natural_columns(self, name: str) -> "_NaturalColumns | None":
        """How the columns of a weight get back into order; None if they are."""
        in_features = self.headers[name].shape[-1] * int4.NIBBLES_PER_WORD
        size = int4.effective_group_size(in_features, self._spec(name).group_size)
        if in_features % size:
            raise UnsupportedError(
                f"{name}: compressed-tensors has no short last group, and groups of {size} do not divide "
                f"{in_features} inputs; quantize with a group size that does, or with -1"
            )
        parts = self._parts(name)
        if "perm" not in parts:
            return None
        perm = self._read({"perm": parts["perm"]})["perm"].long()
        group_of = torch.empty_like(perm).index_copy_(0, perm, torch.arange(in_features) // size)
        groups = group_of[::size]
        if not torch.equal(group_of, groups.repeat_interleave(size)):
            raise UnsupportedError(
                f"{parts['perm']}: act-order has scattered this layer's groups, which compressed-tensors no "
                'longer reads (its actorder "group" was removed in 2026); quantize with act_order="static"'
            )
        return _NaturalColumns(torch.argsort(perm), groups)

    def _convert(self, name: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A weight's tensors (by suffix) in the other format; fused experts become a layer each."""
        parameter = self._packed[name]
        split = {
            s: compat.names_on_disk(self.model, {parameter: tensors[s]}) for s in _SUFFIXES if s in tensors
        }
        converted: dict[str, torch.Tensor] = {}
        for weight, packed in split[""].items():
            if packed.dim() != 2 or not weight.endswith(".weight"):
                raise UnsupportedError(f"{name}: compressed-tensors has no layout for these fused experts")
            rows, in_features = packed.shape[0], packed.shape[1] * int4.NIBBLES_PER_WORD
            layer = weight.removesuffix(".weight")
            # Some versions of transformers squeeze what they split.
            scale = split["_scale"][weight].reshape(rows, -1)
            converted[f"{layer}.weight_packed"] = packed
            converted[f"{layer}.weight_scale"] = scale
            converted[f"{layer}.weight_shape"] = torch.tensor([rows, in_features], device=packed.device)
            if "_zero" in split:
                zero = split["_zero"][weight].reshape(rows, -1).T
                padded = nn.functional.pad(zero, (0, -rows % int4.NIBBLES_PER_WORD))
                converted[f"{layer}.weight_zero_point"] = int4.pack(padded).T
            spec = self._spec(name)
            group_size = -1 if scale.shape[1] == 1 else spec.group_size
            self._schemes[layer] = LayerSpec(group_size, spec.symmetric)
        return converted

    def _quantization_config(self) -> dict[str, Any]:
        """What compressed-tensors writes for such weights: the rarer schemes name their layers."""
        by_scheme = Counter(self._schemes.values()).most_common()
        groups = {}
        for number, (scheme, _) in enumerate(reversed(by_scheme)):
            layers = [layer for layer, other in self._schemes.items() if other == scheme]
            is_common = scheme == by_scheme[0][0]
            patterns = [f"re:{pattern}" for pattern in name_patterns(layers, self._schemes)]
            grouped = (
                {"strategy": "channel"}
                if scheme.group_size == -1
                else {"strategy": "group", "group_size": scheme.group_size}
            )
            groups[f"group_{number}"] = {
                "targets": ["Linear"] if is_common else patterns,
                "weights": {
                    "num_bits": 4,
                    "type": "int",
                    "symmetric": scheme.symmetric,
                    "dynamic": False,
                    **grouped,
                },
                "input_activations": None,
                "output_activations": None,
                "format": "pack-quantized",
            }
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": self._ignored(),
            "kv_cache_scheme": None,
        }

    def _ignored(self) -> list[str]:
        """Linear layers, and routers that other libraries take for such, that stay in full precision."""
        kept = {name for name, reason in self.layer_plan.kept.items() if reason == "router"}
        linears = {f"{name}.weight" for name, m in self.model.named_modules() if isinstance(m, nn.Linear)}
        names = sorted((kept | linears) - set(self._packed.values()))
        on_disk = compat.names_on_disk(self.model, {n: torch.empty(1, 1, device="meta") for n in names})
        return [name.removesuffix(".weight") for name in on_disk]


class _NaturalColumns(NamedTuple):
    """Columns ``[K]`` and groups ``[G]`` of a stored weight, in the order of the inputs."""

    columns: torch.Tensor
    groups: torch.Tensor

    def restore(self, weight: Int4Weight) -> Int4Weight:
        packed = int4.pack(int4.unpack(weight.packed).index_select(-1, self.columns))
        scale = weight.scale.index_select(-1, self.groups)
        zero = None if weight.zero is None else weight.zero.index_select(-1, self.groups)
        return Int4Weight(packed, scale, zero, weight.group_size)


class _Recipe(dict[str, Any]):
    """A quantization config that has no class of its own."""

    def to_dict(self) -> dict[str, Any]:
        return dict(self)
