"""What a module computes, found out by running it: may a fused forward stand for its own?

A probe runs a module's own forward, on the CPU, with tiny random stand-ins for its weights and submodules
(see `probing`), and compares the result with what the fused forward would compute.
"""

import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ..kernels.gated_activation import ACTIVATIONS, gated_activation_reference
from ..kernels.rms_norm import rms_norm_reference
from ..kernels.rope import rope_reference
from ..probing import PROBE, ProbedConfig, Projection, Random, registered, run_own_forward, stand_in


class NormFormula(NamedTuple):
    """The options of `rms_norm`, in its order."""

    eps: float
    weight_offset: float
    round_before_weight: bool


class MlpFormula(NamedTuple):
    """A gated MLP.

    Attributes:
        projections: names of gate and up, or of the one layer that gives both.
        activation: of `gated_activation`.
    """

    projections: tuple[str, ...]
    activation: str


class AttentionFormula(NamedTuple):
    """Attention as in Llama.

    Attributes:
        norm: of the heads of q and k, None if they have none.
        options: what the module passes to attention functions besides what is passed to itself.
    """

    norm: NormFormula | None
    options: dict[str, Any]


class LayerFormula(NamedTuple):
    """Names of a decoder layer's norms; those behind attention and MLP may be missing."""

    before_attention: str
    after_attention: str | None
    before_mlp: str
    after_mlp: str | None


