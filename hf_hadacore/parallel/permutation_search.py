"""Which weights of a model can be permuted together, found out by running its modules (see `permutation`)."""

import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .. import int4
from ..modules.experts import expert_projections
from ..modules.linear import HadaCoreLinear
from ..probing import ProbedConfig, Projection, Random, registered, run_own_forward, stand_in
from .permutation import PermutationGroup

# Producers and their consumer: Llama and most others, Phi-3, Nemotron, Phi, GPTBigCode, unfused Mixtral.
_MLPS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("gate_proj", "up_proj"), "down_proj"),
    (("gate_up_proj",), "down_proj"),
    (("up_proj",), "down_proj"),
    (("fc1",), "fc2"),
    (("c_fc",), "c_proj"),
    (("w1", "w3"), "w2"),
)
_ATTENTIONS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("q_proj", "k_proj", "v_proj"), "o_proj"),
    (("q_proj", "k_proj", "v_proj"), "dense"),
    (("qkv_proj",), "o_proj"),
)
# Other parts of an MLP or attention are filled with random values: norms, not large matrices.
_MAX_OTHER_ELEMENTS = 1 << 20


def permutation_groups(model: nn.Module) -> list[PermutationGroup]:
    """Which weights of a model can be permuted together.

    MLPs, experts and attention are looked up by the names of their layers and then run, with stand-ins for
    the layers: a group is only returned if permuted outputs of its producers, and nothing else, permute the
    consumer's input. What is not recognized is in no group, and its columns have to stay where they are.

    Args:
        model: on any device, meta included; quantized or not.
    """
    shared = _shared_parameters(model)
    text_config: Any = getattr(model, "config", None)
    if hasattr(text_config, "get_text_config"):
        text_config = text_config.get_text_config(decoder=True)
    # Values of a layer that later layers read again have several consumers, each with an order of its own.
    reuses_values = bool(getattr(text_config, "num_kv_shared_layers", 0))
    known: dict[Any, list[PermutationGroup]] = {}
    groups: list[PermutationGroup] = []
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        for group in _groups_within(module, reuses_values, known):
            members = (*group.consumers, *group.producers)
            if not any(id(p) in shared for part in members for p in _parameters_of(module, part)):
                groups.append(
                    group._replace(
                        consumers=tuple(prefix + part for part in group.consumers),
                        producers=tuple(prefix + part for part in group.producers),
                    )
                )
    return groups


def _groups_within(
    module: nn.Module, reuses_values: bool, known: dict[Any, list[PermutationGroup]]
) -> list[PermutationGroup]:
    """The groups of a module's own layers.

    Args:
        module: any module.
        reuses_values: whether outputs of v_proj may be read by other layers, too.
        known: results by `_signature`: the layers of a model are alike.
    """
    if expert_projections(module):
        return _experts_groups(module)
    mlps = [pattern for pattern in _MLPS if _linears(module, (*pattern[0], pattern[1]))]
    attentions = [pattern for pattern in _ATTENTIONS if _linears(module, (*pattern[0], pattern[1]))]
    if not (mlps or attentions):
        return []
    signature = _signature(module)
    if signature not in known:
        found: list[PermutationGroup] = []
        for producers, consumer in mlps:
            found = found or _mlp_groups(module, producers, consumer)
        for producers, consumer in attentions:
            found = found or _attention_groups(module, producers, consumer, reuses_values)
        known[signature] = found
    return known[signature]


def _signature(module: nn.Module) -> tuple[Any, ...]:
    """What tells modules apart that compute something else: classes, shapes and plain attributes."""
    return tuple(
        (
            name,
            type(part),
            id(getattr(part, "config", None)),
            tuple((key, tuple(p.shape)) for key, p in part.named_parameters(recurse=False)),
            tuple(
                (key, value)
                for key, value in part.__dict__.items()
                if isinstance(value, bool | int | float | str) and key != "layer_idx"
            ),
        )
        for name, part in module.named_modules()
    )


def _parameters_of(module: nn.Module, part: str) -> list[nn.Parameter]:
    child = module._modules.get(part)
    own = module._parameters.get(part)
    return list(child.parameters()) if child is not None else [] if own is None else [own]


