"""Forwards of a few launches for norms, MLPs, attention and decoder layers whose formula is known."""

from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.cache_utils import Cache, StaticLayer, StaticSlidingWindowLayer

from ..attention.decode_cache import DecodeLayer
from ..kernels.gated_activation import gated_activation
from ..kernels.rms_norm import add_rms_norm, rms_norm
from ..kernels.rope import rope, rope_into_cache
from ..modules.linear import HadaCoreLinear
from ..modules.linear_group import forward_together
from .probes import AttentionFormula, LayerFormula, MlpFormula, NormFormula
from .swap import Fused, is_bare


def int4_layers(
    module: nn.Module, names: tuple[str, ...], device: torch.device | None = None
) -> list[HadaCoreLinear] | None:
    """The layers of these names, if their products may be computed together: adapters take their place.

    Args:
        module: their parent.
        names: its children.
        device: of their input; None if it is not known.
    """
    layers = [getattr(module, name) for name in names]
    are_plain = all(type(layer) is HadaCoreLinear and is_bare(layer, device) for layer in layers)
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


class FusedNorm(Fused):
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
        are_alike = x.dtype == residual.dtype == self.weight.dtype and x.device == residual.device
        if not (are_alike and is_bare(self, x.device)):
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


class FusedMlp(Fused):
    """``down_proj(act(gate) * up)`` with gate and up in one product and one launch for what is between."""

    formula: MlpFormula
    down_proj: nn.Module

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs or len(args) != 1 or self._keeps_own_forward():
            return super().forward(*args, **kwargs)
        layers = int4_layers(self, self.formula.projections, args[0].device)
        if layers is None:
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


class FusedAttention(Fused):
    """Attention as in Llama: one product for q, k and v, one launch for norms, rotation and cache write."""

    formula: AttentionFormula
    config: Any
    layer_idx: int
    head_dim: int
    q_norm: nn.Module
    k_norm: nn.Module
    o_proj: nn.Module

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, Any]:
        if args or self._keeps_own_forward() or not self._can_rotate(**kwargs):
            return super().forward(*args, **kwargs)
        layers = int4_layers(self, ("q_proj", "k_proj", "v_proj"), kwargs["hidden_states"].device)
        if layers is None:
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
            device = hidden_states.device
            if not (is_bare(self.q_norm, device) and is_bare(self.k_norm, device)):
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


class FusedDecoderLayer(Fused):
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
