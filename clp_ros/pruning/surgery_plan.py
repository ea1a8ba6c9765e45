# SPDX-License-Identifier: Apache-2.0
"""What a removal leaves of a checkpoint: its tensors, their byte ranges, its config.json. Nothing is written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

from clp_ros.checkpoints.layer_keys import LayerKeys
from clp_ros.checkpoints.layer_stack import LayerStack
from clp_ros.checkpoints.safetensors_header import DTYPE_BITS, TensorInfo, encode_header
from clp_ros.core.errors import ClpError
from clp_ros.policies.checkpoint import CONFIG_FILE, INDEX_FILE, MANIFEST_FILE, Checkpoint
from clp_ros.pruning.byte_ranges import PAGE


@dataclass(frozen=True)
class SurgeryPlan:
    """What a removal leaves of a checkpoint, before anything is written.

    Attributes:
        checkpoint: The source.
        removal: Layers that go, by module, sorted; every module is in it.
    """

    checkpoint: Checkpoint
    removal: Mapping[str, tuple[int, ...]]

    @cached_property
    def kept(self) -> dict[str, tuple[int, ...]]:
        """Layers that stay, by module, in the source's numbers."""
        return {
            name: tuple(layer for layer in range(count) if layer not in self.removal[name])
            for name, count in self.checkpoint.layers.items()
        }

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json with the depths that are left. Raises ClpError where the family cannot be so shallow."""
        depths = {name: len(kept) for name, kept in self.kept.items()}
        return self.checkpoint.family.with_depths(self.checkpoint.config, depths)

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """The tensors that stay under their new names, in the order they are written.

        A shared tensor that was stored under the name of a removed layer is stored under its first other name.
        """
        source = self.checkpoint
        names: dict[str, list[str]] = {stored: [stored] for stored in source.tensors}
        for name, stored in sorted(source.shared.items()):
            names[stored].append(name)
        renamed = {}
        for stored, tensor in source.tensors.items():
            if staying := [new for name in names[stored] if (new := self._rename(name)) is not None]:
                renamed[staying[0]] = tensor
        # Wide elements first, as safetensors writes them: then every tensor starts at a multiple of its element's size
        # whatever was cut out before it. The sort is stable, so neighbours stay neighbours.
        return dict(sorted(renamed.items(), key=lambda item: -DTYPE_BITS[item[1].dtype]))

    @cached_property
    def metadata(self) -> dict[str, str]:
        """The ``__metadata__`` strings: tensor names in it renumbered, entries about removed tensors left out."""
        source = self.checkpoint
        stored_as = {id(tensor): name for name, tensor in self.tensors.items()}
        notes = {}
        for name, value in source.metadata.items():
            new_name = self._rename(name)
            is_shared = name in source.shared
            new_value = stored_as.get(id(source.tensors[value])) if is_shared else self._rename(value)
            if new_name is None or new_value is None or (is_shared and new_name == new_value):
                continue
            notes[new_name] = new_value
        return notes

    @property
    def parameters(self) -> int:
        """Number of parameters that stay."""
        return sum(tensor.elements for tensor in self.tensors.values())

    @cached_property
    def header(self) -> bytes:
        """Header of the weight file that will be written.

        It is as long as puts most bytes at the place within a page that they have in the source (:data:`PAGE`).
        """
        aligned, position = Counter({0: 0}), 0
        for _, start, end in self.ranges():
            shift = (start - position) % PAGE
            if shift % 8 == 0:  # the data has to start at a multiple of 8
                aligned[shift] += end - start
            position += end - start
        return encode_header(self.tensors.items(), self.metadata, PAGE, aligned.most_common(1)[0][0])

    def ranges(self) -> Iterator[tuple[str, int, int]]:
        """The byte ranges to copy, as (file, start, end), neighbours merged."""
        pending: tuple[str, int, int] | None = None
        for tensor in self.tensors.values():
            if pending and (tensor.file, tensor.start) == (pending[0], pending[2]):
                pending = (tensor.file, pending[1], tensor.end)
                continue
            if pending:
                yield pending
            pending = (tensor.file, tensor.start, tensor.end)
        if pending:
            yield pending

    def copied_files(self) -> dict[str, int]:
        """Size of every file that is taken over as it is."""
        rewritten = {CONFIG_FILE, INDEX_FILE, MANIFEST_FILE, *self.checkpoint.weight_files}
        return {name: size for name, size in self.checkpoint.files.items() if name not in rewritten}

    @cached_property
    def bytes(self) -> int:
        """Bytes that will be copied (all that is written, but the rewritten JSON files)."""
        weights = sum(tensor.bytes for tensor in self.tensors.values())
        return len(self.header) + weights + sum(self.copied_files().values())

    @cached_property
    def _keys(self) -> LayerKeys:
        return LayerKeys(self.checkpoint.modules)

    @cached_property
    def _numbers(self) -> dict[str, dict[int, int]]:
        return {name: {layer: new for new, layer in enumerate(kept)} for name, kept in self.kept.items()}

    def _rename(self, name: str) -> str | None:
        return self._keys.rename(name, self._numbers)


def plan_surgery(checkpoint: Checkpoint, removal: Mapping[str, Sequence[int]]) -> SurgeryPlan:
    """Checks a removal against the structure of a checkpoint.

    Args:
        checkpoint: The source.
        removal: 0-based layers to remove, by module. Modules of one group lose the same layers: naming one of them
            names all. A module without an entry loses none, unless its group has one.

    Raises:
        ClpError: A module is unknown; layers are out of range, repeated, all of them, or none at all; the modules of a
            group disagree; a layer has to stay; or those left would not alternate in kind as before.
    """
    known = checkpoint.layers
    for name in removal:
        if name not in known:
            raise ClpError(f"there is no module {name!r}", where=checkpoint.path, fix=f"use one of: {', '.join(known)}")
    groups = sorted(checkpoint.modules, key=lambda module: module.group)
    resolved: dict[str, tuple[int, ...]] = {}
    for group, members in groupby(groups, key=lambda module: module.group):
        modules = tuple(members)
        named = {
            module.name: _checked_layers(module, removal[module.name]) for module in modules if module.name in removal
        }
        fixed = frozenset().union(*(module.protected_layers for module in modules))
        if len(set(named.values())) > 1:
            sets = {one for layers in named.values() if layers for one in _nearest(modules[0], fixed, layers, 1)}
            raise ClpError(
                f"the modules of the group {group} must lose the same layers, not "
                + " and ".join(f"{name} {list(layers)}" for name, layers in named.items()),
                fix=f"name one set for the group{', as ' * bool(sets)}{' or '.join(sorted(sets))}",
            )
        layers = next(iter(named.values()), ())
        for module in modules:
            _check_structure(module, fixed, layers)
            resolved[module.name] = layers
    if not any(resolved.values()):
        raise ClpError("no layer to remove is given", fix=f"name layers of: {', '.join(known)}")
    return SurgeryPlan(checkpoint, {name: resolved[name] for name in known})


def _checked_layers(module: LayerStack, layers: Sequence[int]) -> tuple[int, ...]:
    where = f"module {module.name}"
    for layer in layers:
        if isinstance(layer, bool) or not hasattr(layer, "__index__"):
            raise ClpError(f"{layer!r} is no layer number", where=where, fix="give 0-based layer numbers")
        if not 0 <= layer < module.layers:
            raise ClpError(f"there is no layer {layer}", where=where, fix=f"its layers are 0 to {module.layers - 1}")
    unique = sorted({int(layer) for layer in layers})
    if len(unique) != len(layers):
        raise ClpError(f"a layer is named twice in {sorted(layers)}", where=where, fix="name each layer once")
    if len(unique) == module.layers:
        raise ClpError("no layer would be left", where=where, fix="leave at least one")
    return tuple(unique)


def _check_structure(module: LayerStack, fixed: frozenset[int], layers: Sequence[int]) -> None:
    kept = [layer for layer in range(module.layers) if layer not in layers]
    if staying := sorted(fixed.intersection(layers)):
        fault = f"layers {_listed(staying)} of {module.name} have to stay: something else depends on where they stand"
    elif any((layer - place) % module.pattern_period for place, layer in enumerate(kept)):
        fault = (
            f"without layers {_listed(layers)} the {module.pattern_period} kinds of layers of {module.name} would not "
            "alternate as before, and nothing could load the result"
        )
    else:
        return
    near = _nearest(module, fixed, layers)
    raise ClpError(fault, fix=f"remove {' or '.join(near)}" if near else f"remove nothing from {module.name}")


def _nearest(module: LayerStack, fixed: frozenset[int], layers: Sequence[int], limit: int = 4) -> list[str]:
    from clp_ros.pruning.selection import nearest_allowed  # needs numpy: half the start of a process, for an error only

    return [_listed(near) for near in nearest_allowed(layers, module.layers, module.pattern_period, limit, fixed)]


def _listed(layers: Sequence[int]) -> str:
    return ",".join(map(str, layers))