def _shared_parameters(model: nn.Module) -> set[int]:
    """Ids of the Parameters that more than one module, or children of more than one module, hold."""
    places: dict[int, set[tuple[int, int]]] = {}
    for module in model.modules():
        for child in module.children():
            for parameter in child.parameters(recurse=False):
                places.setdefault(id(parameter), set()).add((id(module), id(child)))
    return {key for key, found in places.items() if len(found) > 1}


def _linears(module: nn.Module, names: tuple[str, ...]) -> list[nn.Linear]:
    """The children of these names; empty if one is missing or computes something of its own."""
    found = [module._modules.get(name) for name in names]
    linears = [m for m in found if isinstance(m, nn.Linear) and type(m) in (nn.Linear, HadaCoreLinear)]
    return linears if len(linears) == len(names) else []


class _Recorder(nn.Module):
    """Stands for a linear layer that keeps its input and may put its outputs in another order."""

    def __init__(self, projection: Projection):
        super().__init__()
        self.projection = projection
        self.order: torch.Tensor | None = None
        self.inputs: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.inputs.append(x)
        y = self.projection(x)
        return y if self.order is None else y[..., self.order]


class _Probe:
    """A module with stand-ins for its linear layers.

    Args:
        module: left as it is.
        names: of the layers.
        parts: other replacements.
    """

    def __init__(self, module: nn.Module, names: tuple[str, ...], **parts: Any):
        self.random = Random(torch.float32)
        self.layers = {
            name: _Recorder(Projection(layer.out_features, self.random))
            for name, layer in zip(names, _linears(module, names), strict=True)
        }
        others = {name: child for name, child in module._modules.items() if name not in self.layers and child}
        own = sum(p.numel() for p in module.parameters(recurse=False))
        self.is_small = own + sum(p.numel() for m in others.values() for p in m.parameters()) < (
            _MAX_OTHER_ELEMENTS
        )
        if self.is_small:
            filled = {name: _filled(child, self.random) for name, child in others.items()}
            self.module = stand_in(_filled_alone(module, self.random), **filled, **self.layers, **parts)

    def inputs(self, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor] | None:
        """What each layer is called with in the module's own forward; None unless once each."""
        for layer in self.layers.values():
            layer.inputs = []
        if not self.is_small or run_own_forward(self.module, *args, **kwargs) is None:
            return None
        if any(len(layer.inputs) != 1 for layer in self.layers.values()):
            return None
        return {name: layer.inputs[0] for name, layer in self.layers.items()}


def _filled_alone(module: nn.Module, random: Random) -> nn.Module:
    """A stand-in with random Parameters and floating-point buffers of its own."""

    def fill(value: torch.Tensor | None) -> torch.Tensor | None:
        if value is None or not value.is_floating_point():
            return None if value is None or value.is_meta else value.cpu()
        return random(*value.shape)

    tensors = {**module._parameters, **module._buffers}
    return stand_in(module, **{name: fill(value) for name, value in tensors.items()})


def _filled(module: nn.Module, random: Random) -> nn.Module:
    children = {name: _filled(child, random) for name, child in module._modules.items() if child is not None}
    return stand_in(_filled_alone(module, random), **children)


def _is_permuted(
    probe: _Probe, group: PermutationGroup, order: torch.Tensor, *args: Any, **kwargs: Any
) -> bool:
    """Whether producers with permuted outputs permute the consumer's input, and change nothing else."""
    (consumer,) = group.consumers
    natural = probe.inputs(*args, **kwargs)
    for name in group.producers:
        layer = probe.layers[name]
        layer.order = group.output_order(order, layer.projection.factors.shape[0])
    permuted = probe.inputs(*args, **kwargs)
    for name in group.producers:
        probe.layers[name].order = None
    if natural is None or permuted is None or natural[consumer].shape[-1] != len(order):
        return False
    return all(
        natural[name].shape == seen.shape
        and torch.allclose(
            seen, natural[name][..., order] if name == consumer else natural[name], rtol=1e-4, atol=1e-5
        )
        for name, seen in permuted.items()
    )


def _reads_alike(probe: _Probe, names: tuple[str, ...], x: torch.Tensor, *args: Any, **kwargs: Any) -> bool:
    seen = probe.inputs(*args, **kwargs)
    return seen is not None and all(torch.equal(seen[name], x) for name in names)


