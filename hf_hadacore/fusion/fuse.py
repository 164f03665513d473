"""Fewer kernels between the matrix products: fused forwards for the modules of a loaded model.

Written out in torch, the norms, activations, rotations and cache writes of a decoder layer are some thirty
small kernels, which cost as much as the int4 products of a decode step. `fuse` gives norms, gated MLPs,
attention and decoder layers whose formula is known (see `probes`) a forward of a few launches. A
module keeps its own forward for what the fused one is not made for, decided at each call: training,
gradients, adapters or hooks on its layers, other dtypes. Parameters, buffers, names and `state_dict` stay.
"""

import sys
from collections.abc import Iterator
from types import MethodType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn
from transformers.cache_utils import Cache, StaticLayer, StaticSlidingWindowLayer

from ..attention.decode_cache import DecodeLayer
from ..kernels.gated_activation import gated_activation
from ..kernels.rms_norm import add_rms_norm, rms_norm
from ..kernels.rope import rope, rope_into_cache
from ..modules.linear import HadaCoreLinear
from ..modules.linear_group import forward_together
from .probes import (
    AttentionFormula,
    LayerFormula,
    MlpFormula,
    NormFormula,
    attention_formula,
    layer_formula,
    mlp_formula,
    norm_formula,
)


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
    norms = {module: norm_formula(module) for module in model.modules() if not isinstance(module, _Fused)}
    for module, formula in norms.items():
        _swap(module, FusedNorm, formula)
    known: dict[nn.Module, NormFormula | None] = {
        module: module.formula for module in model.modules() if isinstance(module, FusedNorm)
    }
    for module in list(model.modules()):
        if isinstance(module, _Fused):
            continue
        if _has_int4(module, ("down_proj",)):
            mlp = mlp_formula(module)
            if mlp is not None and _has_int4(module, mlp.projections):
                _swap(module, FusedMlp, mlp)
        elif _has_int4(module, ("q_proj", "k_proj", "v_proj")):
            _swap(module, FusedAttention, attention_formula(module, known))
        else:
            _swap(module, FusedDecoderLayer, layer_formula(module, known))
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
    return [layers for layers in (_int4_layers(*pair) for pair in names) if layers is not None]


def unfuse(model: nn.Module) -> None:
    """Give all modules their own forwards back.

    Args:
        model: fused or not.
    """
    for module in model.modules():
        if isinstance(module, _Fused):
            module.__dict__.pop("formula", None)
            module.__dict__.pop("successor", None)
            _set_class(module, type(module).unfused)


class _Fused(nn.Module):
    """Base of the fused forwards, each put in front of a module's own class by `_fused_class`."""

    unfused: ClassVar[type[nn.Module]]
    modeling: ClassVar[Any]
    mixin: ClassVar[type["_Fused"]]
    formula: Any

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class is made at run time: copies and pickles have to make it again.
        return _new, (self.mixin, self.unfused), self.__dict__

    def _keeps_own_forward(self) -> bool:
        return self.training or torch.is_grad_enabled()


_CLASSES: dict[tuple[type, type], Any] = {}


def _fused_class(mixin: type[_Fused], unfused: type[nn.Module]) -> Any:
    if (mixin, unfused) in _CLASSES:
        return _CLASSES[mixin, unfused]
    # transformers and accelerate look at class names, so the name stays.
    names: dict[str, Any] = {
        name: getattr(unfused, name) for name in ("__module__", "__qualname__", "__doc__")
    }
    modeling = sys.modules[unfused.__module__]
    names |= {"unfused": unfused, "modeling": modeling, "mixin": mixin}
    _CLASSES[mixin, unfused] = type(unfused.__name__, (mixin, unfused), names)
    return _CLASSES[mixin, unfused]


def _new(mixin: type[_Fused], unfused: type[nn.Module]) -> _Fused:
    cls = _fused_class(mixin, unfused)
    return cls.__new__(cls)


def _swap(module: nn.Module, mixin: type[_Fused], formula: tuple[Any, ...] | None) -> None:
    # A forward that someone has set on the instance is not ours to go around.
    is_hooked = "_old_forward" in module.__dict__
    if formula is not None and (is_hooked or "forward" not in module.__dict__):
        _set_class(module, _fused_class(mixin, type(module)))
        module.formula = formula  # type: ignore[assignment]


