"""Which weights of a model become int4, how, and what stays in full precision and why."""

import re
from dataclasses import dataclass, field

from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.quantizers_utils import should_convert_module

from . import int4
from .config import HadaCoreConfig, LayerSpec
from .errors import ConfigError
from .modules.experts import expert_projections, projection_shape
from .name_patterns import name_prefix

# A router beside fused experts decides which experts run: tiny, and sensitive.
_ROUTER_NAMES = ("gate", "router", "shared_expert_gate")


@dataclass
class LayerPlan:
    """What happens to every weight matrix of a model.

    Attributes:
        linears: module name -> how an `nn.Linear` is quantized.
        experts: module name -> how a fused experts module is quantized.
        tied_head: name of an output head that is tied to the embedding and gets an int4 weight of its
            own after loading; None otherwise.
        kept: parameter name -> why it stays in full precision.
        sizes: parameter name -> number of elements, of every parameter before quantization.
    """

    linears: dict[str, LayerSpec] = field(default_factory=dict)
    experts: dict[str, LayerSpec] = field(default_factory=dict)
    tied_head: str | None = None
    kept: dict[str, str] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)

    @property
    def quantized_share(self) -> float:
        """The share of the model's parameters that become int4."""
        total = sum(self.sizes.values())
        return 1 - sum(self.sizes[name] for name in self.kept) / total if total else 0.0

    def describe(self) -> str:
        """What is quantized and, grouped by reason, what is not, with shares of the parameters."""
        total = max(1, sum(self.sizes.values()))
        quantized = f"{len(self.linears)} linear layers"
        if self.experts:
            quantized += f" and {len(self.experts)} fused experts modules"
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.kept.items():
            by_reason.setdefault(reason, []).append(name)
        parts = [
            f"{_abbreviate(names)} ({sum(self.sizes[n] for n in names) / total:.2%}: {reason})"
            for reason, names in by_reason.items()
        ]
        kept = "; in full precision: " + ", ".join(parts) if parts else ""
        if self.tied_head:
            kept += f"; {self.tied_head} is untied from the embedding and becomes int4 too"
        return f"{quantized} become int4 ({self.quantized_share:.1%} of the parameters){kept}"


def _abbreviate(names: list[str], limit: int = 4) -> str:
    """Names with their layer numbers as ``*``; the first few of them."""
    patterns = list(dict.fromkeys(re.sub(r"\.\d+(?=\.)", ".*", name) for name in names))
    shown = ", ".join(patterns[:limit])
    return shown if len(patterns) <= limit else f"{shown} and {len(patterns) - limit} more"


def plan_layers(model: PreTrainedModel, config: HadaCoreConfig, *, strict: bool = True) -> LayerPlan:
    """Decide for every weight of a model, from its structure and the config alone.

    Args:
        model: on any device, meta included; not yet quantized.
        config: the options.
        strict: refuse overrides that match nothing; False for checkpoints that may be loaded in part.

    Raises:
        ConfigError: overrides disagree or match nothing, the head is both skipped and asked for, or
            `input_permutations` names fused experts.
    """
    tied = model.all_tied_weights_keys
    plan = LayerPlan(sizes={name: p.numel() for name, p in model.named_parameters() if name not in tied})
    head = _output_head(model)
    tied_modules = {name.removesuffix(".weight") for name in (*tied.keys(), *tied.values())}
    skips = _skips(model, config, head, tied_modules)
    prefix = name_prefix(model)

    for name, module in model.named_modules():
        projections = expert_projections(module)
        if not projections and not isinstance(module, nn.Linear):
            continue
        skip = config.overrides_for(prefix + name).get("skip")
        is_wanted = skip is False
        if name == head and config.quantize_lm_head:
            is_wanted = _check_head_is_not_skipped(prefix + name, config, skip)
        reason = None
        if not is_wanted:
            reason = "skipped by an override" if skip else _reason_to_skip(prefix + name, name, model, skips)
        reason = reason or _reason_unsupported(module, projections)
        if reason is None and name in tied_modules:
            reason = "tied"
            plan.tied_head = name if name == head else plan.tied_head
        if reason is not None:
            plan.kept.update({f"{name}.{weight}": reason for weight in projections or ("weight",)})
        elif projections:
            plan.experts[name] = spec = config.layer_spec(prefix + name)
            if spec.input_perm:
                raise ConfigError(
                    f"input_permutations names {prefix + name!r}; fused experts keep their inputs in order"
                )
        else:
            plan.linears[name] = config.layer_spec(prefix + name)

    if strict:
        _check_overrides_match([prefix + name for name, _ in model.named_modules()], config)
    _keep_the_rest(model, plan)
    return plan


