"""Tiny models whose greedy texts depend on all they have seen, for comparisons of generated tokens."""

from typing import Any

import torch
from tiny_models import TINY_CONFIGS, make_model, token_ids
from transformers import AutoModelForCausalLM, PreTrainedModel

LENGTH = 9
WINDOW = 12


def varied_model(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model that writes varied texts and never stops.

    Args:
        name: as in `TINY_CONFIGS`; with "+sliding" the first of the two layers sees 12 tokens.
        dtype: of the weights.
    """
    kind, _, variant = name.partition("+")
    if variant:
        layer_types = ["sliding_attention", "full_attention"]
        config = TINY_CONFIGS[kind]()
        options = {**config.to_dict(), "sliding_window": WINDOW, "layer_types": layer_types}
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(type(config)(**options), dtype=dtype).eval()
    else:
        model = make_model(kind, dtype)
    # Initialized as usual they repeat the last token for ever, whatever attention sees.
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3)
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    model.config.tie_word_embeddings = False
    model.generation_config.eos_token_id = None
    return model


def left_padded(batch: int = 3) -> dict[str, torch.Tensor]:
    """Inputs of `generate` with 9, 6, 3, … tokens."""
    ids = token_ids(batch, LENGTH)
    mask = torch.ones_like(ids)
    for row in range(batch):
        mask[row, : 3 * row] = 0
    return {"inputs": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def plain(model: PreTrainedModel, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    """transformers' own `generate`."""
    return model.generate(ids, disable_compile=True, **options)
