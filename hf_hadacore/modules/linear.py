"""HadaCoreLinear: an `nn.Linear` whose weight is stored as int4."""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .. import int4
from ..errors import FormatError
from ..int4 import Int4Weight
from ..kernels.w4a16 import w4a16_linear
from ..kernels.w4a16_cpu import MAX_DECODE_TOKENS, CpuPackedWeight, pack_for_cpu, w4a16_decode_cpu
from ..kernels.w4a16_tiled import w4a16_tiled
from ..solvers.rtn import quantize_weight
from .local_shards import LocalShards
from .tile_order import TileOrdered, may_reorder_weights

if TYPE_CHECKING:
    from ..config import HadaCoreConfig
    from .linear_group import LinearGroup


class HadaCoreLinear(LocalShards, TileOrdered, nn.Linear):
    """y = x W^T + bias with W stored in the int4 format of `hf_hadacore.int4`.

    Only Parameters are held (no buffers), output-major, so that transformers' tensor
    parallelism can shard them; none of the int4 tensors requires a gradient. The gradient
    with respect to x is defined, so adapters can be trained on top.

    On a GPU whose kernels want another order of the nibbles, `weight` is kept in that order: `TileOrdered`.
    Under tensor parallelism the Parameters are this rank's part (`LocalShards`); `in_features` and
    `out_features` stay those of the whole.

    Attributes:
        weight: int32 ``[N, K/8]``; read it through `int4_weight`.
        weight_scale: floating point ``[N, ceil(K/g)]``.
        weight_zero: uint8 ``[N, ceil(K/g)]``, or None for a symmetric weight.
        input_perm: int32 ``[K]``: column i of the stored weight belongs to input ``input_perm[i]``, so that x
            is read as ``x[..., input_perm]``. None if the columns are in order.
        bias: ``[N]`` or None.
        group_size: g; -1 is one group per row.

    Args:
        in_features: K, a multiple of 8.
        out_features: N.
        bias: whether there is a bias.
        group_size: g.
        symmetric: whether z = 8 everywhere, so that no zeros are stored.
        input_perm: whether the columns are stored in an order of their own.
        dtype: of scales and bias.
        device: where the (uninitialized) Parameters are made.

    Raises:
        FormatError: K is not a multiple of 8.
    """

    # transformers' tensor parallelism: the quantized weight has to be made from the local shard.
    _hf_quantized_needs_local_tp = True

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        group_size: int,
        symmetric: bool,
        input_perm: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        nn.Module.__init__(self)
        if not int4.is_packable(in_features):
            raise FormatError(f"int4 rows need a number of inputs that is a multiple of 8, got {in_features}")
        self.in_features = in_features
        self.out_features = out_features
        self.group_size = group_size
        dtype = dtype or torch.get_default_dtype()
        groups = (out_features, int4.num_groups(in_features, group_size))

        def empty(shape: tuple[int, ...], dtype: torch.dtype) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)

        self.weight = empty((out_features, in_features // int4.NIBBLES_PER_WORD), torch.int32)
        self.weight_scale = empty(groups, dtype)
        self.register_parameter("weight_zero", None if symmetric else empty(groups, torch.uint8))
        self.register_parameter("input_perm", empty((in_features,), torch.int32) if input_perm else None)
        self.register_parameter("bias", empty((out_features,), dtype) if bias else None)
        self._cpu_weight: CpuPackedWeight | None = None
        self._group: LinearGroup | None = None

    @classmethod
    def from_linear(cls, linear: nn.Linear, config: "HadaCoreConfig", *, name: str = "") -> "HadaCoreLinear":
        """Quantize a linear layer (round to nearest on a searched grid).

        Args:
            linear: weight ``[N, K]`` in fp32, fp16 or bf16; it is left unchanged, the bias is shared.
            config: gives group size and symmetry.
            name: the layer's full name; `config.overrides` are looked up with it, errors show it.

        Raises:
            FormatError: K is not a multiple of 8.
            QuantizationError: the weight holds NaN or infinite values.
        """
        spec = config.layer_spec(name)
        layer = cls(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            group_size=spec.group_size,
            symmetric=spec.symmetric,
            dtype=linear.weight.dtype,
            device="meta",
        )
        with torch.no_grad():
            quantized = quantize_weight(
                linear.weight,
                group_size=spec.group_size,
                symmetric=spec.symmetric,
                name=f"{name or 'linear'}.weight",
            )
        layer.set_int4(quantized)
        layer.bias = linear.bias
        return layer.train(linear.training)

    def set_int4(self, weight: Int4Weight, input_perm: torch.Tensor | None = None) -> None:
        """Replace the weight.

        Args:
            weight: of the layer's shape and group size, symmetric or not as the layer is.
            input_perm: integer ``[K]``, the inputs that its columns belong to; None if they are in order.
        """
        self.weight = nn.Parameter(weight.packed, requires_grad=False)
        self.weight_scale = nn.Parameter(weight.scale, requires_grad=False)
        self.weight_zero = None if weight.zero is None else nn.Parameter(weight.zero, requires_grad=False)
        self.input_perm = (
            None if input_perm is None else nn.Parameter(input_perm.to(torch.int32), requires_grad=False)
        )

    def int4_weight(self) -> Int4Weight:
        """The weight in the format of `hf_hadacore.int4`; a view of the Parameters where that is possible.

        Its columns are in the order in which they are stored: see `input_perm`.
        """
        return self._ordered_weight("weight")

    def dequantize(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """The layer as an ordinary `nn.Linear` with the weight that is stored, its columns in natural order.

        Args:
            dtype: of weight and bias; default the dtype of the scales.
        """
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        weight = self.int4_weight().dequantize(dtype)
        if self.input_perm is not None:
            weight = torch.empty_like(weight).index_copy_(1, self.input_perm.long(), weight)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().to(linear.weight.dtype), requires_grad=False)
        return linear.train(self.training)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """y = x W^T + bias.

        Args:
            input: fp16, bf16 or fp32 ``[..., K]``.

        Returns:
            ``[..., N]`` in the dtype of `input`.
        """
        if not self._is_tiled:
            if self._decodes_on_cpu(input):
                x = input if self.input_perm is None else input.index_select(-1, self.input_perm)
                return w4a16_decode_cpu(x, self._weight_for_cpu(), self.bias)
            if may_reorder_weights():
                self.prepare()
        product = w4a16_tiled if self._is_tiled else w4a16_linear
        return product(
            input,
            self.weight,
            self.weight_scale,
            self.weight_zero,
            self.input_perm,
            self.bias,
            group_size=self.group_size,
        )

    def _decodes_on_cpu(self, input: torch.Tensor) -> bool:
        """Whether torch's int4 CPU kernel is the right one: fast for few bf16 rows, no backward."""
        return (
            input.device.type == "cpu"
            and input.dtype == torch.bfloat16
            and 0 < input.numel() <= MAX_DECODE_TOKENS * self.in_features
            and not (input.requires_grad and torch.is_grad_enabled())
        )

    def prepare(self) -> None:
        """Make what the forward pass of this layer's device needs, so that the first call is not slower.

        On the CPU torch's int4 kernel wants its own order of the nibbles: a second copy of the weight, 0.5
        byte each, made here or at the first call. On a Hopper GPU the weight itself is put in the order of
        `kernels.w4a16_tiles`. Elsewhere there is nothing to do.
        """
        if self.weight.device.type == "cpu" and self.weight_scale.dtype == torch.bfloat16:
            self._weight_for_cpu()
        else:
            self._use_tiles()

    def _weight_names(self) -> tuple[str, ...]:
        return ("weight",)

    def _restore_order(self) -> None:
        self._cpu_weight = None
        if self._is_tiled:
            self._group = None
        super()._restore_order()

    def _weight_for_cpu(self) -> CpuPackedWeight:
        if self._cpu_weight is not None:
            return self._cpu_weight
        packed = pack_for_cpu(self.int4_weight())
        # A layer whose weights accelerate brings in for each call must not keep a copy of them.
        if not self._is_offloaded():
            self._cpu_weight = packed
        return packed

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_cpu_weight": None, "_group": None}

    def extra_repr(self) -> str:
        kind = "symmetric" if self.weight_zero is None else "asymmetric"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, int4 {kind}, group_size={self.group_size}"
            + (", input_perm" if self.input_perm is not None else "")
        )
