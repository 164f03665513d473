"""How other libraries store int4 weights: what their config.json says, and their tensors unpacked.

| format             | integers                     | zeros                            | scales     |
|--------------------|------------------------------|----------------------------------|------------|
| GPTQ               | `qweight` ``[K/8, N]``       | `qzeros` ``[G, N/8]``            | ``[G, N]`` |
| AWQ (gemm)         | `qweight` ``[K, N/8]``       | `qzeros` ``[G, N/8]``            | ``[G, N]`` |
| compressed-tensors | `weight_packed` ``[N, K/8]`` | `weight_zero_point` ``[N/8, G]`` | ``[N, G]`` |

Everywhere w = (q - z) * scale with unsigned q and z, eight of them in an int32 word, lowest bits first. AWQ
puts the columns of a word in the order 0 2 4 6 1 3 5 7. GPTQ's first version stores z - 1. Act-order adds a
group number for each input (`g_idx`, `weight_g_idx`, int32 ``[K]``): q stays in natural order, groups are
scattered.

Sources: AutoGPTQ's and GPTQModel's `QuantLinear` modules, AutoAWQ's `WQLinear_GEMM`, compressed-tensors'
`PackedQuantizationCompressor`.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from .. import int4
from ..config import LayerSpec
from ..errors import CheckpointError, FormatError, UnsupportedError
from ..int4 import GROUP_SIZES, NIBBLES_PER_WORD
from ..integrity import TensorInfo

# Where in a word AWQ keeps the word's columns 0...7.
_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
# The word that adds one to each of eight nibbles.
_ONES = 0x11111111


class Unpacked(NamedTuple):
    """One weight, columns in natural order.

    Attributes:
        q: uint8 ``[N, K]``, 0...15.
        scale: floating point ``[N, G]``.
        zero: uint8 ``[N, G]``, 0...15; None means 8 everywhere.
    """

    q: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None


class PackedFormat(ABC):
    """A storage format with its options.

    Attributes:
        title: what users call it.
        weight, zero, scale, group_of: suffixes of the tensors of a layer.
        scale_is_output_major: whether scales are ``[N, G]``.
    """

    title: str
    scale_is_output_major = False
    weight, zero, scale, group_of = "qweight", "qzeros", "scales", "g_idx"
    _spec: LayerSpec

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Of everything that belongs to a packed layer."""
        return self.weight, self.zero, self.scale, self.group_of

    @abstractmethod
    def shape(self, weight: TensorInfo) -> tuple[int, int]:
        """``(N, K)``, from the header of the integers, which have two dimensions."""

    @abstractmethod
    def unpack_weight(self, words: torch.Tensor) -> torch.Tensor:
        """The integers: uint8 ``[N, K]``, 0...15, columns in natural order."""

    @abstractmethod
    def unpack_zero(self, words: torch.Tensor, rows: int) -> torch.Tensor:
        """The zeros: uint8 ``[N, G]``, 0...15.

        Raises:
            FormatError: what is stored is ambiguous.
        """

    def spec(self, name: str, in_features: int, parts: Mapping[str, TensorInfo]) -> LayerSpec:
        """Group size and symmetry of a layer.

        Args:
            name: of the layer.
            in_features: K.
            parts: headers of its tensors by suffix.

        Raises:
            CheckpointError: they contradict the options.
        """
        return self._spec

    def expected(
        self, rows: int, in_features: int, spec: LayerSpec
    ) -> dict[str, tuple[torch.dtype | None, tuple[int, ...]]]:
        """``{suffix: (dtype, shape)}`` of zeros and scales that have to be there; dtype None is any float."""
        groups = int4.num_groups(in_features, spec.group_size)
        return {
            self.zero: (torch.int32, (groups, rows // NIBBLES_PER_WORD)),
            self.scale: (None, (groups, rows)),
        }

    def unpack(self, tensors: Mapping[str, torch.Tensor], spec: LayerSpec) -> Unpacked:
        """The weight of a layer, from its tensors by suffix."""
        q = self.unpack_weight(tensors[self.weight])
        zero = None if spec.symmetric else self.unpack_zero(tensors[self.zero], q.shape[0])
        scale = tensors[self.scale]
        return Unpacked(q, scale if self.scale_is_output_major else scale.T, zero)


class Gptq(PackedFormat):
    """GPTQ's format, as AutoGPTQ and GPTQModel write it.

    Args:
        recipe: the quantization_config.

    Raises:
        UnsupportedError: it asks for something that hadacore checkpoints cannot hold.
    """

    def __init__(self, recipe: Mapping[str, Any]):
        version = recipe.get("checkpoint_format") or recipe.get("format") or "gptq"
        if recipe.get("is_marlin_format"):
            version = "marlin"
        if version not in ("gptq", "gptq_v2"):
            raise UnsupportedError(
                f"GPTQ weights with checkpoint_format {version!r} are not imported, only 'gptq' and 'gptq_v2'"
            )
        _check_bits(recipe.get("bits"))
        if recipe.get("pack_dtype", "int32") != "int32":
            raise UnsupportedError(
                f"GPTQ weights packed in {recipe['pack_dtype']!r} are not imported, only in int32"
            )
        dynamic = recipe.get("dynamic")
        for pattern, changes in dynamic.items() if isinstance(dynamic, dict) else ():
            if changes and not pattern.startswith("-:"):
                raise UnsupportedError(f"GPTQ options by module (dynamic[{pattern!r}]) are not imported")
        self._is_v1 = version == "gptq"
        self._spec = LayerSpec(_group_size(recipe.get("group_size")), recipe.get("sym", True) is not False)
        meta = recipe.get("meta")
        # GPTQModel adds and subtracts 1 in whole words, so that a zero point of 0 borrows from its neighbour.
        self._borrows = "gptqmodel" in str(meta.get("quantizer") if isinstance(meta, dict) else None).lower()
        self.title = f"gptq ({'v1' if self._is_v1 else 'v2'})"

    def shape(self, weight: TensorInfo) -> tuple[int, int]:
        return weight.shape[1], weight.shape[0] * NIBBLES_PER_WORD

    def unpack_weight(self, words: torch.Tensor) -> torch.Tensor:
        return int4.unpack(words.T)

    def unpack_zero(self, words: torch.Tensor, rows: int) -> torch.Tensor:
        if not self._is_v1:
            return int4.unpack(words).T
        if self._borrows:
            return int4.unpack(words + _ONES).T
        stored = int4.unpack(words).T
        if (stored == int4.MAX_Q).any():
            raise FormatError(
                "a zero point of 0 was stored as -1, which damages its neighbours and which AutoGPTQ's own "
                "kernels read as 0 or as 16; quantize again with checkpoint_format 'gptq_v2'"
            )
        return stored + 1


class Awq(PackedFormat):
    """AutoAWQ's gemm format.

    Args:
        recipe: the quantization_config.

    Raises:
        UnsupportedError: it asks for something that hadacore checkpoints cannot hold.
    """

    title = "awq (gemm)"

    def __init__(self, recipe: Mapping[str, Any]):
        version = str(recipe.get("version") or recipe.get("format") or "gemm").lower()
        if version != "gemm":
            raise UnsupportedError(f"AWQ weights of version {version!r} are not imported, only 'gemm'")
        _check_bits(recipe.get("bits", recipe.get("w_bit")))
        group_size = _group_size(recipe.get("group_size", recipe.get("q_group_size")))
        self._spec = LayerSpec(group_size, recipe.get("zero_point", True) is False)

    def shape(self, weight: TensorInfo) -> tuple[int, int]:
        return weight.shape[1] * NIBBLES_PER_WORD, weight.shape[0]

    def unpack_weight(self, words: torch.Tensor) -> torch.Tensor:
        return _in_natural_order(words).T

    def unpack_zero(self, words: torch.Tensor, rows: int) -> torch.Tensor:
        return _in_natural_order(words).T


class CompressedTensors(PackedFormat):
    """compressed-tensors' pack-quantized format with four bits.

    Args:
        recipe: the quantization_config.

    Raises:
        CheckpointError: the recipe has no groups of layers.
        UnsupportedError: it asks for something that hadacore checkpoints cannot hold.
    """

    title = "compressed-tensors (pack-quantized)"
    scale_is_output_major = True
    weight, zero, scale, group_of = "weight_packed", "weight_zero_point", "weight_scale", "weight_g_idx"

    def __init__(self, recipe: Mapping[str, Any]):
        groups = recipe.get("config_groups")
        if not isinstance(groups, dict) or not groups:
            raise CheckpointError(f"config_groups must be an object that is not empty, found {groups!r:.80}")
        for option in ("kv_cache_scheme", "transform_config"):
            if recipe.get(option):
                raise UnsupportedError(f"compressed-tensors checkpoints with a {option} are not imported")
        sparsity = recipe.get("sparsity_config")
        if isinstance(sparsity, dict) and sparsity.get("format", "dense") != "dense":
            raise UnsupportedError(f"compressed-tensors sparsity {sparsity['format']!r} is not imported")
        self._specs = {_scheme(name, group, recipe.get("format")) for name, group in groups.items()}

    @property
    def suffixes(self) -> tuple[str, ...]:
        return (*super().suffixes, "weight_shape")

    def shape(self, weight: TensorInfo) -> tuple[int, int]:
        return weight.shape[0], weight.shape[1] * NIBBLES_PER_WORD

    def unpack_weight(self, words: torch.Tensor) -> torch.Tensor:
        return int4.unpack(words)

    def unpack_zero(self, words: torch.Tensor, rows: int) -> torch.Tensor:
        return int4.unpack(words.T)[:, :rows].T

    def spec(self, name: str, in_features: int, parts: Mapping[str, TensorInfo]) -> LayerSpec:
        symmetric = self.zero not in parts
        columns = parts[self.scale].shape[-1] if self.scale in parts else 0
        for spec in sorted(self._specs):
            if spec.symmetric == symmetric and int4.num_groups(in_features, spec.group_size) == columns:
                return spec
        raise CheckpointError(
            f"{name}: {'symmetric' if symmetric else 'asymmetric'}, {columns} scales for each row of "
            f"{in_features}, which is what no group of quantization_config says"
        )

    def expected(
        self, rows: int, in_features: int, spec: LayerSpec
    ) -> dict[str, tuple[torch.dtype | None, tuple[int, ...]]]:
        groups = int4.num_groups(in_features, spec.group_size)
        zero = {} if spec.symmetric else {self.zero: (torch.int32, (-(-rows // NIBBLES_PER_WORD), groups))}
        return {self.scale: (None, (rows, groups)), **zero}


_FORMATS: dict[str, type[Gptq] | type[Awq] | type[CompressedTensors]] = {
    "gptq": Gptq,
    "awq": Awq,
    "compressed-tensors": CompressedTensors,
}


def packed_format(recipe: Mapping[str, Any]) -> PackedFormat:
    """The format that a quantization_config names.

    Args:
        recipe: the quantization_config.

    Raises:
        CheckpointError: the checkpoint is hadacore's own, or the recipe is damaged.
        UnsupportedError: the format, or an option of it, cannot be imported.
    """
    method = recipe.get("quant_method")
    if method == "hadacore":
        raise CheckpointError("is a hadacore checkpoint already; load it as it is")
    if method not in _FORMATS:
        raise UnsupportedError(
            f"checkpoints of quant_method {method!r} are not imported, only those of {', '.join(_FORMATS)}"
        )
    return _FORMATS[method](recipe)


def group_order(group_of: torch.Tensor, group_size: int, name: str) -> torch.Tensor | None:
    """The order of inputs in which the groups of act-order lie one after the other.

    Args:
        group_of: integer ``[K]``, the group of each input.
        group_size: g, or -1.
        name: of the tensor, for the error.

    Returns:
        int64 ``[K]``, inputs of a group in natural order; None if that is the natural order everywhere.

    Raises:
        CheckpointError: a group has not as many inputs as it should.
    """
    size = int4.effective_group_size(len(group_of), group_size)
    expected = torch.arange(len(group_of)) // size
    order = torch.argsort(group_of, stable=True)
    if torch.equal(group_of, expected):
        return None
    if not torch.equal(group_of[order], expected):
        raise CheckpointError(
            f"{name}: expected {size} inputs in each group (fewer in the last), found groups from "
            f"{int(group_of.min())} to {int(group_of.max())} with "
            f"{', '.join(str(int(n)) for n in group_of.unique(return_counts=True)[1][:8])} inputs"
        )
    return order


def _check_bits(bits: object) -> None:
    if bits != 4:
        raise UnsupportedError(f"weights of {bits!r} bits are not imported, only of 4")


def _group_size(value: object) -> int:
    for size in GROUP_SIZES:
        if value == size:
            return size
    raise UnsupportedError(
        f"weights with group_size {value!r} are not imported, only with one of {GROUP_SIZES}"
    )


def _in_natural_order(words: torch.Tensor) -> torch.Tensor:
    """AWQ's int32 ``[A, B/8]`` as uint8 ``[A, B]``."""
    return int4.unpack(words).unflatten(-1, (-1, NIBBLES_PER_WORD))[..., list(_AWQ_PLACES)].flatten(-2)


def _scheme(name: str, group: object, default_format: object) -> LayerSpec:
    """What a config group of compressed-tensors says about weights."""
    weights = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(group, dict) or not isinstance(weights, dict):
        raise UnsupportedError(f"config_groups[{name!r}] has no scheme for weights, which is not imported")
    layout = group.get("format") or default_format
    if layout != "pack-quantized":
        raise UnsupportedError(
            f"config_groups[{name!r}]: format {layout!r} is not imported, only 'pack-quantized'"
        )
    if group.get("input_activations") or group.get("output_activations"):
        raise UnsupportedError(f"config_groups[{name!r}] quantizes activations, which is not imported")
    _check_bits(weights.get("num_bits"))
    if weights.get("type", "int") != "int":
        raise UnsupportedError(
            f"config_groups[{name!r}]: type {weights['type']!r} is not imported, only 'int'"
        )
    size = weights.get("group_size")
    strategy = weights.get("strategy") or ("channel" if size == -1 else "group")
    if strategy not in ("group", "channel"):
        raise UnsupportedError(
            f"config_groups[{name!r}]: strategy {strategy!r} is not imported, only 'group' and 'channel'"
        )
    return LayerSpec(
        _group_size(size) if strategy == "group" else -1, weights.get("symmetric", True) is not False
    )
