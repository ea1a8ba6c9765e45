# SPDX-License-Identifier: Apache-2.0
"""Removing layers from a checkpoint folder, byte range by byte range: no model is built, no tensor is parsed."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import clp_ros
from clp_ros.checkpoints.layer_keys import LayerKeys
from clp_ros.checkpoints.layer_stack import LayerStack
from clp_ros.checkpoints.safetensors_header import DTYPE_BITS, TensorInfo, encode_header
from clp_ros.core.errors import ClpError
from clp_ros.core.files import atomic_folder, clear_leftovers, rewrite_json
from clp_ros.core.json_object import read_json_object
from clp_ros.policies.checkpoint import CONFIG_FILE, INDEX_FILE, MANIFEST_FILE, WEIGHTS_FILE, Checkpoint
from clp_ros.pruning.byte_ranges import PAGE, RangeCopier, reserve

Progress = Callable[[int, int], None]


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


def prune_checkpoint(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    removal: Mapping[str, Sequence[int]],
    *,
    criterion: str = "given",
    thresholds: Mapping[str, float | None] | None = None,
    scores: Mapping[str, Sequence[float]] | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    check: Callable[[SurgeryPlan], object] | None = None,
) -> dict[str, Any]:
    """Writes a checkpoint without some of its layers.

    The bytes of every tensor that stays are the source's. The weights always go into one ``model.safetensors``, also
    from a sharded source: stock lerobot loads no other file. All else in the folder is copied, links as what they lead
    to; config.json gets the new depths, paths into the folder are made to point into ``output``, and clp.json says what
    was done. The folder appears under its name only when it is whole: a process killed at any instant leaves at most a
    hidden folder beside it, which nothing takes for a checkpoint and the next run clears away. Nothing is forced to the
    disk (as with ``cp``): after a power cut files may be too short, and then do not load.

    Args:
        source: The checkpoint folder.
        output: The folder to make.
        removal: See :func:`plan_surgery`.
        criterion: How the layers were chosen, for the manifest.
        thresholds: The thresholds they were chosen by, by module, for the manifest.
        scores: Adjacent scores by module, for the manifest: ``scores[m][i]`` compares the source's layers i and i+1.
        overwrite: Whether an ``output`` that is not empty may be replaced.
        progress: Called with the bytes copied so far and the bytes to copy.
        check: Called with the surgery before anything is written. It raises to refuse it.

    Returns:
        The manifest, as written to clp.json.

    Raises:
        ClpError: The source is damaged (:meth:`Checkpoint.open`), the removal impossible (:func:`plan_surgery`), the
            output inside the source or around it, not empty, or on a disk too full. Nothing has been written then.
    """
    checkpoint = Checkpoint.open(source)
    plan = plan_surgery(checkpoint, removal)
    _ = plan.config  # if the family cannot be so shallow, it says so before anything is written
    target = Path(output).absolute()
    _check_processors(checkpoint)
    clear_leftovers(target)  # they may take the room on the disk that this run needs
    _check_output(plan, target)
    manifest = build_manifest(plan, criterion, thresholds or {}, scores or {})
    if check is not None:
        check(plan)
    try:
        with atomic_folder(target, overwrite) as folder:
            _write(plan, folder, target, manifest, progress)
    except OSError as error:
        raise ClpError(
            f"cannot write the checkpoint ({error.strerror or error})",
            where=error.filename or target,
            fix="make room on the disk, or give another --output",
        ) from error
    return manifest


def build_manifest(
    plan: SurgeryPlan,
    criterion: str,
    thresholds: Mapping[str, float | None],
    scores: Mapping[str, Sequence[float]],
) -> dict[str, Any]:
    """The clp.json of a plan (:class:`clp_ros.checkpoints.manifest.Manifest`); a pruned source's own is continued."""
    checkpoint = plan.checkpoint
    records = {}
    for name, layers in checkpoint.layers.items():
        given = [float(score) for score in scores[name]] if name in scores else None
        if given is not None and len(given) != layers - 1:
            raise ValueError(f"{name} has {layers} layers and so {layers - 1} adjacent scores, not {len(given)}")
        records[name] = {
            "original_layers": layers,
            "removed": list(plan.removal[name]),
            "kept": list(plan.kept[name]),
            "threshold": None if thresholds.get(name) is None else float(thresholds[name]),
            "scores": given,
        }
    used = {record["threshold"] for record in records.values() if record["removed"]}
    step = {
        "source": {"path": str(checkpoint.path), "fingerprint": checkpoint.fingerprint()},
        "criterion": criterion,
        "threshold": used.pop() if len(used) == 1 else None,
        "modules": records,
        "parameters": {"before": checkpoint.parameters(), "after": plan.parameters},
    }
    earlier = copy.deepcopy(checkpoint.manifest)
    first = earlier or step
    return {
        "schema_version": 2,
        "clp_ros_version": clp_ros.__version__,
        "family": checkpoint.family.name,
        "source": first["source"],
        "criterion": criterion,
        "threshold": step["threshold"],
        "modules": {name: _since_first(first["modules"][name], record) for name, record in records.items()}
        if earlier
        else records,
        "parameters": {"before": first["parameters"]["before"], "after": plan.parameters},
        "steps": [*(earlier["steps"] if earlier else []), step],
    }


