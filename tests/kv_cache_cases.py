"""Models whose attention is in 8 bits, and what they compute with a cache."""

import torch
from tiny_models import TINY_CONFIGS, token_ids
from transformers import AutoModelForCausalLM, MistralConfig
from varied_models import LENGTH, varied_model

from hf_hadacore import HadaCoreCache

# A sum in another order may push a number of the second layer's over the edge between two 8-bit ones.
CLOSE = 0.01
MODELS = ["llama", "qwen3", "gemma3+sliding", "gpt-oss+sliding", "mistral"]


def hadacore_model(name: str, implementation: str = "hadacore"):
    if name == "mistral":
        torch.manual_seed(0)
        common = TINY_CONFIGS["llama"]().to_dict()
        keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        config = MistralConfig(**{key: common[key] for key in keys}, num_key_value_heads=2, sliding_window=12)
        model = AutoModelForCausalLM.from_config(config).eval()
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0, 0.3)
    else:
        model = varied_model(name)
    model.set_attn_implementation(implementation)
    return model


def logits_in_chunks(model, ids, chunks, cache=None, mask=None):
    """Logits of tokens that are read in several forward passes."""
    cache = HadaCoreCache(model.config) if cache is None else cache
    parts, start = [], cache.get_seq_length()
    position = 0
    with torch.no_grad():
        for chunk in chunks:
            end = position + chunk
            inputs = {} if mask is None else {"attention_mask": mask[:, : start + end].long()}
            if mask is not None:
                positions = (mask.long().cumsum(1) - 1).masked_fill(~mask, 0)
                inputs["position_ids"] = positions[:, start + position : start + end]
            parts.append(model(ids[:, position:end], past_key_values=cache, **inputs).logits)
            position = end
    return torch.cat(parts, 1)


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def generate(model, *, inputs=None, new=30, **options):
    inputs = {"inputs": token_ids(2, LENGTH)} if inputs is None else inputs
    return model.generate(**inputs, do_sample=False, max_new_tokens=new, **options)


def teacher_forced(model, tokens, prompt, mask=None):
    """Logits of each new token, from one pass over all of them that follows one over the prompt."""
    if mask is not None:
        mask = torch.nn.functional.pad(mask, (0, tokens.shape[1] - prompt), value=1).bool()
    logits = logits_in_chunks(model, tokens, (prompt, tokens.shape[1] - prompt), mask=mask)
    return logits[:, prompt - 1 : -1]
