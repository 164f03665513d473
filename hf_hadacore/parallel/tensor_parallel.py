"""What of an int4 model lies on which rank, under the tensor parallelism of transformers.

transformers cuts Parameters as a model's plan says: "colwise" layers along their outputs, "rowwise" layers,
whose partial products are then summed over the ranks, along their inputs. int4 Parameters are output-major,
so that packed weights, scales and zeros are all cut in the same place. `complete_plan` checks that no group
is cut in two and says what has to be whole on every rank; `keep_local` is for after loading.

Why act-order needs nothing to be gathered: `permutation`.
"""

import re
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from .. import compat, int4
from ..attention.key_means import K_MEAN
from ..errors import ShardingError, UnsupportedError
from ..modules.experts import HadaCoreExperts
from ..modules.linear import HadaCoreLinear

_MAX_RANKS_LISTED = 64


def tensor_parallel_size(model: PreTrainedModel) -> int:
    """The number of ranks among which `from_pretrained(distributed_config=...)` divides a model."""
    return getattr(getattr(model.config, "distributed_config", None), "tp_size", None) or 1


def complete_plan(model: PreTrainedModel, *, on_the_fly: bool) -> None:
    """Check that a model can be divided as its plan says, and add to the plan what int4 modules need.

    Args:
        model: on meta, with int4 modules, not distributed yet.
        on_the_fly: whether the ranks quantize their own parts.

    Raises:
        ShardingError: naming a layer that this number of ranks cuts within a group, an int4 word or a head,
            or whose order of inputs goes across ranks, and the numbers of ranks that work.
        UnsupportedError: fused experts whose Parameters are input-major are to be quantized and divided.
    """
    ranks = tensor_parallel_size(model)
    if ranks == 1:
        return
    plan = compat.tensor_parallel_plan(model)
    for name, module in model.named_modules():
        rules: dict[str, str] = {}
        if isinstance(module, HadaCoreLinear):
            rules = _rules_of_linear(name, module, ranks, _style(plan, name), on_the_fly)
        elif isinstance(module, HadaCoreExperts):
            rules = _rules_of_experts(name, module, ranks, plan, on_the_fly)
        elif "k_proj" in module._modules and _style(plan, f"{name}.k_proj") == "colwise":
            _check_heads(name, module, ranks)
            if K_MEAN in module._parameters:
                rules = {K_MEAN: "colwise"}
        elif K_MEAN in module._parameters:
            rules = {K_MEAN: compat.REPLICATE}
        model._tp_plan.update({_generic(f"{name}.{leaf}"): style for leaf, style in rules.items()})  # type: ignore[union-attr]


def keep_local(model: PreTrainedModel) -> None:
    """Let the int4 modules of a loaded model hold their parts as plain tensors, which kernels can read.

    Args:
        model: loaded, distributed or not.
    """
    for name, module in model.named_modules():
        if not isinstance(module, HadaCoreLinear | HadaCoreExperts):
            continue
        mesh = next((p.device_mesh for p in module.parameters(recurse=False) if isinstance(p, DTensor)), None)
        if mesh is None:
            continue
        style = _style(compat.tensor_parallel_plan(model), name)
        module.keep_local_shards(joins=style == "colwise")
        if isinstance(module, HadaCoreExperts) and style == "moe_tp_experts":
            compat.sum_outputs(module, mesh)


def check_inputs(in_features: int, group_size: int, ranks: int, *, name: str) -> None:
    """Check that the columns of a weight can be divided among ranks without cutting a group or a word.

    Args:
        in_features: K.
        group_size: g, or -1: one group, of whose scale every rank has a copy.
        ranks: their number.
        name: of the layer, for the error.

    Raises:
        ShardingError: naming the layer, K, g and the numbers of ranks that work.
    """
    if _divides(in_features, group_size, ranks):
        return
    size = "one group" if group_size == -1 else f"groups of {group_size}"
    raise ShardingError(
        f"{name}: tp_size={ranks} would divide its {in_features} inputs within a group (they are quantized "
        f"in {size}, eight in a word); {_that_work(lambda n: _divides(in_features, group_size, n))}"
    )