def _since_first(earlier: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, Any]:
    """A module's record in the first source's layer numbers; its threshold and scores are the last step's."""
    kept = [earlier["kept"][layer] for layer in record["kept"]]
    layers = earlier["original_layers"]
    removed = sorted(set(range(layers)) - set(kept))
    return {**record, "original_layers": layers, "removed": removed, "kept": kept}


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


def _check_processors(checkpoint: Checkpoint) -> None:
    """Refuses processor files that lerobot could not read: the result would not load."""
    for name in ("policy_preprocessor.json", "policy_postprocessor.json"):
        if name in checkpoint.files:
            steps = read_json_object(checkpoint.path / name).get("steps")
            if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
                raise ClpError(
                    "steps is not a list of objects",
                    where=checkpoint.path / name,
                    fix="save the checkpoint again with lerobot",
                )


def _check_output(plan: SurgeryPlan, target: Path) -> None:
    source, real = os.path.realpath(plan.checkpoint.path), os.path.realpath(target)
    if os.path.commonpath([source, real]) in {source, real}:
        raise ClpError(
            "the output lies in the source checkpoint or around it", where=target, fix="give an --output apart from it"
        )
    existing = next(parent for parent in target.parents if parent.exists())
    free = shutil.disk_usage(existing).free
    if plan.bytes > free:
        raise ClpError(
            f"the disk has {free:,} bytes free, the checkpoint needs {plan.bytes:,}",
            where=existing,
            fix="make room, or give an --output on another disk",
        )


def _write(
    plan: SurgeryPlan, folder: Path, target: Path, manifest: Mapping[str, Any], progress: Progress | None
) -> None:
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, plan.bytes)

    _write_weights(plan, folder / WEIGHTS_FILE, advance)
    for name in plan.copied_files():
        copied = folder / name
        copied.parent.mkdir(parents=True, exist_ok=True)
        _copy_file(plan.checkpoint.path / name, copied, advance)
    family = plan.checkpoint.family
    configs = {CONFIG_FILE: copy.deepcopy(plan.config)}
    try:
        rewrite_json(folder, lambda documents: family.localise(documents, target.resolve(), folder))
        family.localise(configs, target.resolve(), folder)
    except (TypeError, AttributeError, LookupError) as error:
        raise ClpError(
            f"a JSON file is not built as {family.name} checkpoints are ({type(error).__name__}: {error})",
            where=plan.checkpoint.path,
            fix="save the checkpoint again with lerobot",
        ) from error
    _write_json(folder / MANIFEST_FILE, manifest)
    # Last, so that a folder cut short is no checkpoint to anything that looks for one.
    _write_json(folder / CONFIG_FILE, configs[CONFIG_FILE])


def _write_weights(plan: SurgeryPlan, path: Path, advance: Callable[[int], None]) -> None:
    checkpoint = plan.checkpoint
    with ExitStack() as stack:
        opened = {name: stack.enter_context((checkpoint.path / name).open("rb")) for name in checkpoint.weight_files}
        target = stack.enter_context(path.open("wb", buffering=0))
        reserve(target.fileno(), len(plan.header) + sum(end - start for _, start, end in plan.ranges()))
        target.write(plan.header)
        advance(len(plan.header))
        copier = RangeCopier(target.fileno(), advance)
        for name, start, end in plan.ranges():
            copier.append(opened[name].fileno(), start, end, checkpoint.path / name)
        for name, file in opened.items():
            checkpoint.check_unchanged(name, file.fileno())


def _copy_file(source: Path, target: Path, advance: Callable[[int], None]) -> None:
    with source.open("rb") as reader, target.open("wb", buffering=0) as writer:
        RangeCopier(writer.fileno(), advance).append(reader.fileno(), 0, os.fstat(reader.fileno()).st_size, source)


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=4) + "\n", encoding="utf-8")
