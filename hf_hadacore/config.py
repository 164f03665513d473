"""HadaCoreConfig: every option a user can set, validated before anything is loaded."""

import copy
import difflib
import re
from re import _constants as _sre  # type: ignore[attr-defined]
from re import _parser as _sre_parser  # type: ignore[attr-defined]
from typing import Any, NamedTuple

from transformers.utils.quantization_config import QuantizationConfigMixin

from .errors import ConfigError
from .int4 import GROUP_SIZES

QUANT_METHOD = "hadacore"
FORMAT_VERSION = 1

_METHODS = ("rtn", "gptq")
_ACT_ORDERS = ("static", "permuted")
_ATTENTION_MODES = ("fp8", "int8-fp8")
_BOOL_OPTIONS = (
    "symmetric",
    "add_default_skips",
    "quantize_lm_head",
    "dequantize",
    "cuda_graphs",
)
_OVERRIDE_OPTIONS = ("group_size", "symmetric", "skip")
# What follows from the model of a checkpoint; it is written there, and nobody asks for it.
DERIVED_OPTIONS = ("input_permutations", "stream_rotation", "key_means")
_STREAM_ROTATION = {"embedding": str, "norm": str, "gain_offset": float}
_MAX_PATTERN_LENGTH = 256


class LayerSpec(NamedTuple):
    """How one weight is quantized.

    Attributes:
        group_size: g; -1 is one group per row.
        symmetric: whether z = 8 everywhere.
        input_perm: whether the columns are stored in an order of their own, which `input_perm` gives.
    """

    group_size: int
    symmetric: bool
    input_perm: bool = False