def _set_class(module: nn.Module, cls: type[nn.Module]) -> None:
    own = type(module).forward
    # accelerate's hooks keep the bound forward that they wrap.
    for name in ("forward", "_old_forward"):
        bound = module.__dict__.get(name)
        if isinstance(bound, MethodType) and bound.__func__ is own:
            module.__dict__[name] = MethodType(cls.forward, module)
    module.__class__ = cls


def _is_bare(module: nn.Module) -> bool:
    """Whether nothing but the module's class decides what a call does: no hooks, accelerate's included."""
    return not (module._forward_hooks or module._forward_pre_hooks or "_hf_hook" in module.__dict__)


def _has_int4(module: nn.Module, names: tuple[str, ...]) -> bool:
    return all(type(getattr(module, name, None)) is HadaCoreLinear for name in names)


def _int4_layers(module: nn.Module, names: tuple[str, ...]) -> list[HadaCoreLinear] | None:
    """The layers of these names, if their products may be computed together: adapters take their place."""
    layers = [getattr(module, name) for name in names]
    are_plain = all(type(layer) is HadaCoreLinear and _is_bare(layer) for layer in layers)
    return layers if are_plain and all(layer.joins_shards for layer in layers) else None


class _Ahead(NamedTuple):
    """The output of a norm, computed when its input was and kept on the input.

    Attributes:
        norm: whose output it is.
        version: of the input, which changes when it is written to.
        output: normalized.
    """

    norm: nn.Module
    version: int
    output: torch.Tensor


class FusedNorm(_Fused):
    """RMSNorm in one launch, or in none if the layer before has computed it with its residual sum."""

    formula: NormFormula
    weight: torch.Tensor

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs or len(args) != 1 or self._keeps_own_forward() or args[0].dtype != self.weight.dtype:
            return super().forward(*args, **kwargs)
        x = args[0]
        if not torch.compiler.is_compiling():
            ahead: _Ahead | None = x.__dict__.pop("_hadacore_ahead", None)
            if ahead is not None and ahead.norm is self and ahead.version == x._version:
                return ahead.output
        eps, weight_offset, round_before_weight = self.formula
        return rms_norm(
            x, self.weight, eps, weight_offset=weight_offset, round_before_weight=round_before_weight
        )

    def after_sum(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The norm of x + residual, and the sum."""
        if not (_is_bare(self) and x.dtype == residual.dtype == self.weight.dtype):
            total = residual + x
            return self(total), total
        eps, weight_offset, round_before_weight = self.formula
        return add_rms_norm(
            x,
            residual,
            self.weight,
            eps,
            weight_offset=weight_offset,
            round_before_weight=round_before_weight,
        )


class FusedMlp(_Fused):
    """``down_proj(act(gate) * up)`` with gate and up in one product and one launch for what is between."""

    formula: MlpFormula
    down_proj: nn.Module

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        layers = _int4_layers(self, self.formula.projections)
        if kwargs or len(args) != 1 or layers is None or self._keeps_own_forward():
            return super().forward(*args, **kwargs)
        outputs = forward_together(layers, args[0])
        gate, up = outputs if len(outputs) == 2 else outputs[0].chunk(2, dim=-1)
        return self.down_proj(gated_activation(gate, up, self.formula.activation))


class _Slot(NamedTuple):
    """Where a static cache takes the next tokens: `rope_into_cache`'s arguments."""

    keys: torch.Tensor
    values: torch.Tensor
    position: torch.Tensor


def _take_slot(past: Any, index: int, k: torch.Tensor, v: torch.Tensor) -> _Slot | None:
    """Room in a cache that is written in place, counted as used; None for all other caches.

    Args:
        past: a transformers cache.
        index: of the layer.
        k, v: what will be written, ``[B, H, T, D]`` before rotation.
    """
    if type(past).update is not Cache.update or past.offloading or index >= len(past.layers):
        return None
    layer = past.layers[index]
    if type(layer) is DecodeLayer:
        if not layer.progress.decoding or layer.is_full:
            return None
        slot = _Slot(layer.keys, layer.values, layer.progress.position)
    elif type(layer) is StaticLayer or (
        type(layer) is StaticSlidingWindowLayer
        and layer.cumulative_length_int + k.shape[2] <= layer.max_cache_len
    ):
        if not layer.is_initialized:
            layer.lazy_initialization(k, v)
        assert layer.keys is not None and layer.values is not None
        slot = _Slot(layer.keys, layer.values, layer.cumulative_length)
    else:
        return None
    return slot if slot.keys.dtype == k.dtype and slot.keys.is_contiguous() else None


def _count(layer: Any, tokens: int) -> None:
    """Tell a cache layer that tokens were written to it."""
    if type(layer) is DecodeLayer:
        layer.length += tokens
        return
    layer.cumulative_length.add_(tokens)
    if type(layer) is StaticSlidingWindowLayer:
        layer.cumulative_length_int += tokens


class FusedAttention(_Fused):
    """Attention as in Llama: one product for q, k and v, one launch for norms, rotation and cache write."""

    formula: AttentionFormula
    config: Any
    layer_idx: int
    head_dim: int
    q_norm: nn.Module
    k_norm: nn.Module
    o_proj: nn.Module

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, Any]:
        layers = _int4_layers(self, ("q_proj", "k_proj", "v_proj"))
        if args or layers is None or self._keeps_own_forward() or not self._can_rotate(**kwargs):
            return super().forward(*args, **kwargs)
        return self._attend(layers, **kwargs)

    def _can_rotate(
        self, hidden_states: torch.Tensor, position_embeddings: Any = None, **kwargs: Any
    ) -> bool:
        if position_embeddings is None or hidden_states.dim() != 3:
            return False
        cos = position_embeddings[0]
        dtypes = [cos.dtype]
        if self.formula.norm is not None:
            if not (_is_bare(self.q_norm) and _is_bare(self.k_norm)):
                return False
            dtypes += [self.q_norm.weight.dtype, self.k_norm.weight.dtype]
        return cos.shape[-1] == self.head_dim and all(dtype == hidden_states.dtype for dtype in dtypes)

    def _attend(
        self,
        layers: list[HadaCoreLinear],
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, Any]:
        batch, tokens = hidden_states.shape[:2]
        q, k, v = (
            states.view(batch, tokens, -1, self.head_dim)
            for states in forward_together(layers, hidden_states)
        )
        norm: dict[str, Any] = {}
        if self.formula.norm is not None:
            norm = {
                "q_weight": self.q_norm.weight,
                "k_weight": self.k_norm.weight,
                **self.formula.norm._asdict(),
            }
        values = v.transpose(1, 2)
        slot = None
        if past_key_values is not None:
            slot = _take_slot(past_key_values, self.layer_idx, k.transpose(1, 2), values)
        if slot is not None:
            query = rope_into_cache(q, k, v, *position_embeddings, *slot, **norm)
            _count(past_key_values.layers[self.layer_idx], tokens)
            keys, values = slot.keys, slot.values
        else:
            query, keys = rope(q, k, *position_embeddings, **norm)
            if past_key_values is not None:
                keys, values = past_key_values.update(keys, values, self.layer_idx)
        attend = self.modeling.ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, self.modeling.eager_attention_forward
        )
        output, weights = attend(
            self,
            query,
            keys,
            values,
            attention_mask,
            dropout=0.0,
            **self.formula.options,
            **kwargs,
        )
        return self.o_proj(output.reshape(batch, tokens, -1).contiguous()), weights