# Llama and most others; Gemma 2 and 3; GLM 4.
_LAYERS = (
    LayerFormula("input_layernorm", None, "post_attention_layernorm", None),
    LayerFormula(
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
    LayerFormula(
        "input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm"
    ),
)
_MLPS = (("gate_proj", "up_proj"), ("gate_up_proj",))
# weight_offset and round_before_weight of Llama, Gemma, GPT-OSS.
_NORMS = ((0.0, True), (1.0, False), (0.0, False))


def _agree(found: Any, expected: torch.Tensor) -> bool:
    """Equal but for the last bit of a few elements, which another order of a norm's fp32 sum can change."""
    return (
        isinstance(found, torch.Tensor)
        and found.shape == expected.shape
        and found.dtype == expected.dtype
        and bool((found != expected).float().mean() < 0.01)
        and torch.allclose(found.float(), expected.float(), rtol=0.05, atol=0.05)
    )


def norm_formula(module: nn.Module) -> NormFormula | None:
    """The formula of an RMSNorm over the last dimension; None if the module is none.

    Args:
        module: any module.
    """
    own = module._parameters.get("weight")
    if own is None or own.dim() != 1 or len(module._parameters) != 1 or module._modules:
        return None
    names = ("variance_epsilon", "eps")
    eps = next((e for e in (getattr(module, n, None) for n in names) if isinstance(e, float)), None)
    if eps is None:
        return None
    random = Random()
    # Some rows so small that eps matters.
    x = random(8, 64) * torch.tensor([1.0, 1e-3, 30, 1e-4] * 2, dtype=random.dtype)[:, None]
    weight = random(64)
    found = run_own_forward(stand_in(module, weight=weight), x)
    for offset, round_first in _NORMS:
        if isinstance(found, torch.Tensor) and found.dtype == x.dtype:
            if torch.equal(found, rms_norm_reference(x, weight, eps, offset, round_first)):
                return NormFormula(eps, offset, round_first)
    return None


def mlp_formula(module: nn.Module) -> MlpFormula | None:
    """The formula of ``down_proj(act(gate) * up)``; None if the module is no such thing.

    Args:
        module: any module.
    """
    for projections in _MLPS:
        if module._parameters or not {*projections, "down_proj"} <= module._modules.keys():
            continue
        random = Random()
        x, down = random(3, 8), Projection(16, random)
        layers = {name: Projection(32 // len(projections), random) for name in projections}
        found = run_own_forward(stand_in(module, down_proj=down, **layers), x)
        with torch.no_grad():
            gate, up = torch.cat([layer(x) for layer in layers.values()], dim=-1).chunk(2, dim=-1)
            for activation in ACTIVATIONS:
                expected = down(gated_activation_reference(gate, up, activation))
                if isinstance(found, torch.Tensor) and torch.equal(found, expected):
                    return MlpFormula(projections, activation)
    return None


class _Cache:
    """Notes what is added to it, and gives it back."""

    def __init__(self) -> None:
        self.updates: list[tuple[Any, ...]] = []

    def update(self, *args: Any, **kwargs: Any) -> Any:
        self.updates.append((*args, *kwargs.items()))
        return args[0], args[1]


def attention_formula(
    module: nn.Module, norms: Mapping[nn.Module, NormFormula | None]
) -> AttentionFormula | None:
    """The formula of attention as in Llama, with or without norms of the heads; None for any other module.

    Args:
        module: any module.
        norms: formulas of those norms that are known.
    """
    if not {"q_proj", "k_proj", "v_proj", "o_proj"} <= module._modules.keys():
        return None
    head_dim, layer, config = (getattr(module, n, None) for n in ("head_dim", "layer_idx", "config"))
    modeling = sys.modules[type(module).__module__]
    functions = getattr(modeling, "ALL_ATTENTION_FUNCTIONS", None)
    if None in (head_dim, layer, config, functions) or not hasattr(modeling, "eager_attention_forward"):
        return None
    assert isinstance(head_dim, int)
    if head_dim % 2:
        return None

    random = Random()
    parts: dict[str, Any] = {"o_proj": nn.Identity(), "config": ProbedConfig(config)}
    norm = None
    weights: dict[str, torch.Tensor | None] = {"q": None, "k": None}
    if "q_norm" in module._modules or "k_norm" in module._modules:
        q_norm, k_norm = (module._modules.get(name) for name in ("q_norm", "k_norm"))
        norm = norms.get(q_norm) if q_norm is not None else None
        if norm is None or k_norm is None or norms.get(k_norm) != norm:
            return None
        weights = {"q": random(head_dim), "k": random(head_dim)}
        parts["q_norm"] = stand_in(q_norm, weight=weights["q"])  # type: ignore[arg-type]
        parts["k_norm"] = stand_in(k_norm, weight=weights["k"])
    for name in "qkv":
        parts[f"{name}_proj"] = Projection(getattr(module, f"{name}_proj").out_features, random)
    x, cos, sin = random(2, 3, 8), random(2, 3, head_dim), random(2, 3, head_dim)
    with torch.no_grad():
        heads = {name: parts[f"{name}_proj"](x).view(2, 3, -1, head_dim) for name in "qkv"}
    for name, weight in weights.items():
        heads[name] = rope_reference(heads[name], cos, sin, weight, *(norm or (0.0, 0.0, True)))
    expected = [states.transpose(1, 2) for states in heads.values()]

    calls: list[tuple[Any, ...]] = []
    seen: dict[str, Any] = {}

    def attend(owner: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
        calls.append((query, key, value))
        seen.update(kwargs, attention_mask=mask)
        return query.transpose(1, 2), PROBE

    cache, passed = _Cache(), {"attention_mask": object(), "position_ids": object(), "extra": object()}
    with registered(functions, attend):
        found = run_own_forward(
            stand_in(module, **parts),
            hidden_states=x,
            position_embeddings=(cos, sin),
            past_key_values=cache,
            **passed,
        )
    options = {name: value for name, value in seen.items() if name not in passed and name != "dropout"}
    is_known = (
        isinstance(found, tuple)
        and len(found) == 2
        and found[1] is PROBE
        and len(calls) == 1
        and all(map(_agree, calls[0], expected))
        and torch.equal(found[0], calls[0][0].transpose(1, 2).flatten(2))
        and len(cache.updates) == 1
        and all(map(_agree, cache.updates[0][:2], expected[1:]))
        and cache.updates[0][2:] == (layer,)
        and all(seen.get(name) is value for name, value in passed.items())
        and seen.get("dropout") == 0
        and all(value is None or isinstance(value, bool | int | float | str) for value in options.values())
    )
    return AttentionFormula(norm, options) if is_known else None


class _Block(nn.Module):
    """Stands for attention or an MLP: any function of its input that is easily told from others."""

    def __init__(self, weight: torch.Tensor, is_attention: bool):
        super().__init__()
        self.scale = weight
        self.is_attention = is_attention
        self.kwargs: dict[str, Any] = {}

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> Any:
        self.kwargs = kwargs
        y = F.silu(hidden_states) * self.scale
        return (y, None) if self.is_attention else y


def layer_formula(module: nn.Module, norms: Mapping[nn.Module, NormFormula | None]) -> LayerFormula | None:
    """The formula of a pre-norm decoder layer, ``x += attention(norm(x)); x += mlp(norm(x))``; None if none.

    Args:
        module: any module.
        norms: formulas of those norms that are known.
    """
    if not {"self_attn", "mlp"} <= module._modules.keys():
        return None
    for formula in _LAYERS:
        names = [name for name in formula if name is not None]
        if module._modules.keys() != {"self_attn", "mlp", *names} or module._parameters:
            continue
        if any(norms.get(module.get_submodule(name)) is None for name in names):
            continue
        random = Random()
        parts: dict[str, Any] = {
            name: stand_in(module.get_submodule(name), weight=random(16)) for name in names
        }
        parts |= {"self_attn": _Block(random(16), True), "mlp": _Block(random(16), False)}
        x = random(2, 8, 16)
        passed = {
            "attention_mask": x,
            "position_ids": x,
            "past_key_values": None,
            "use_cache": False,
            "position_embeddings": (x, x),
            "extra": x,
        }
        clone = stand_in(module, **parts)
        found = run_own_forward(clone, x, **passed)

        def norm(name: str | None, values: torch.Tensor, parts: dict[str, Any] = parts) -> torch.Tensor:
            return values if name is None else type(parts[name]).forward(parts[name], values)

        with torch.no_grad():
            attended, _ = parts["self_attn"](norm(formula.before_attention, x), **parts["self_attn"].kwargs)
            total = x + norm(formula.after_attention, attended)
            expected = total + norm(formula.after_mlp, parts["mlp"](norm(formula.before_mlp, total)))
        kwargs = parts["self_attn"].kwargs
        if (
            isinstance(found, torch.Tensor)
            and torch.equal(found, expected)
            and kwargs.keys() == passed.keys()
            and all(kwargs[name] is value for name, value in passed.items())
        ):
            return formula
    return None
