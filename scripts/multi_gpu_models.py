"""Models with random weights on one GPU or several."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from benchmark_generate import llama_8b
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig
from transformers.distributed import DistributedConfig

ATTENTION = {"bf16": "sdpa", "8-bit": "hadacore-int8-fp8"}


def llama_70b(layers: int) -> LlamaConfig:
    return LlamaConfig(
        **llama_8b(layers).to_diff_dict()
        | {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64}
    )


def tiny(layers: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=256,
        intermediate_size=512,
        num_attention_heads=8,
        num_key_value_heads=4,
        num_hidden_layers=layers,
        vocab_size=512,
        tie_word_embeddings=False,
    )


SHAPES = {"llama-8b": llama_8b, "llama-70b": llama_70b, "tiny": tiny}
LAYERS = {"llama-8b": 32, "llama-70b": 80, "tiny": 2}


def device_name() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def load(folder: Path, attention: str, place: str) -> Any:
    """A model of a checkpoint.

    Args:
        folder: of the checkpoint.
        attention: one of `ATTENTION`.
        place: "one" device, "auto" or "spread" over all, or "ranks" of this process group.
    """
    where: dict[str, Any] = {"device_map": {"": device_name()}}
    if place == "auto":
        where = {"device_map": "auto"}
    elif place == "spread":
        where = {"device_map": spread_layers(AutoConfig.from_pretrained(folder).num_hidden_layers)}
    elif place == "ranks":
        where = {"distributed_config": DistributedConfig(tp_size=dist.get_world_size())}
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, attn_implementation=ATTENTION[attention], **where
    ).eval()


def spread_layers(layers: int) -> dict[str, int]:
    """A device_map with as many layers on every GPU."""
    gpus = torch.cuda.device_count()
    first, last = ("model.embed_tokens", "model.rotary_emb"), ("model.norm", "lm_head")
    inner = {f"model.layers.{i}": i * gpus // layers for i in range(layers)}
    return dict.fromkeys(first, 0) | inner | dict.fromkeys(last, gpus - 1)
