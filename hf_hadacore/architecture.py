"""Which model a checkpoint holds: its config, and one of transformers' own classes for it."""

import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from .config import QUANT_METHOD, HadaCoreConfig
from .errors import CheckpointError


def read_config_file(folder: Path) -> dict[str, Any]:
    """The content of a checkpoint's config.json.

    Args:
        folder: local checkpoint.

    Raises:
        CheckpointError: it is missing or no JSON object.
    """
    file = folder / "config.json"
    try:
        content = json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: found no config.json") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: must be a JSON object, found {type(content).__name__}")
    return content


def read_recipe(folder: Path) -> HadaCoreConfig:
    """How a hadacore checkpoint was quantized.

    Args:
        folder: local checkpoint.

    Raises:
        CheckpointError: it is none, or has no readable config.json.
        ConfigError: it has options that this version does not know.
    """
    recipe = read_config_file(folder).get("quantization_config")
    if not isinstance(recipe, dict) or recipe.get("quant_method") != QUANT_METHOD:
        method = recipe.get("quant_method") if isinstance(recipe, dict) else recipe
        raise CheckpointError(
            f"{folder}: is no hadacore checkpoint (quant_method {method!r}); `hadacore quantize` makes one"
        )
    return HadaCoreConfig(**recipe)


def load_model_config(folder: Path, *, quantized: bool = False) -> PreTrainedConfig:
    """The config of a checkpoint's full-precision model.

    Args:
        folder: local checkpoint.
        quantized: whether the checkpoint is; what its config says about that is left out.

    Raises:
        CheckpointError: there is no readable config.json, transformers does not know the model type
            (code that comes with a checkpoint is never run), or the checkpoint is quantized already.
    """
    content = read_config_file(folder)
    parts = [content, *(part for part in content.values() if isinstance(part, dict))]
    for part in parts:
        recipe = part.get("quantization_config")
        if recipe is not None and not quantized:
            method = recipe.get("quant_method") if isinstance(recipe, dict) else recipe
            raise CheckpointError(
                f"{folder}: is already quantized (quant_method {method!r}); quantize the full-precision "
                "checkpoint that it was made from"
            )
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # hostile values fail in many ways
        raise CheckpointError(f"{folder}: transformers cannot read its config.json: {error}") from error
    for part in (config, config.get_text_config()):
        vars(part).pop("quantization_config", None)
    return config


def find_model_class(config: PreTrainedConfig, folder: Path) -> type[PreTrainedModel]:
    """The class that `config.architectures` names, among transformers' own for this type of config.

    Args:
        config: of the model.
        folder: named in errors.

    Raises:
        CheckpointError: transformers has no such class for this model type.
    """
    classes: dict[str, type[PreTrainedModel]] = {}
    for table_name in sorted(vars(modeling_auto)):
        if not (table_name.startswith("MODEL_") and table_name.endswith("MAPPING")):
            continue
        table = getattr(modeling_auto, table_name)
        if type(config) not in table:
            continue
        found = table[type(config)]
        for model_class in found if isinstance(found, tuple) else (found,):
            classes[model_class.__name__] = model_class
    architecture = next(iter(config.architectures or ()), None)
    if architecture is None:
        architecture = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    if architecture in classes:
        return classes[architecture]
    raise CheckpointError(
        f"{folder}: config.json names the architecture {architecture!r}, which is none of transformers' "
        f"classes for {config.model_type!r}: {', '.join(sorted(classes)) or 'there are none'}"
    )
