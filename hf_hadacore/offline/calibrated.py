"""A full-precision checkpoint whose decoder layers become int4 one after the other, with calibration.

At any time one decoder layer has weights: it is read from disk, solved with the hidden states that the layers
before it (already int4) have made of the calibration tokens, and written. A run that is resumed makes those
hidden states again with the int4 weights that it finds on disk, so that nothing but results is ever stored.
"""

from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from ..attention.key_means import is_key_mean
from ..config import HadaCoreConfig
from ..errors import CalibrationError, ConfigError
from ..int4 import Int4Weight
from ..layer_plan import plan_layers
from ..modules.experts import expert_projections
from ..name_patterns import name_patterns
from ..parallel.permutation_search import permutation_groups
from .calibrated_weight import DAMPING, natural_values
from .calibration import Calibration, calibration_tokens, digest, load_tokenizer
from .column_orders import ColumnOrders
from .decoder import Activations, Decoder
from .key_means import KeyMeans, key_shapes, seeing_keys
from .layer_record import LayerRecord
from .layer_solver import LayerSolver
from .streaming import SourceModel, Unit, take_loaded
from .weight_rotation import ROTATIONS


class CalibratedSource(SourceModel):
    """A `SourceModel` that quantizes the weights of decoder layers by GPTQ, a whole layer in one unit.

    Weights elsewhere are rounded to nearest.

    Args:
        folder, config, dtype, device, rotation: as of `SourceModel`.
        tokens: int64 ``[samples, length]``.
        title: what the report calls them.

    Raises:
        CalibrationError: the tokens do not fit the model.
        UnsupportedError: the model is no stack of decoder layers.
    """

    def __init__(
        self,
        folder: Path,
        config: HadaCoreConfig,
        tokens: torch.Tensor,
        *,
        title: str = "tokens",
        dtype: str | torch.dtype | None = None,
        device: str | torch.device = "cpu",
        rotation: str = "none",
    ):
        super().__init__(folder, config, dtype=dtype, device=device, rotation=rotation)
        check_tokens(tokens, self._plain)
        self._tokens = tokens
        # Few CPUs multiply bf16 faster than fp32, and most do it much slower.
        self._compute_dtype = torch.float32 if self._device.type == "cpu" else self._plain.dtype
        self._stored_dtypes = {name: tensor.dtype for name, tensor in self._plain.state_dict().items()}
        self.provenance["calibration"] = {
            "source": title,
            "samples": tokens.shape[0],
            "sequence_length": tokens.shape[1],
            "sha256_of_tokens": digest(tokens),
            "damping": DAMPING,
        }
        self._activations: Activations | None = None
        self._layers = {
            name: Unit(name, {key: source for unit in units for key, source in unit.sources.items()})
            for name in self._decoder.layers
            if (units := [unit for unit in self.units if unit.name.startswith(f"{name}.")])
        }
        in_layers = tuple(f"{name}." for name in self._layers)
        self.units = [unit for unit in self.units if not unit.name.startswith(in_layers)]
        self.units += self._layers.values()

    def _recipe(self, config: HadaCoreConfig, plain: PreTrainedModel) -> HadaCoreConfig:
        """The config, completed by what follows from the model: whose columns have an order of their own."""
        config = super()._recipe(config, plain)
        self._decoder = Decoder(plain)
        layers = f"{self._decoder.name}."
        self._key_shapes = {name: s for name, s in key_shapes(plain).items() if name.startswith(layers)}
        modules = [name for name, _ in plain.named_modules()]
        for shape in sorted(set(self._key_shapes.values())):
            alike = [name for name, other in self._key_shapes.items() if other == shape]
            config.key_means |= {pattern: list(shape) for pattern in name_patterns(alike, modules)}
        plan = plan_layers(plain, config)
        experts = {name: expert_projections(plain.get_submodule(name)) for name in plan.experts}
        quantized = [*plan.linears, *(f"{name}.{part}" for name in experts for part in experts[name])]
        in_layers = {name for name in quantized if name.startswith(f"{self._decoder.name}.")}
        groups = permutation_groups(plain) if config.act_order == "permuted" else []
        self._orders = ColumnOrders(config.act_order, groups, in_layers)
        config.input_permutations = self._orders.patterns()
        return config

    def realise(self, unit: Unit) -> tuple[dict[str, torch.Tensor], list[LayerRecord]]:
        """As `SourceModel.realise`; decoder layers before the unit's that were not realised are made up for.

        Raises:
            QuantizationError: weights or hidden states hold NaN or infinite values.
            CheckpointError: transformers could not convert the tensors.
        """
        if unit.name not in self._layers:
            return super().realise(unit)
        with torch.no_grad():
            activations = self._catch_up(unit)
            layer = self._load_layer(unit)
            solver = LayerSolver(
                unit.name, layer, activations, self.layer_plan, self._orders, self._plain.dtype
            )
            solver.solve()
            means = KeyMeans(unit.name, layer, self._key_shapes)
            with seeing_keys(self._plain, means.see):
                activations.advance(layer, unit.name)
            tensors = {**solver.tensors, **means.tensors(self._plain.dtype)}
        return self._on_disk({**self._take_layer(unit), **tensors}), solver.records

    def _catch_up(self, unit: Unit) -> Activations:
        """The hidden states before a layer, made with the int4 weights on disk of those before it."""
        if self._activations is None:
            self._decoder.materialize_buffers(self._device)
            outer = self._decoder.outer_names()
            self._load({key: source for name in outer for key, source in self._sources[name].items()})
            self._activations = self._decoder.first_inputs(self._tokens, self._device, self._compute_dtype)
            take_loaded(self._plain)
        for name in list(self._layers)[self._activations.layers_passed :]:
            if name == unit.name:
                break
            layer = self._load_layer(self._layers[name])
            self._restore(name)
            self._activations.advance(layer, name)
            self._take_layer(self._layers[name])
        return self._activations

    def _load(self, sources: dict[str, str], name: str = "decoder") -> None:
        """Give Parameters of the plain model their values, rotated."""
        self._load_plain(sources, name)
        for parameter_name, parameter in self._plain.named_parameters():
            if not parameter.is_meta:
                parameter.data = self._rotation.rotate(parameter_name, parameter.data)

    def _load_layer(self, unit: Unit) -> nn.Module:
        """A decoder layer with its weights."""
        self._load(unit.sources, unit.name)
        layer = self._plain.get_submodule(unit.name)
        return layer.float() if self._compute_dtype == torch.float32 else layer

    def _take_layer(self, unit: Unit) -> dict[str, torch.Tensor]:
        """What a decoder layer's Parameters have become, in the dtypes in which they are stored."""
        for name, parameter in self._plain.get_submodule(unit.name).named_parameters():
            parameter.data = parameter.data.to(self._stored_dtypes[f"{unit.name}.{name}"])
        return take_loaded(self._plain)

    def _restore(self, layer: str) -> None:
        """Give a layer's Parameters the values that were written for it."""
        values = {name: t for name, t in self._plain.state_dict().items() if name.startswith(f"{layer}.")}
        written = self._read_written(layer)
        for name, spec in {**self.layer_plan.linears, **self.layer_plan.experts}.items():
            for weight in expert_projections(self._plain.get_submodule(name)) or ("weight",):
                full = f"{name}.{weight}"
                if full not in values:
                    continue
                scale, zero = written.pop(f"{full}_scale"), written.pop(f"{full}_zero", None)
                columns = written.pop(f"{name}.input_perm", None)
                int4_weight = Int4Weight(written.pop(full), scale, zero, spec.group_size)
                value = natural_values(int4_weight, columns, self._compute_dtype)
                is_transposed = value.shape != values[full].shape
                values[full].copy_(value.transpose(-1, -2) if is_transposed else value)
        for name, value in written.items():
            if not is_key_mean(name):
                values[name].copy_(value)

    def _read_written(self, layer: str) -> dict[str, torch.Tensor]:
        """What was written of a layer, by the quantized model's names.

        Parameters that are split on disk are left out: they are experts in full precision, as in the source.
        """
        written = {}
        for name, tensor in self.model.state_dict().items():
            if name.startswith(f"{layer}."):
                places = list(self._on_disk({name: tensor}))
                if len(places) == 1:
                    written[name] = self.read_back(places[0]).to(self._device)
        return written


