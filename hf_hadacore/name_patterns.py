"""Names of modules as `HadaCoreConfig` has them, and few regexes for many."""

import re
from collections.abc import Collection, Iterable

from transformers import PreTrainedModel


def name_patterns(names: Iterable[str], among: Collection[str]) -> list[str]:
    """Regexes that match the given names and no others: one for all layers where that works.

    Args:
        names: full names of modules.
        among: all names that the regexes will meet.

    Returns:
        Sorted, anchored at both ends.
    """
    wanted = set(names)
    patterns = set()
    for name in wanted:
        exact = f"^{re.escape(name)}$"
        any_layer = re.sub(r"(?<=\\\.)\d+(?=\\\.)", r"\\d+", exact)
        alike = {other for other in among if re.search(any_layer, other)}
        patterns.add(any_layer if alike <= wanted else exact)
    return sorted(patterns)


def name_prefix(model: PreTrainedModel) -> str:
    """What comes before the names of a model's modules in options, which name those of the whole model.

    Args:
        model: any.

    Returns:
        "" for a whole model; for its base model alone (`AutoModel`) what the whole one calls it: "model.".
    """
    is_base = bool(model.base_model_prefix) and model.base_model is model
    return f"{model.base_model_prefix}." if is_base else ""
