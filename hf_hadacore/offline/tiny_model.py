"""A model of the same architecture that is small enough to be run just to see what it does."""

import copy
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import UnsupportedError
from ..probing import Random

# Of the residual stream; the first is that of `tiny_model`.
WIDTHS = (24, 40)
_NARROW = 16
_PROBE_TOKENS = 6


def tiny_config(config: PreTrainedConfig, width: int) -> PreTrainedConfig:
    """The same architecture, heads and layers; residual stream, MLPs and ranks of projections are narrow.

    Args:
        config: of the model.
        width: of the residual stream.
    """
    tiny: Any = copy.deepcopy(config)
    if getattr(tiny, "head_dim", None) is None:
        tiny.head_dim = tiny.hidden_size // tiny.num_attention_heads
    tiny.hidden_size = width
    for name, value in vars(config).items():
        if name.endswith(("intermediate_size", "lora_rank")) and value:
            is_list = isinstance(value, list | tuple)
            setattr(tiny, name, [_NARROW] * len(value) if is_list else _NARROW)
    tiny.tie_word_embeddings = False
    return tiny


def tiny_model(model: PreTrainedModel) -> PreTrainedModel:
    """A model of the same class in float64, its Parameters random.

    Args:
        model: on any device.

    Raises:
        UnsupportedError: its state has other names.
    """
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        tiny = type(model)._from_config(
            tiny_config(model.config, WIDTHS[0]),
            dtype=torch.float64,
            attn_implementation="eager",
            experts_implementation="eager",
        )
    random = Random(torch.float64)
    with torch.no_grad():
        for parameter in tiny.parameters():
            values = random(*parameter.shape)
            parameter.copy_(1 + 0.3 * values if values.dim() == 1 else values / values.shape[-1] ** 0.5)
    if tiny.state_dict().keys() != model.state_dict().keys():
        raise UnsupportedError("its tensors then have other names")
    tiny.requires_grad_(False)
    return tiny.eval()


def probe_logits(tiny: PreTrainedModel) -> torch.Tensor:
    """fp64 ``[1, tokens, V]`` of a few tokens."""
    ids = torch.arange(1, 1 + _PROBE_TOKENS, device="cpu")[None]
    with torch.no_grad():
        return tiny(input_ids=ids, use_cache=False).logits
