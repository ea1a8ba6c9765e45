# SPDX-License-Identifier: Apache-2.0
"""Describes a stack of layers that can be pruned."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from clp_ros.checkpoints.units import UnitKind


@dataclass(frozen=True)
class LayerStack:
    """One stack of layers that can be pruned (doc/explanation/method.md: a prunable module).

    Attributes:
        name: Its name on the command line, in files and in topics.
        group: Modules of one group lose the same layers.
        layers: Number of layers that the checkpoint's config gives it.
        layer_prefix: Start of a layer's keys in the state dict, with ``{layer}`` for its index.
        layers_path: Attribute path from the policy to the layers' ``nn.ModuleList``.
        norm_path: Attribute path from the policy to the module that takes the last layer's output. Unused where
            ``probe`` is None.
        pattern_period: Layer kinds alternate with the layer index at this period: the j-th kept layer must have an
            index congruent to j modulo it. 1 if all layers are of one kind.
        last_output_unused: Whether the last layer's output is not used. Its score is then ignored.
        probe: Attribute of a layer whose input equals the layer's input, for families that call the parts of a layer
            without calling the layer, so that hooks on the layer do not run. None: layers are called, and their output
            is read (of a tuple, the first element).
        protected_layers: 0-based layers that must stay, because other code depends on their index.
        min_layers: Minimum number of layers that must be left, including ``protected_layers``.
        inner_units: For each layer, the kinds of units inside of it, with the number that config.json gives that layer.
            Such layers may differ in width. Empty: layers of one kind have equal shapes.
    """

    name: str
    group: str
    layers: int
    layer_prefix: str
    layers_path: str
    norm_path: str = ""
    pattern_period: int = 1
    last_output_unused: bool = False
    probe: str | None = "input_layernorm"
    protected_layers: frozenset[int] = frozenset()
    min_layers: int = 1
    inner_units: tuple[tuple[UnitKind, ...], ...] = ()

    @property
    def layer_units(self) -> UnitKind:
        """The layers, with the constraints on their removal."""
        return UnitKind("layers", self.layers, self.pattern_period, self.protected_layers, self.min_layers)


def group_units(stacks: Iterable[LayerStack]) -> dict[str, UnitKind]:
    """Returns the layers of each group's stacks, by group, with the constraints of all these stacks."""
    units: dict[str, UnitKind] = {}
    for stack in stacks:
        units[stack.group] = units.get(stack.group, stack.layer_units).joined(stack.layer_units)
    return units
