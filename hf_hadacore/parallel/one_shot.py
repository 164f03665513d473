"""Tensor-parallel models whose layers sum their partial products with `kernels.all_reduce`.

Each decoder layer has two row-parallel layers, o_proj and down_proj. transformers sums what they give over
the ranks with `torch.distributed.all_reduce`, which in decoding takes longer than reading the weights of a
small layer.
"""

from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.distributed.tensor_parallel import RowwiseParallel, replace_layer_number_by_wildcard

from .. import compat
from ..kernels.all_reduce import MAX_BYTES, all_reduce, prepare
from ..modules.linear import HadaCoreLinear


def use_one_shot_all_reduce(model: PreTrainedModel) -> bool:
    """Let the row-parallel int4 layers of a model sum small messages in one kernel.

    Every rank calls it, once, after `from_pretrained(distributed_config=...)`.

    Args:
        model: loaded.

    Returns:
        Whether anything was changed: the ranks must be 2, 4 or 8 NVIDIA GPUs of one host that reach each
        other's memory. The same on all ranks.
    """
    plan = compat.tensor_parallel_plan(model)
    changed = False
    for name, module in model.named_modules():
        if not isinstance(module, HadaCoreLinear) or "weight" not in module._layouts:
            continue
        mesh = module._layouts["weight"].device_mesh
        if plan.get(replace_layer_number_by_wildcard(name)) == "rowwise" and prepare(_group_of(mesh)):
            # In place of what transformers has installed.
            del module.forward
            _OneShotRowwise().install_forward(module, mesh)
            changed = True
    return changed


def _group_of(mesh: DeviceMesh) -> torch.distributed.ProcessGroup:
    return mesh.get_group() if mesh.ndim == 1 else mesh.get_group("tp")


class _OneShotRowwise(RowwiseParallel):
    """The style of a layer whose inputs are divided, and whose outputs are whole on every rank."""

    def transform_output_post_forward(self, module: Any, output: Any, mesh: DeviceMesh) -> torch.Tensor:
        if output.requires_grad or output.nbytes > MAX_BYTES:
            return super().transform_output_post_forward(module, output, mesh)
        output = all_reduce(output, _group_of(mesh))
        bias = module._parameters["bias"]
        if bias is None:
            return output
        return output + (bias.to_local() if isinstance(bias, DTensor) else bias)
