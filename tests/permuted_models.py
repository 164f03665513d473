"""Models whose weights were quantized with random orders of their inputs."""

import torch
from torch import nn

from hf_hadacore import HadaCoreConfig, HadaCoreLinear
from hf_hadacore.parallel.permutation import PermutationGroup, permute_inputs, permute_outputs
from hf_hadacore.parallel.permutation_search import permutation_groups
from hf_hadacore.solvers.rtn import quantize_weight


def random_order(group: PermutationGroup, k: int) -> torch.Tensor:
    """An order of k inputs that the group allows."""
    block, repeats = group.head_dim or k, group.repeats
    heads = torch.stack([torch.randperm(block) for _ in range(k // (block * repeats))])
    return (heads.repeat_interleave(repeats, 0) + torch.arange(0, k, block)[:, None]).flatten()


def quantize_permuted(model: nn.Module, *, baked: bool) -> dict[str, torch.Tensor]:
    """Quantize all layers, their inputs in random orders, the same every time.

    Args:
        model: with `nn.Linear`; becomes int4 except for its head.
        baked: put producers' rows in the order of their consumers' inputs; otherwise consumers read their
            inputs in that order.

    Returns:
        The orders, by consumer.
    """
    torch.manual_seed(1)
    config = HadaCoreConfig(group_size=32)
    orders: dict[str, torch.Tensor] = {}
    groups = permutation_groups(model)
    for group in groups:
        order = random_order(group, model.get_submodule(group.consumers[0]).in_features)
        orders.update(dict.fromkeys(group.consumers, order))
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name != "lm_head":
            layer = HadaCoreLinear.from_linear(module, config, name=name)
            order = orders.get(name)
            if order is not None:
                weight = permute_inputs(module.weight.detach(), order)
                layer.set_int4(quantize_weight(weight, group_size=32, symmetric=False), order)
            model.set_submodule(name, layer)
    if baked:
        for group in groups:
            _bake(model, group, orders[group.consumers[0]])
    return orders


def _bake(model: nn.Module, group: PermutationGroup, order: torch.Tensor) -> None:
    for name in group.producers:
        producer = model.get_submodule(name)
        rows = group.output_order(order, producer.out_features)
        weight, bias = permute_outputs(producer.int4_weight(), producer.bias, rows)
        producer.set_int4(weight, producer.input_perm)
        producer.bias = None if bias is None else nn.Parameter(bias)
    if group.producers:
        for name in group.consumers:
            consumer = model.get_submodule(name)
            consumer.set_int4(consumer.int4_weight())
