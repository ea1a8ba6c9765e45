# SPDX-License-Identifier: Apache-2.0
"""Plans which units of which stack stay, and the resulting tensors and config. Nothing is written."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from clp_ros.checkpoints.folder import CONFIG_FILE, INDEX_FILE, MANIFEST_FILE
from clp_ros.checkpoints.layer_keys import LayerKeys
from clp_ros.checkpoints.layer_stack import LayerStack, group_units
from clp_ros.checkpoints.safetensors_header import DTYPE_BITS, TensorInfo, encode_header
from clp_ros.checkpoints.units import UnitKind
from clp_ros.core.errors import ClpError
from clp_ros.policies.checkpoint import Checkpoint
from clp_ros.pruning.byte_ranges import Cut


@dataclass(frozen=True)
class TensorSlice(TensorInfo):
    """A tensor that loses units inside its layer. The shape is that of the result, the byte range that of the
    source."""

    cut: Cut

    @property
    def nbytes(self) -> int:
        """Number of bytes of the result."""
        return self.cut.nbytes


@dataclass(frozen=True)
class SurgeryPlan:
    """The units of each stack that stay. All numbers are those of the source.

    Attributes:
        checkpoint: The source.
        kept: Layers that stay, sorted, for every stack.
        kept_inside: Units inside layers that stay, sorted, by stack, layer and kind
            (:attr:`clp_ros.checkpoints.layer_stack.LayerStack.inner_units`). Layers that are not in it lose no inner
            units.
    """

    checkpoint: Checkpoint
    kept: Mapping[str, tuple[int, ...]]
    kept_inside: Mapping[str, Mapping[int, Mapping[str, tuple[int, ...]]]] = field(default_factory=dict)

    @property
    def removal(self) -> dict[str, tuple[int, ...]]:
        """Removed layers, by stack."""
        return {stack.name: stack.layer_units.without(self.kept[stack.name]) for stack in self.checkpoint.layer_stacks}

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json with the new depths and widths. Raises ClpError if a stack would be too shallow."""
        family, stacks = self.checkpoint.family, self.checkpoint.layer_stacks
        config = family.with_depths(self.checkpoint.config, {name: len(kept) for name, kept in self.kept.items()})
        widths = {
            stack.name: [
                {kind.name: len(self._kept_units(stack, layer, kind)) for kind in stack.inner_units[layer]}
                for layer in self.kept[stack.name]
            ]
            for stack in stacks
            if stack.inner_units
        }
        return config if family.with_widths is None else family.with_widths(config, widths)

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """The remaining tensors under their new names, in the order of writing.

        A shared tensor that was stored under the name of a removed layer is stored under its first other name.
        """
        source = self.checkpoint
        names: dict[str, list[str]] = {stored: [stored] for stored in source.tensors}
        for name, stored in sorted(source.shared.items()):
            names[stored].append(name)
        renamed: dict[str, TensorInfo] = {}
        for stored, tensor in source.tensors.items():
            staying = {new: self._part(name, tensor) for name in names[stored] if (new := self._rename(name))}
            if len(staying) > 1 and any(part is not tensor for part in staying.values()):
                raise ClpError(
                    f"tensor {stored} is shared, and cannot lose units of one layer",
                    where=source.path,
                    hint="remove whole layers",
                )
            renamed |= dict(list(staying.items())[:1])
        # Larger elements first, as in safetensors, so that every tensor is aligned to its element size. The sort is
        # stable, so that adjacent tensors stay adjacent.
        return dict(sorted(renamed.items(), key=lambda item: -DTYPE_BITS[item[1].dtype]))

    @cached_property
    def metadata(self) -> dict[str, str]:
        """The ``__metadata__`` strings with renumbered tensor names, without entries for removed tensors."""
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
        """Number of remaining parameters."""
        return sum(tensor.elements for tensor in self.tensors.values())

    @cached_property
    def header(self) -> bytes:
        """Header of the weight file that will be written."""
        return encode_header(self.tensors.items(), self.metadata)

    def pieces(self) -> list[tuple[str, int, int, Cut | None]]:
        """The ranges to copy: (file, start, end, None), with adjacent ranges merged; or with the cut of a sliced
        tensor."""
        pieces: list[tuple[str, int, int, Cut | None]] = []
        for tensor in self.tensors.values():
            cut = tensor.cut if isinstance(tensor, TensorSlice) else None
            follows = pieces and pieces[-1][0] == tensor.file and pieces[-1][2:] == (tensor.start, None)
            start = pieces.pop()[1] if follows and cut is None else tensor.start
            pieces.append((tensor.file, start, tensor.end, cut))
        return pieces

    def copied_files(self) -> dict[str, int]:
        """Size of every file that is copied unchanged."""
        rewritten = {CONFIG_FILE, INDEX_FILE, MANIFEST_FILE, *self.checkpoint.weight_files}
        return {name: size for name, size in self.checkpoint.files.items() if name not in rewritten}

    @cached_property
    def nbytes(self) -> int:
        """Number of bytes to copy: everything but the rewritten JSON files."""
        weights = sum(tensor.nbytes for tensor in self.tensors.values())
        return len(self.header) + weights + sum(self.copied_files().values())

    @cached_property
    def _keys(self) -> LayerKeys:
        return LayerKeys(self.checkpoint.layer_stacks)

    @cached_property
    def _numbers(self) -> dict[str, dict[int, int]]:
        return {name: {layer: new for new, layer in enumerate(kept)} for name, kept in self.kept.items()}

    def _rename(self, name: str) -> str | None:
        return self._keys.rename(name, self._numbers)

    def _kept_units(self, stack: LayerStack, layer: int, kind: UnitKind) -> tuple[int, ...]:
        return self.kept_inside.get(stack.name, {}).get(layer, {}).get(kind.name, tuple(range(kind.count)))

    def _part(self, name: str, tensor: TensorInfo) -> TensorInfo:
        """Returns the tensor without the removed units inside its layer."""
        key = self._keys.split(name) if self.kept_inside else None
        if key is None:
            return tensor
        (stack,) = (stack for stack in self.checkpoint.layer_stacks if stack.name == key.module)
        for kind in stack.inner_units[key.layer] if stack.inner_units else ():
            units = self._kept_units(stack, key.layer, kind)
            if len(units) == kind.count or key.rest not in kind.dimensions:
                continue
            dimension = kind.dimensions[key.rest]
            before, after = tensor.shape[:dimension], tensor.shape[dimension + 1 :]
            bits = math.prod(after) * kind.size * DTYPE_BITS[tensor.dtype]
            if bits % 8:
                raise ClpError(
                    f"{kind.name} of {name} do not begin at whole bytes",
                    where=self.checkpoint.path,
                    hint="prune the checkpoint before it is quantised",
                )
            shape = (*before, len(units) * kind.size, *after)
            cut = Cut(math.prod(before), kind.count, bits // 8, units)
            return TensorSlice(tensor.file, tensor.dtype, shape, tensor.start, tensor.end, cut)
        return tensor


def plan_surgery(checkpoint: Checkpoint, removal: Mapping[str, Sequence[int]]) -> SurgeryPlan:
    """Checks a removal against the structure of a checkpoint.

    Args:
        checkpoint: The source.
        removal: 0-based layers to remove, by stack. Stacks of one group lose the same layers: an entry for one of them
            applies to all. A stack without an entry loses none, unless its group has one.

    Raises:
        ClpError: A stack is unknown; layers are out of range or repeated; all layers or none are given; the entries of
            a group differ; a layer is protected; or the remaining layers would not alternate in kind as before.
    """
    known = checkpoint.layers
    for name in removal:
        if name not in known:
            raise ClpError(
                f"there is no module {name!r}", where=checkpoint.path, hint=f"use one of: {', '.join(known)}"
            )
    kept: dict[str, tuple[int, ...]] = {}
    for group, units in group_units(checkpoint.layer_stacks).items():
        stacks = [stack for stack in checkpoint.layer_stacks if stack.group == group]
        named = {stack.name: _checked_layers(stack, removal[stack.name]) for stack in stacks if stack.name in removal}
        if len(set(named.values())) > 1:
            sets = {one for layers in named.values() if layers for one in _nearest(units, layers, 1)}
            raise ClpError(
                "its modules must lose the same layers, not "
                + " and ".join(f"{name} {list(layers)}" for name, layers in named.items()),
                where=f"group {group}",
                hint=f"name one set for the group{', as ' * bool(sets)}{' or '.join(sorted(sets))}",
            )
        layers = next(iter(named.values()), ())
        _check_structure(stacks[0].name, units, layers)
        kept |= {stack.name: units.without(layers) for stack in stacks}
    if all(len(kept[name]) == count for name, count in known.items()):
        raise ClpError("no layer to remove is given", where=checkpoint.path, hint=f"name layers of: {', '.join(known)}")
    return SurgeryPlan(checkpoint, {name: kept[name] for name in known})


def _checked_layers(stack: LayerStack, layers: Sequence[int]) -> tuple[int, ...]:
    where = f"module {stack.name}"
    for layer in layers:
        if isinstance(layer, bool) or not hasattr(layer, "__index__"):
            raise ClpError(f"{layer!r} is no layer number", where=where, hint="give 0-based layer numbers")
        if not 0 <= layer < stack.layers:
            raise ClpError(f"there is no layer {layer}", where=where, hint=f"its layers are 0 to {stack.layers - 1}")
    unique = sorted({int(layer) for layer in layers})
    if len(unique) != len(layers):
        raise ClpError(f"a layer is named twice in {sorted(layers)}", where=where, hint="name each layer once")
    if len(unique) == stack.layers:
        raise ClpError("no layer would be left", where=where, hint="leave at least one")
    return tuple(unique)


def _check_structure(name: str, units: UnitKind, layers: Sequence[int]) -> None:
    if staying := sorted(units.protected.intersection(layers)):
        fault = f"layers {_listed(staying)} cannot be removed, because other code depends on their index"
    elif not units.keeps_pattern(layers):
        fault = (
            f"without layers {_listed(layers)}, its {units.pattern_period} kinds of layers would not alternate as "
            "before, and nothing could load the result"
        )
    else:
        return
    near = _nearest(units, layers)
    raise ClpError(
        fault, where=f"module {name}", hint=f"remove {' or '.join(near)}" if near else f"remove nothing from {name}"
    )


def _nearest(units: UnitKind, layers: Sequence[int], limit: int = 4) -> list[str]:
    # Imported here, because NumPy takes half the start of a process.
    from clp_ros.pruning.selection import nearest_allowed

    return [_listed(near) for near in nearest_allowed(layers, units, limit)]


def _listed(layers: Sequence[int]) -> str:
    return ",".join(map(str, layers))