class HadaCoreConfig(QuantizationConfigMixin):
    """Options of the HadaCore quantizer, for `from_pretrained(quantization_config=...)`.

    Args:
        bits: bits per weight; 4.
        group_size: weights along the input dimension that share one scale: 32, 64, 128, or -1
            for one scale per output row. The last group of a row may be short.
        symmetric: True fixes the zero point at 8 and stores none; False stores one uint8 zero
            per group.
        method: how the weights were chosen. "rtn" rounds each weight to the nearest grid point of a searched
            scale. "gptq" needs calibration data: quantize offline (`hadacore quantize`).
        act_order: the order in which "gptq" quantizes columns. False: as they are. "static": by falling
            activation energy, in groups of neighbours as without. "permuted": by falling activation energy,
            and groups are formed in that order; see `hf_hadacore.parallel.permutation`. True is "static".
        attention: 8-bit attention and key/value cache, "fp8" or "int8-fp8", unless `from_pretrained` is given
            an `attn_implementation`. May be set when loading a checkpoint that was saved without. None keeps
            the model's (or checkpoint's) attention.
        modules_to_not_convert: names (or regexes) of modules to leave in full precision, in addition
            to the output head and tied modules. A name also covers the modules below it.
        add_default_skips: False makes `modules_to_not_convert` replace the defaults instead of
            adding to them.
        overrides: `{regex: {"group_size": ..., "symmetric": ..., "skip": ...}}`. Every regex found
            (`re.search`) in a module's full name applies; two that disagree about an option are an
            error, so their order never matters. `{"skip": False}` quantizes a module that
            `modules_to_not_convert` or a default would skip.
        quantize_lm_head: quantize the output head too. A head that is tied to the embedding is
            untied: the embedding stays in full precision and the head gets its own int4 weight.
        dequantize: load a quantized checkpoint as an ordinary full-precision model.
        input_permutations: regexes (as in `overrides`) of the modules whose columns are stored in an order of
            their own, which the checkpoint holds as `input_perm`; written for you.
        stream_rotation: `{"embedding": name, "norm": name, "gain_offset": number}`, the modules between which
            the residual stream is rotated at run time (see `modules.stream_rotation`); written for you.
        key_means: `{regex: [key/value heads, head size]}` of the attention modules for which the checkpoint
            holds the mean of their keys (see `attention.key_means`); written for you.
        cuda_graphs: let `generate` decode with CUDA graphs where it can (on CUDA, greedy or sampling; see
            `hf_hadacore.decoding.generation`). `generate(disable_compile=True)` turns them off for one call.
        format_version: version of the int4 format of a checkpoint; written for you.
        quant_method: always "hadacore"; written for you.

    Raises:
        ConfigError: an option is unknown, has a wrong type or an unusable value.
    """

    def __init__(
        self,
        bits: int = 4,
        group_size: int = 128,
        symmetric: bool = False,
        method: str = "rtn",
        act_order: bool | str = False,
        attention: str | None = None,
        modules_to_not_convert: list[str] | None = None,
        add_default_skips: bool = True,
        overrides: dict[str, dict[str, Any]] | None = None,
        quantize_lm_head: bool = False,
        dequantize: bool = False,
        cuda_graphs: bool = True,
        input_permutations: list[str] | None = None,
        stream_rotation: dict[str, Any] | None = None,
        key_means: dict[str, list[int]] | None = None,
        format_version: int = FORMAT_VERSION,
        quant_method: str = QUANT_METHOD,
        **unknown: Any,
    ):
        for name in unknown:
            raise ConfigError(_unknown_option(name))
        self.quant_method = quant_method  # type: ignore[assignment]  # third-party methods are plain strings
        self.format_version = format_version
        self.bits = bits
        self.group_size = group_size
        self.symmetric = symmetric
        self.method = method
        self.act_order = "static" if act_order is True else act_order
        self.attention = attention
        self.modules_to_not_convert = [] if modules_to_not_convert is None else modules_to_not_convert
        self.add_default_skips = add_default_skips
        self.overrides = {} if overrides is None else overrides
        self.quantize_lm_head = quantize_lm_head
        self.dequantize = dequantize
        self.cuda_graphs = cuda_graphs
        self.input_permutations = [] if input_permutations is None else input_permutations
        self.stream_rotation = stream_rotation
        self.key_means = {} if key_means is None else key_means
        self.validate()

    def validate(self) -> None:
        """Check every option (again, after attributes were assigned).

        Raises:
            ConfigError: naming the option, its value and what would be right.
        """
        if self.quant_method != QUANT_METHOD:
            raise ConfigError(f"quant_method must be {QUANT_METHOD!r}, got {self.quant_method!r}")
        _check_int("format_version", self.format_version)
        if self.format_version > FORMAT_VERSION:
            raise ConfigError(
                f"format_version {self.format_version} is newer than {FORMAT_VERSION}, the newest that this "
                "version of hf_hadacore reads; upgrade hf_hadacore to load this checkpoint"
            )
        if self.format_version < 1:
            raise ConfigError(f"format_version must be {FORMAT_VERSION}, got {self.format_version}")
        _check_int("bits", self.bits)
        if self.bits != 4:
            raise ConfigError(f"bits must be 4, got {self.bits}")
        _check_group_size("group_size", self.group_size)
        for option in _BOOL_OPTIONS:
            _check_bool(option, getattr(self, option))
        _check_choice("method", self.method, _METHODS)
        if self.act_order is not False:
            _check_choice("act_order", self.act_order, (False, True, *_ACT_ORDERS))
            if self.method != "gptq":
                raise ConfigError(
                    f'act_order={self.act_order!r} needs method="gptq", which quantizes offline (hadacore '
                    f"quantize); method={self.method!r} looks at no activations"
                )
        if self.attention is not None:
            _check_choice("attention", self.attention, _ATTENTION_MODES)
        self.modules_to_not_convert = _check_names("modules_to_not_convert", self.modules_to_not_convert)
        self.input_permutations = _check_names("input_permutations", self.input_permutations)
        self._check_stream_rotation()
        self._check_key_means()
        self._check_overrides()

    def _check_stream_rotation(self) -> None:
        value = self.stream_rotation
        if value is None:
            return
        types = {key: type(part) for key, part in value.items()} if isinstance(value, dict) else None
        if types != _STREAM_ROTATION:
            raise ConfigError(
                "stream_rotation must be a dict of embedding and norm, names of modules, and gain_offset, a "
                f"float, got {value!r}"
            )

    def _check_key_means(self) -> None:
        if not isinstance(self.key_means, dict):
            raise ConfigError(
                f"key_means must be a dict {{regex: [key/value heads, head size]}}, got {self.key_means!r}"
            )
        for pattern, shape in self.key_means.items():
            _check_pattern("key_means", pattern)
            if not (isinstance(shape, list | tuple) and len(shape) == 2 and all(map(_is_positive, shape))):
                raise ConfigError(
                    f"key_means[{pattern!r}] must be [key/value heads, head size], got {shape!r}"
                )

    def _check_overrides(self) -> None:
        if not isinstance(self.overrides, dict):
            raise ConfigError(f"overrides must be a dict {{regex: options}}, got {self.overrides!r}")
        for pattern, options in self.overrides.items():
            _check_pattern("overrides", pattern)
            where = f"overrides[{pattern!r}]"
            if not isinstance(options, dict):
                raise ConfigError(f"{where} must be a dict of {_OVERRIDE_OPTIONS}, got {options!r}")
            for option, value in options.items():
                if option not in _OVERRIDE_OPTIONS:
                    raise ConfigError(f"{where}: {_unknown_option(option, _OVERRIDE_OPTIONS)}")
                if option == "group_size":
                    _check_group_size(f"{where}: group_size", value)
                else:
                    _check_bool(f"{where}: {option}", value)

    @staticmethod
    def matches(pattern: str, module_name: str) -> bool:
        """Whether an `overrides` regex applies to a module."""
        return re.search(pattern, module_name) is not None

    def overrides_for(self, module_name: str) -> dict[str, Any]:
        """The options that `overrides` sets for a module, merged over every matching regex.

        Args:
            module_name: the module's full name in the model.

        Raises:
            ConfigError: two matching regexes set one option to different values.
        """
        merged: dict[str, Any] = {}
        source: dict[str, str] = {}
        for pattern, options in self.overrides.items():
            if not self.matches(pattern, module_name):
                continue
            for option, value in options.items():
                if merged.setdefault(option, value) != value:
                    raise ConfigError(
                        f"overrides disagree about {option} of {module_name}: {source[option]!r} says "
                        f"{merged[option]!r}, {pattern!r} says {value!r}; make one of them not match"
                    )
                source.setdefault(option, pattern)
        return merged

    def layer_spec(self, module_name: str) -> LayerSpec:
        """How the weights of a module are quantized, overrides included.

        Args:
            module_name: the module's full name in the model.

        Raises:
            ConfigError: two matching overrides disagree.
        """
        options = self.overrides_for(module_name)
        return LayerSpec(
            group_size=options.get("group_size", self.group_size),
            symmetric=options.get("symmetric", self.symmetric),
            input_perm=any(self.matches(pattern, module_name) for pattern in self.input_permutations),
        )

    def key_mean_shape(self, module_name: str) -> tuple[int, int] | None:
        """Key/value heads and head size of an attention module whose keys' mean is stored.

        Args:
            module_name: the module's full name in the model.

        Returns:
            None for any other module.
        """
        for pattern, (heads, head_dim) in self.key_means.items():
            if self.matches(pattern, module_name):
                return heads, head_dim
        return None

    def without_derived(self) -> "HadaCoreConfig":
        """A copy without the `DERIVED_OPTIONS`: what was asked for."""
        config, defaults = copy.deepcopy(self), HadaCoreConfig()
        for option in DERIVED_OPTIONS:
            setattr(config, option, getattr(defaults, option))
        return config

    def get_loading_attributes(self) -> dict[str, Any]:
        """The options that a user may change when loading a quantized checkpoint.

        `attention=None` is what a config says that is about something else, and leaves the checkpoint's.
        """
        options = {"dequantize": self.dequantize, "cuda_graphs": self.cuda_graphs}
        return options if self.attention is None else {**options, "attention": self.attention}


