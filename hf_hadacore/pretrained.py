"""A checkpoint as commands load it: model and tokenizer, with typed errors."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .architecture import read_config_file
from .attention.operands import ATTENTION_NAMES
from .errors import CheckpointError, ConfigError, HadaCoreError
from .integrity import checkpoint_files, verify_files
from .offline.checkpoint import find_source


def load_pretrained(
    source: str,
    *,
    device: str | None = None,
    dtype: str | None = None,
    attention: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The causal language model of a checkpoint, and its tokenizer.

    Args:
        source: a folder or a model id; quantized or not.
        device: "cpu", "cuda", "cuda:1"; None takes a GPU if there is one, "auto" spreads over all.
        dtype: of activations and unquantized weights, e.g. "float32"; None takes the checkpoint's.
        attention: "fp8" or "int8-fp8" for 8-bit attention; None for the checkpoint's.

    Raises:
        ConfigError: there is no such attention, or dtype.
        CheckpointError: there is no such checkpoint, it is damaged, has no tokenizer, or cannot be loaded.
    """
    if attention not in (None, *ATTENTION_NAMES):
        raise ConfigError(f"attention must be one of {tuple(ATTENTION_NAMES)}, got {attention!r}")
    if dtype is not None and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ConfigError(f"dtype must be a name like 'bfloat16' or 'float32', got {dtype!r}")
    folder = find_source(source)
    read_config_file(folder)
    verify_files(checkpoint_files(folder))
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    options: dict[str, Any] = {"device_map": place if place == "auto" else {"": place}}
    if dtype is not None:
        options["dtype"] = getattr(torch, dtype)
    if attention is not None:
        options["attn_implementation"] = ATTENTION_NAMES[attention]
    what = "has no tokenizer that transformers can read"
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        what = "cannot be loaded"
        model = AutoModelForCausalLM.from_pretrained(folder, **options)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        if isinstance(error, HadaCoreError | torch.OutOfMemoryError):
            raise
        raise CheckpointError(f"{source}: {what}: {' '.join(str(error).split())}") from error
    return model.eval(), tokenizer
