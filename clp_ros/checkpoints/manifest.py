# SPDX-License-Identifier: Apache-2.0
"""Reads clp.json, the manifest of a pruned checkpoint: its source, what was removed, and why.

Numbers of units at the top level are those of the first source, however often the checkpoint was pruned; ``steps``
holds each pruning in the numbers of its own source.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from clp_ros.checkpoints.layer_stack import LayerStack
from clp_ros.core.errors import ClpError
from clp_ros.core.json_object import read_json_object
from clp_ros.core.strict_model import StrictModel, describe, place

SCHEMA_VERSION = 3

_Count = Annotated[int, Field(ge=0)]


class Source(StrictModel):
    """A checkpoint that was pruned: its path at that time, and its fingerprint."""

    path: str
    fingerprint: str


class Parameters(StrictModel):
    """Number of parameters before and after pruning."""

    before: _Count
    after: _Count


class UnitRecord(StrictModel):
    """The removed units of one kind inside of one layer, 0-based."""

    original: _Count
    removed: list[_Count]

    @model_validator(mode="after")
    def _sorted(self) -> UnitRecord:
        if self.removed != sorted(set(self.removed)) or (self.removed and self.removed[-1] >= self.original):
            raise ValueError("the removed units are not sorted, or not there")
        return self


class ModuleRecord(StrictModel):
    """The removed and kept layers of one layer stack, 0-based.

    Attributes:
        threshold: τ, the minimum score of a removed layer; null if there was none, absent before version 2.
        scores: ``scores[i]`` compares layers i and i+1; null if none were given.
        units: Removed units inside of kept layers, by kind of unit (``channels``, ``heads``) and layer; absent before
            version 3.
    """

    original_layers: _Count
    removed: list[_Count]
    kept: list[_Count]
    threshold: float | None = None
    scores: list[float] | None
    units: dict[str, dict[str, UnitRecord]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _partition(self) -> ModuleRecord:
        if len(self.removed) + len(self.kept) != self.original_layers:
            raise ValueError("removed and kept layers are not all layers")
        if self.removed != sorted(self.removed) or self.kept != sorted(self.kept):
            raise ValueError("removed or kept layers are not sorted")
        if sorted(self.removed + self.kept) != list(range(self.original_layers)):
            raise ValueError("removed and kept layers are not all layers")
        if not {layer for layers in self.units.values() for layer in layers} <= {str(layer) for layer in self.kept}:
            raise ValueError("units are of layers that are not kept")
        return self


class Step(StrictModel):
    """One pruning, in the numbers of its own source."""

    source: Source
    criterion: str
    threshold: float | None
    modules: dict[str, ModuleRecord]
    parameters: Parameters


class Manifest(StrictModel):
    """The content of clp.json.

    Attributes:
        source: The first source: the checkpoint before all pruning.
        criterion: That of the last step, as ``threshold``, and the modules' ``threshold`` and ``scores``.
        threshold: τ, if it is the same for all modules with removed layers; null otherwise.
        modules: Layers in the first source's numbers.
        parameters: Numbers of the first source and of this checkpoint.
        steps: All prunings, oldest first.
    """

    schema_version: Literal[1, 2, 3]
    clp_ros_version: str
    family: str
    source: Source
    criterion: str
    threshold: float | None
    modules: dict[str, ModuleRecord]
    parameters: Parameters
    steps: Annotated[list[Step], Field(min_length=1)]


def read_manifest(path: Path, family: str, stacks: Collection[LayerStack]) -> dict[str, Any]:
    """Reads a checkpoint's clp.json.

    Args:
        path: The file.
        family: Family of the checkpoint.
        stacks: Its layer stacks.

    Returns:
        The manifest as it is in the file.

    Raises:
        ClpError: It is not a manifest, or the manifest of another checkpoint.
    """
    hint = f"give the {path.name} that was written with these weights, or delete it"
    raw = read_json_object(path, hint)
    version = raw.get("schema_version")
    if type(version) is int and version > SCHEMA_VERSION:
        raise ClpError(
            f"its schema_version is {version}, and this version of clp_ros reads 1 to {SCHEMA_VERSION}",
            where=path,
            hint="install the clp_ros that wrote it, or a later one",
        )
    try:
        manifest = Manifest.model_validate(raw)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ClpError(f"not a manifest: {place(first)} {describe(first)}", where=path, hint=hint) from error
    kept = {name: len(record.kept) for name, record in manifest.modules.items()}
    layers = {stack.name: stack.layers for stack in stacks}
    if manifest.family != family or kept != layers:
        raise ClpError(
            f"the manifest describes a {manifest.family} of {kept} layers, not a {family} of {layers}",
            where=path,
            hint=hint,
        )
    for stack in stacks:
        _check_units(stack, manifest.modules[stack.name], path, hint)
    return raw


def _check_units(stack: LayerStack, record: ModuleRecord, path: Path, hint: str) -> None:
    """Compares the units that a stack's layers lost with the widths that config.json gives these layers."""
    for name, layers in record.units.items():
        for number, lost in layers.items():
            place = record.kept.index(int(number))
            kinds = stack.inner_units[place] if stack.inner_units else ()
            now = next((kind.count for kind in kinds if kind.name == name), None)
            if now != lost.original - len(lost.removed):
                raise ClpError(
                    f"the manifest leaves layer {place} of {stack.name} {lost.original - len(lost.removed)} {name}, "
                    f"config.json gives it {'none' if now is None else now}",
                    where=path,
                    hint=hint,
                )