def open_source(
    folder: Path,
    config: HadaCoreConfig,
    calibration: Calibration | torch.Tensor | None,
    *,
    dtype: str | torch.dtype | None,
    device: torch.device,
    rotation: str = "none",
) -> SourceModel:
    """The source that a config's method wants.

    Args:
        folder, config, dtype, device, rotation: as of `SourceModel`.
        calibration: text, tokens or None.

    Raises:
        ConfigError: there is no calibration for a method that needs it, or some for one that does not, or no
            such rotation.
        CalibrationError: the calibration cannot be read or does not fit the model.
        UnsupportedError: the model cannot be calibrated or rotated so.
    """
    if rotation not in (choices := ("auto", *ROTATIONS)):
        raise ConfigError(f"rotation: expected one of {', '.join(choices)}, found {rotation!r}")
    if rotation == "auto" and config.method != "gptq":
        rotation = "none"
    if (config.method == "gptq") != (calibration is not None):
        raise ConfigError(
            f"method={config.method!r} "
            + ("needs calibration data" if calibration is None else 'uses no calibration data; "gptq" does')
        )
    if calibration is None:
        return SourceModel(folder, config, dtype=dtype, device=device, rotation=rotation)
    title = "tokens"
    if not isinstance(calibration, torch.Tensor):
        title, calibration = calibration.title, calibration_tokens(calibration, load_tokenizer(folder))
    return CalibratedSource(
        folder, config, calibration, title=title, dtype=dtype, device=device, rotation=rotation
    )


def check_tokens(tokens: torch.Tensor, model: PreTrainedModel) -> None:
    """Check that a model can read calibration tokens.

    Args:
        tokens: should be int64 ``[samples, length]``.
        model: on any device.

    Raises:
        CalibrationError: they have another shape or dtype, or ids or positions that the model has not.
    """
    if tokens.dtype != torch.int64 or tokens.dim() != 2 or not tokens.numel():
        raise CalibrationError(
            f"calibration tokens are int64 [samples, length], found {tokens.dtype} {list(tokens.shape)}"
        )
    text_config = model.config.get_text_config(decoder=True)
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= text_config.vocab_size:
        raise CalibrationError(
            f"calibration tokens go from {low} to {high}, the model knows 0 to {text_config.vocab_size - 1}; "
            "the tokenizer belongs to another model"
        )
    longest = getattr(text_config, "max_position_embeddings", None)
    if longest is not None and tokens.shape[1] > longest:
        raise CalibrationError(
            f"calibration samples of {tokens.shape[1]} tokens are longer than the {longest} positions of the "
            "model; ask for a smaller sequence_length"
        )