def _shuffled(k: int, block: int | None = None, repeats: int = 1) -> torch.Tensor:
    """A seeded order of k channels; within blocks, and the same for so many of them, if asked for."""
    generator = torch.Generator("cpu").manual_seed(0)
    block = block or k
    orders = [torch.randperm(block, generator=generator) for _ in range(k // (block * repeats))]
    heads = torch.stack(orders).repeat_interleave(repeats, dim=0)
    return (heads + torch.arange(0, k, block)[:, None]).flatten()


def _mlp_groups(module: nn.Module, producers: tuple[str, ...], consumer: str) -> list[PermutationGroup]:
    layers = _linears(module, (*producers, consumer))
    if not layers:
        return []
    first, k = layers[0], layers[-1].in_features
    if any(layer.in_features != first.in_features or layer.out_features % k for layer in layers[:-1]):
        return []
    probe = _Probe(module, (*producers, consumer))
    x = probe.random(1, 2, first.in_features)
    groups = [PermutationGroup(producers, ())] if _reads_alike(probe, producers, x, x) else []
    order = _shuffled(k)
    for interleaved in (False, True) if first.out_features == 2 * k else (False,):
        group = PermutationGroup((consumer,), producers, interleaved=interleaved)
        if _is_permuted(probe, group, order, x):
            return [*groups, group]
    return groups


def _attention_groups(
    module: nn.Module, producers: tuple[str, ...], consumer: str, reuses_values: bool
) -> list[PermutationGroup]:
    layers = _linears(module, (*producers, consumer))
    head_dim, config = getattr(module, "head_dim", None), getattr(module, "config", None)
    functions = getattr(sys.modules[type(module).__module__], "ALL_ATTENTION_FUNCTIONS", None)
    if not layers or not isinstance(head_dim, int) or functions is None:
        return []
    k, rows = layers[-1].in_features, layers[-2].out_features
    values = rows if len(producers) == 3 else (rows - k) // 2
    if values <= 0 or k % values or values % head_dim or k % head_dim:
        return []
    probe = _Probe(module, (*producers, consumer), config=ProbedConfig(config))
    x = probe.random(2, 3, layers[0].in_features)
    arguments: dict[str, Any] = {"hidden_states": x, "attention_mask": None, "past_key_values": None}
    baked = PermutationGroup((consumer,), producers[-1:], head_dim, k // values)
    with registered(functions, _attend):
        # Models whose halves of a head share a sine keep it once, and some rotate a part of a head only.
        for width in (head_dim, head_dim // 2, head_dim // 4):
            cos, sin = probe.random(2, 3, width), probe.random(2, 3, width)
            arguments["position_embeddings"] = (cos, sin)
            if not _reads_alike(probe, producers, x, **arguments):
                continue
            groups = [PermutationGroup(producers, ())]
            order = _shuffled(k, head_dim, k // values)
            if not reuses_values and _is_permuted(probe, baked, order, **arguments):
                groups.append(baked)
            return groups
    return []


def _attend(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """Plain attention of every token to all, as an attention function of transformers."""
    output = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    return output.transpose(1, 2), None


def _experts_groups(module: nn.Module) -> list[PermutationGroup]:
    first, consumer = expert_projections(module)
    is_int4 = module.get_parameter(first).dtype == torch.int32
    shape = module.get_parameter(consumer).shape
    if is_int4:
        k = shape[-1] * int4.NIBBLES_PER_WORD
    else:
        k = shape[1] if module.is_transposed else shape[2]
    order = _shuffled(k)
    x = Random(torch.float32)(3, (2 if module.has_gate else 1) * k)
    experts: Any = module
    activate = experts._apply_gate if module.has_gate else experts.act_fn
    for interleaved in (False, True) if module.has_gate else (False,):
        group = PermutationGroup((consumer,), (first,), interleaved=interleaved)
        try:
            natural, permuted = activate(x), activate(x[:, group.output_order(order, x.shape[1])])
        except Exception:
            # A gate with Parameters of its own, for example.
            return []
        if torch.allclose(permuted, natural[:, order], rtol=1e-4, atol=1e-5):
            return [group]
    return []