class FusedDecoderLayer(_Fused):
    """A pre-norm decoder layer whose residual sums are computed together with the norms that follow.

    The sum at its end is followed by the norm of the next layer. What that norm gives is attached to the sum,
    and taken from there if the same norm is called with it, unchanged: see `FusedNorm`.

    Attributes:
        successor: holds the next layer's norm, without being its parent.
    """

    formula: LayerFormula
    self_attn: nn.Module
    mlp: nn.Module
    successor: tuple[nn.Module | None] = (None,)

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        norms: list[Any] = [None if name is None else getattr(self, name) for name in self.formula]
        before_attention, after_attention, before_mlp, after_mlp = norms
        if len(args) != 1 or self._keeps_own_forward() or not isinstance(before_mlp, FusedNorm):
            return super().forward(*args, **kwargs)
        x, _ = self.self_attn(hidden_states=before_attention(args[0]), **kwargs)
        x, residual = before_mlp.after_sum(x if after_attention is None else after_attention(x), args[0])
        x = self.mlp(x)
        if after_mlp is not None:
            x = after_mlp(x)
        following = self.successor[0]
        # Without version counters, as in inference mode, a change of the sum would go unnoticed.
        if (
            not isinstance(following, FusedNorm)
            or following.weight.device != x.device
            or torch.compiler.is_compiling()
            or torch.is_inference_mode_enabled()
        ):
            return residual + x
        normed, total = following.after_sum(x, residual)
        total._hadacore_ahead = _Ahead(following, total._version, normed)  # type: ignore[attr-defined]
        return total


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
