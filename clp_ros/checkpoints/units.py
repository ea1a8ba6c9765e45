# SPDX-License-Identifier: Apache-2.0
"""Describes the units that can be removed from a layer stack: layers, or units inside of a layer (channels, heads)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class UnitKind:
    """Units of one kind, with the constraints on their removal.

    Attributes:
        name: Plural, as clp.json names them: ``layers``, ``channels``, ``heads``.
        count: Number of units: in the stack for layers, in one layer for all others.
        pattern_period: The j-th kept unit must have an index congruent to j modulo it.
        protected: 0-based units that may not be removed.
        min_left: Minimum number of units that must be left.
        dimensions: For units inside of a layer: the dimension of the units, by the tensor's name without the layer's
            prefix, e.g. ``{"mlp.up_proj.weight": 0, "mlp.down_proj.weight": 1}``. Empty for layers, which are
            whole tensors.
        size: Number of elements of a unit along that dimension.
    """

    name: str
    count: int
    pattern_period: int = 1
    protected: frozenset[int] = frozenset()
    min_left: int = 1
    dimensions: Mapping[str, int] = field(default_factory=dict)
    size: int = 1

    def joined(self, other: UnitKind) -> UnitKind:
        """Returns these units with the constraints of both, for stacks of equal depth that lose the same units."""
        protected, min_left = self.protected | other.protected, max(self.min_left, other.min_left)
        return replace(self, protected=protected, min_left=min_left)

    def without(self, removed: Collection[int]) -> tuple[int, ...]:
        """Returns the units that stay."""
        gone = frozenset(removed)
        return tuple(unit for unit in range(self.count) if unit not in gone)

    def keeps_pattern(self, removed: Collection[int]) -> bool:
        """Returns whether the kept units alternate in kind as before."""
        return all((unit - place) % self.pattern_period == 0 for place, unit in enumerate(self.without(removed)))