def _check_overrides_match(names: list[str], config: HadaCoreConfig) -> None:
    for pattern in config.overrides:
        if not any(config.matches(pattern, name) for name in names):
            raise ConfigError(
                f"overrides[{pattern!r}] matches no module of the model; a regex is searched in full names "
                f"such as {names[-1]!r}"
            )


def _output_head(model: PreTrainedModel) -> str | None:
    head = model.get_output_embeddings()
    return next((name for name, module in model.named_modules() if module is head), None) if head else None


def _skips(
    model: PreTrainedModel, config: HadaCoreConfig, head: str | None, tied_modules: set[str]
) -> dict[str, str]:
    """Name patterns to leave alone, with the reason."""
    skips: dict[str, str] = {}
    if config.add_default_skips:
        # The last module is the head of models that have no output embeddings, e.g. classifiers.
        last = list(model.named_parameters())[-1][0].rpartition(".")[0]
        skips = {last: "output head", **dict.fromkeys(sorted(tied_modules), "tied")}
        if head is not None:
            skips[head] = "output head"
    skips.update(dict.fromkeys(config.modules_to_not_convert, "listed in modules_to_not_convert"))
    skips.update(dict.fromkeys(model._keep_in_fp32_modules or (), "the model keeps it in fp32"))
    return skips


def _check_head_is_not_skipped(name: str, config: HadaCoreConfig, skip: bool | None) -> bool:
    if skip or not should_convert_module(name, config.modules_to_not_convert):
        raise ConfigError(
            f"quantize_lm_head=True contradicts modules_to_not_convert or an override that skips {name!r}; "
            "drop one of them"
        )
    return True


def _reason_to_skip(full_name: str, name: str, model: PreTrainedModel, skips: dict[str, str]) -> str | None:
    for pattern, reason in skips.items():
        if not should_convert_module(full_name, [pattern]):
            return reason
    return "router" if _is_router(name, model) else None


def _is_router(name: str, model: PreTrainedModel) -> bool:
    parent, _, leaf = name.rpartition(".")
    return leaf in _ROUTER_NAMES and hasattr(model.get_submodule(parent), "experts")


def _reason_unsupported(module: nn.Module, projections: tuple[str, ...]) -> str | None:
    if projections:
        inputs = [projection_shape(module, name)[-1] for name in projections]
    elif type(module) is nn.Linear:
        inputs = [module.in_features]
    else:
        return f"{type(module).__name__} is a subclass of nn.Linear with a forward of its own"
    bad = [k for k in inputs if not int4.is_packable(k)]
    return f"{bad[0]} inputs, not a multiple of 8" if bad else None


def _keep_the_rest(model: PreTrainedModel, plan: LayerPlan) -> None:
    """Account for the parameters that belong to no linear layer: embeddings, norms, convolutions, biases."""
    quantized = {f"{name}.weight" for name in plan.linears}
    for name in plan.experts:
        quantized |= {f"{name}.{p}" for p in expert_projections(model.get_submodule(name))}
    for name, parameter in model.named_parameters():
        if name in quantized or name in plan.kept or name not in plan.sizes:
            continue
        module = model.get_submodule(name.rpartition(".")[0])
        if parameter.ndim < 2:
            plan.kept[name] = "norms, biases and other vectors"
        elif isinstance(module, nn.Embedding):
            plan.kept[name] = "embedding"
        elif _is_router(name.rpartition(".")[0], model):
            plan.kept[name] = "router"
        elif parameter.ndim == 3:
            plan.kept[name] = "fused weights of an unknown layout"
        else:
            plan.kept[name] = "not an nn.Linear"
    # A tied weight counts once, under the name of its source.
    plan.kept = {name: reason for name, reason in plan.kept.items() if name in plan.sizes}