def _divides(in_features: int, group_size: int, ranks: int) -> bool:
    if in_features % (ranks * int4.NIBBLES_PER_WORD):
        return False
    if ranks == 1 or int4.num_groups(in_features, group_size) == 1:
        return True
    return in_features // ranks % group_size == 0


def _that_work(works: Any) -> str:
    sizes = ", ".join(str(n) for n in range(1, _MAX_RANKS_LISTED + 1) if works(n))
    return f"sizes that work for it: {sizes}"


def _generic(name: str) -> str:
    """A name as plans spell it, with its layer numbers as ``*``."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def _style(plan: Mapping[str, str], name: str) -> str:
    return plan.get(_generic(name), "")


def _check_outputs(name: str, outputs: int, ranks: int) -> None:
    if outputs % ranks:
        raise ShardingError(
            f"{name}: its {outputs} outputs cannot be divided evenly by tp_size={ranks}; "
            f"{_that_work(lambda n: outputs % n == 0)}"
        )


def _check_heads(name: str, module: nn.Module, ranks: int) -> None:
    head_dim, k_proj = getattr(module, "head_dim", None), module.get_submodule("k_proj")
    if not isinstance(head_dim, int) or not isinstance(k_proj, nn.Linear):
        return
    heads = k_proj.out_features // head_dim
    if heads % ranks:
        raise ShardingError(
            f"{name}: its {heads} key/value heads cannot be divided evenly by tp_size={ranks}; "
            f"{_that_work(lambda n: heads % n == 0)}"
        )


def _check_single_group(name: str, module: HadaCoreLinear | HadaCoreExperts, on_the_fly: bool) -> None:
    """A scale of all ranks' inputs cannot be found by ranks that see their own inputs only."""
    if on_the_fly:
        raise ShardingError(
            f"{name}: with group_size={module.group_size} all its inputs share a scale, which ranks that "
            "hold a part of them cannot choose; use a smaller group, or quantize offline (hadacore quantize)"
        )


def _rules_of_linear(
    name: str, layer: HadaCoreLinear, ranks: int, style: str, on_the_fly: bool
) -> dict[str, str]:
    """Styles of a layer's Parameters that differ from the layer's own."""
    whole: list[str] = []
    if style.startswith("rowwise"):
        check_inputs(layer.in_features, layer.group_size, ranks, name=name)
        if layer.input_perm is not None:
            raise ShardingError(
                f"{name}: its inputs are read in an order (input_perm) that goes across the ranks of a "
                "rowwise layer; import it again with hadacore import --tensor-parallel, or load it with "
                "device_map instead of tp_size"
            )
        if layer.weight_scale.shape[-1] == 1:
            _check_single_group(name, layer, on_the_fly)
            whole = ["weight_scale", "weight_zero"]
    elif "colwise" in style:
        _check_outputs(name, layer.out_features, ranks)
        whole = ["input_perm"]
    return {leaf: compat.REPLICATE for leaf in whole if layer._parameters[leaf] is not None}


def _rules_of_experts(
    name: str, module: HadaCoreExperts, ranks: int, plan: Mapping[str, str], on_the_fly: bool
) -> dict[str, str]:
    """Styles of scales and zeros, which no plan knows."""
    rules: dict[str, str] = {}
    for projection in module.projections:
        full_name = f"{name}.{projection}"
        style = _style(plan, full_name)
        if style not in ("colwise", "packed_colwise", "rowwise"):
            continue
        if module.is_transposed:
            raise UnsupportedError(
                f"{full_name}: {type(module).__name__} keeps its weights input-major, and the plan divides "
                "them; load with device_map instead of tp_size, or skip it (modules_to_not_convert)"
            )
        _, rows, words = module.get_parameter(projection).shape
        if style == "rowwise":
            check_inputs(words * int4.NIBBLES_PER_WORD, module.group_size, ranks, name=full_name)
            if module._group_values(projection)[0].shape[-1] == 1:
                _check_single_group(full_name, module, on_the_fly)
                style = compat.REPLICATE
        else:
            _check_outputs(full_name, rows // (2 if style == "packed_colwise" else 1), ranks)
        for suffix in ("_scale", "_zero"):
            if module._parameters[projection + suffix] is not None:
                rules[projection + suffix] = style
    return rules