_OPTIONS = tuple(name for name in HadaCoreConfig.__init__.__annotations__ if name != "unknown")


def _unknown_option(name: object, valid: tuple[str, ...] = _OPTIONS) -> str:
    nearest = difflib.get_close_matches(str(name), valid, n=1, cutoff=0.5)
    hint = f"did you mean {nearest[0]!r}?" if nearest else f"valid options: {', '.join(valid)}"
    return f"unknown option {name!r}; {hint}"


def _check_int(option: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ConfigError(f"{option} must be an integer, got {value!r}")


def _is_positive(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _check_bool(option: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ConfigError(f"{option} must be True or False, got {value!r}")


def _check_choice(option: str, value: object, choices: tuple[str | bool, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ConfigError(f"{option} must be one of {choices}, got {value!r}")


def _check_group_size(option: str, value: object) -> None:
    _check_int(option, value)
    if value not in GROUP_SIZES:
        raise ConfigError(f"{option} must be one of {GROUP_SIZES}, got {value!r}")


def _check_names(option: str, names: object) -> list[str]:
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) and name for name in names):
        raise ConfigError(f"{option} must be a list of module names, got {names!r}")
    for name in names:
        _check_pattern(option, name)
    return list(names)


def _check_pattern(option: str, pattern: object) -> None:
    """Patterns come with checkpoints, so a regex must be valid and not built to hang."""
    if not isinstance(pattern, str) or not pattern or len(pattern) > _MAX_PATTERN_LENGTH:
        raise ConfigError(f"{option}: a regex has 1 to {_MAX_PATTERN_LENGTH} characters, got {pattern!r:.80}")
    try:
        parsed = _sre_parser.parse(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ConfigError(f"{option}: {pattern!r} is not a valid regex: {error}") from None
    if _repeat_depth(parsed) > 1:
        raise ConfigError(
            f"{option}: {pattern!r} nests one unbounded repeat in another, which can take exponential time; "
            "write it without the nesting"
        )


def _repeat_depth(node: Any) -> int:
    """How deeply unbounded repeats (``*``, ``+``, ``{n,}``) nest in a parsed regex."""
    if isinstance(node, _sre_parser.SubPattern | list):
        return max((_repeat_depth(child) for child in node), default=0)
    if not isinstance(node, tuple):
        return 0
    here = len(node) == 2 and node[0] in (_sre.MAX_REPEAT, _sre.MIN_REPEAT) and node[1][1] is _sre.MAXREPEAT
    return here + max((_repeat_depth(child) for child in node), default=0)
