"""Fewer kernels between the matrix products: fused forwards for the modules of a loaded model.

Written out in torch, the norms, activations, rotations and cache writes of a decoder layer are some thirty
small kernels, which cost as much as the int4 products of a decode step. `fuse` gives norms, gated MLPs,
attention and decoder layers whose formula is known (see `probes`) a forward of a few launches (see
`forwards`). A module keeps its own forward for what the fused one is not made for, decided at each call:
training, gradients, adapters or hooks on its layers, other dtypes. Parameters, buffers, names and
`state_dict` stay.
"""

from collections.abc import Iterator
from typing import Any

from torch import nn

from ..modules.linear import HadaCoreLinear
from .forwards import FusedAttention, FusedDecoderLayer, FusedMlp, FusedNorm, int4_layers
from .probes import NormFormula, attention_formula, layer_formula, mlp_formula, norm_formula
from .swap import Fused, restore, swap


def fuse(model: nn.Module) -> dict[str, int]:
    """Replace the forwards of the modules whose formula is known; `unfuse` undoes it.

    Fused forwards run where no gradient is wanted (`generate`, `torch.no_grad`, `torch.inference_mode`) and
    the module is in eval mode. They round where the original forwards round; the results differ by the order
    of the sums in norms.

    Args:
        model: loaded; a model that is fused already is only completed.

    Returns:
        How many modules of each kind are fused: "norms", "mlps", "attentions", "layers".
    """
    norms = {module: norm_formula(module) for module in model.modules() if not isinstance(module, Fused)}
    for module, formula in norms.items():
        swap(module, FusedNorm, formula)
    known: dict[nn.Module, NormFormula | None] = {
        module: module.formula for module in model.modules() if isinstance(module, FusedNorm)
    }
    for module in list(model.modules()):
        if isinstance(module, Fused):
            continue
        if _has_int4(module, ("down_proj",)):
            mlp = mlp_formula(module)
            if mlp is not None and _has_int4(module, mlp.projections):
                swap(module, FusedMlp, mlp)
        elif _has_int4(module, ("q_proj", "k_proj", "v_proj")):
            swap(module, FusedAttention, attention_formula(module, known))
        else:
            swap(module, FusedDecoderLayer, layer_formula(module, known))
    _link(model)
    kinds = {"norms": FusedNorm, "mlps": FusedMlp, "attentions": FusedAttention, "layers": FusedDecoderLayer}
    return {name: sum(isinstance(m, kind) for m in model.modules()) for name, kind in kinds.items()}


def joined_layers(model: nn.Module) -> list[list[HadaCoreLinear]]:
    """The layers that fused modules call together because they read the same input.

    Args:
        model: fused.
    """
    names = [
        (
            module,
            module.formula.projections if isinstance(module, FusedMlp) else ("q_proj", "k_proj", "v_proj"),
        )
        for module in model.modules()
        if isinstance(module, FusedMlp | FusedAttention)
    ]
    return [layers for layers in (int4_layers(*pair) for pair in names) if layers is not None]


def unfuse(model: nn.Module) -> None:
    """Give all modules their own forwards back.

    Args:
        model: fused or not.
    """
    for module in model.modules():
        restore(module)


def _has_int4(module: nn.Module, names: tuple[str, ...]) -> bool:
    return all(type(getattr(module, name, None)) is HadaCoreLinear for name in names)


def _link(model: nn.Module) -> None:
    """Tell fused decoder layers which norm comes next: that of the next layer, or the one after the last."""
    for layer, norm in _successors(model):
        layer.successor = (norm,)


def _successors(model: nn.Module) -> Iterator[tuple[FusedDecoderLayer, nn.Module | None]]:
    for parent in model.modules():
        for layers in parent.children():
            if not isinstance(layers, nn.ModuleList):
                continue
            following: list[Any] = [*list(layers)[1:], None]
            for layer, after in zip(layers, following, strict=True):
                if not isinstance(layer, FusedDecoderLayer):
                    continue
                if isinstance(after, FusedDecoderLayer):
                    yield layer, after.get_submodule(after.formula.before_attention)
                else:
                    yield layer, getattr(parent, "norm", None) if after is None else None
