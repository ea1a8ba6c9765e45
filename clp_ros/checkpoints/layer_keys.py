# SPDX-License-Identifier: Apache-2.0
"""Assigns tensors to the layers of a layer stack, and checks that no layer is missing."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count

from clp_ros.checkpoints.layer_stack import LayerStack
from clp_ros.checkpoints.units import UnitKind
from clp_ros.core.errors import ClpError

_HINT = "give a complete copy of the checkpoint"


@dataclass(frozen=True)
class LayerKey:
    """The parts of a tensor's name.

    Attributes:
        module: Name of the module.
        layer: Index of the layer in the module.
        rest: The name after the layer's prefix, e.g. ``self_attn.k_proj.weight``.
    """

    module: str
    layer: int
    rest: str


class LayerKeys:
    """Splits tensor names by the ``layer_prefix`` of the layer stacks.

    Args:
        modules: The prunable modules.
        where: The checkpoint, for the error.
    """

    def __init__(self, modules: tuple[LayerStack, ...], where: object = None) -> None:
        self._where = where
        self._heads = []
        for module in modules:
            head, _, tail = module.layer_prefix.partition("{layer}")
            # Canonical decimal numbers only: "01" would collide with "1" once renumbered.
            number = re.compile(rf"(0|[1-9][0-9]{{0,5}}){re.escape(tail)}(.+)")
            self._heads.append((module, head, number, tail))

    def split(self, name: str) -> LayerKey | None:
        """Splits a name. Returns None for a tensor outside all prunable layers.

        Raises:
            ClpError: The name has a layer stack's prefix, but no layer number.
        """
        for module, head, number, _ in self._heads:
            if name.startswith(head):
                match = number.fullmatch(name, len(head))
                if match is None:
                    raise ClpError(
                        f"tensor {name[:200]} has no layer number of {module.name}", where=self._where, hint=_HINT
                    )
                return LayerKey(module.name, int(match[1]), match[2])
        return None

    def rename(self, name: str, numbers: Mapping[str, Mapping[int, int]]) -> str | None:
        """Returns the name with its layer renumbered; None if the layer is not in ``numbers[module]``."""
        for module, head, number, tail in self._heads:
            if name.startswith(head) and (match := number.fullmatch(name, len(head))):
                layer = numbers[module.name].get(int(match[1]))
                return None if layer is None else f"{head}{layer}{tail}{match[2]}"
        return name


def check_layers(modules: tuple[LayerStack, ...], shapes: Mapping[str, tuple[int, ...]], where: object) -> None:
    """Checks that a checkpoint has exactly the layers of its config, and that layers of one kind have equal tensors.

    Args:
        modules: The layer stacks, with the number of layers from config.json.
        shapes: Shape of every tensor. Tied tensors are listed under each of their names.
        where: The checkpoint, for the error.

    Raises:
        ClpError: A layer is missing or too many, lacks, adds or reshapes a tensor against its peers, or is not as wide
            as config.json says.
    """
    keys = LayerKeys(modules, where)
    layers: dict[str, dict[int, dict[str, tuple[int, ...]]]] = {module.name: {} for module in modules}
    for name, shape in shapes.items():
        if key := keys.split(name):
            layers[key.module].setdefault(key.layer, {})[key.rest] = shape
    for module in modules:
        found = layers[module.name]
        _check_numbering(module, found, where)
        for layer, units in enumerate(module.inner_units):
            found[layer] = _check_widths(f"layer {layer} of {module.name}", units, found[layer], where)
        for kind in range(min(module.pattern_period, module.layers)):
            _check_peers(
                module, {layer: found[layer] for layer in range(kind, module.layers, module.pattern_period)}, where
            )


def _check_numbering(module: LayerStack, found: Mapping[int, object], where: object) -> None:
    present = next(layer for layer in count() if layer not in found)  # layers 0 ... present-1 are there without a gap
    if present == len(found) and present < module.layers:
        raise ClpError(
            f"config.json gives {module.name} {module.layers} layers, but the weights hold {present}",
            where=where,
            hint=_HINT,
        )
    if present < module.layers:
        raise ClpError(f"layer {present} of {module.name} is missing", where=where, hint=_HINT)
    if len(found) > module.layers:
        extra = min(layer for layer in found if layer >= module.layers)
        raise ClpError(
            f"the weights hold layer {extra} of {module.name}, but config.json gives it {module.layers} layers",
            where=where,
            hint="give the config.json that was saved with these weights",
        )


def _check_widths(
    place: str, units: tuple[UnitKind, ...], tensors: Mapping[str, tuple[int, ...]], where: object
) -> dict[str, tuple[int, ...]]:
    """Checks the sizes that config.json gives a layer; returns its shapes with -1 for these, to compare them."""
    shapes = dict(tensors)
    for kind in units:
        for rest, dimension in kind.dimensions.items():
            if rest not in shapes:  # an error where its peers have it
                continue
            shape = list(shapes[rest])
            if dimension >= len(shape) or shape[dimension] != kind.count * kind.size:
                raise ClpError(
                    f"{place} has {rest} of shape {shape}, but config.json gives it {kind.count} {kind.name}",
                    where=where,
                    hint=_HINT,
                )
            shape[dimension] = -1
            shapes[rest] = tuple(shape)
    return shapes


def _check_peers(module: LayerStack, peers: Mapping[int, Mapping[str, tuple[int, ...]]], where: object) -> None:
    holders = Counter(rest for tensors in peers.values() for rest in tensors)
    usual = {}
    for rest, number in holders.items():
        if number * 2 >= len(peers):
            usual[rest] = Counter(tensors[rest] for tensors in peers.values() if rest in tensors).most_common(1)[0][0]
    for layer, tensors in peers.items():
        place = f"layer {layer} of {module.name}"
        if missing := sorted(usual.keys() - tensors.keys()):
            raise ClpError(f"{place} lacks {missing[0]}, which the other layers have", where=where, hint=_HINT)
        for rest, shape in tensors.items():
            if rest not in usual:
                raise ClpError(f"{place} holds {rest}, which the other layers lack", where=where, hint=_HINT)
            if shape != usual[rest]:
                raise ClpError(
                    f"{place} has {rest} of shape {list(shape)}, the other layers {list(usual[rest])}",
                    where=where,
                    hint=_HINT,
                )
