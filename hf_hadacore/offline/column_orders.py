"""In which order GPTQ quantizes the columns of each weight of a model, and where that order is kept."""

from collections.abc import Collection, Iterable
from typing import NamedTuple

import torch

from ..name_patterns import name_patterns
from ..parallel.permutation import PermutationGroup
from ..solvers.act_order import falling_diagonal


class ColumnOrder(NamedTuple):
    """The order of one weight's columns.

    Attributes:
        by_energy: by falling activation energy; otherwise one after the other.
        forms_groups: groups are formed in that order; otherwise they are of neighbours, as without.
        within, repeats: where channels may move, see `falling_diagonal`.
    """

    by_energy: bool
    forms_groups: bool = False
    within: int | None = None
    repeats: int = 1

    def of(self, hessian: torch.Tensor) -> torch.Tensor | None:
        """int64 ``[K]`` for an input's Hessian; None for the natural order."""
        return falling_diagonal(hessian, within=self.within, repeats=self.repeats) if self.by_energy else None


class ColumnOrders:
    """The orders of all weights.

    What `permutation_groups` does not name keeps its groups of neighbours: its columns have to stay in place.

    Args:
        act_order: False, "static" or "permuted", see `HadaCoreConfig`.
        groups: of the model; only needed for "permuted".
        quantized: the weights that GPTQ quantizes, named as in the groups.

    Attributes:
        stored: those whose order is kept beside them, as `input_perm`.
    """

    def __init__(self, act_order: bool | str, groups: Iterable[PermutationGroup], quantized: Collection[str]):
        self._act_order = act_order
        self._quantized = quantized
        self._baked: dict[str, PermutationGroup] = {}
        self.stored: set[str] = set()
        if act_order != "permuted":
            return
        for group in groups:
            if not group.producers:
                self.stored |= {name for name in group.consumers if name in quantized}
            elif all(name in quantized for name in group.consumers):
                self._baked.update(dict.fromkeys(group.consumers, group))

    def order(self, name: str) -> ColumnOrder:
        """The order of a weight."""
        group = self._baked.get(name)
        if group is not None:
            return ColumnOrder(True, True, group.head_dim, group.repeats)
        return ColumnOrder(self._act_order is not False, name in self.stored)

    def baked(self, name: str) -> PermutationGroup | None:
        """The group whose producers get a weight's order; None if there is none."""
        return self._baked.get(name)

    def patterns(self) -> list[str]:
        """`HadaCoreConfig.input_permutations` for the stored ones: one for all layers where that works."""
        return name_patterns(self.stored, self._quantized)
