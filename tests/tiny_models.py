"""Tiny random models of the architectures we support, in bf16."""

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    LlamaConfig,
    MixtralConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3MoeConfig,
)

VOCAB_SIZE = 96
# 104 is no multiple of a group and 48 is below one: short groups are the rule here.
_COMMON = dict(
    vocab_size=VOCAB_SIZE,
    hidden_size=64,
    intermediate_size=104,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=0,
)

TINY_CONFIGS = {
    "llama": lambda: LlamaConfig(**_COMMON, tie_word_embeddings=False),
    "llama-tied": lambda: LlamaConfig(**_COMMON, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**_COMMON, head_dim=16),
    "gemma3": lambda: Gemma3TextConfig(**_COMMON, head_dim=16),
    "mixtral": lambda: MixtralConfig(**_COMMON, num_local_experts=4),
    "qwen3-moe": lambda: Qwen3MoeConfig(
        **_COMMON, num_experts=4, moe_intermediate_size=48, head_dim=16, num_experts_per_tok=2
    ),
    "gpt-oss": lambda: GptOssConfig(
        **_COMMON,
        num_local_experts=4,
        head_dim=16,
        num_experts_per_tok=2,
        layer_types=["full_attention"] * 2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
}
MOE = ("mixtral", "qwen3-moe", "gpt-oss")


def make_model(name: str, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """A model with seeded random weights; norms and biases are not left at their constant defaults."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(TINY_CONFIGS[name](), dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.normal_(1, 0.1)
            elif parameter.std() == 0:
                parameter.normal_(0, 0.02)
    return model


def token_ids(batch: int = 2, length: int = 9) -> torch.Tensor:
    return torch.randint(1, VOCAB_SIZE, (batch, length), generator=torch.Generator().manual_seed(1))
