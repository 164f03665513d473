"""Few regexes for many module names, as `HadaCoreConfig.overrides` and `input_permutations` want them."""

import re
from collections.abc import Collection, Iterable


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
