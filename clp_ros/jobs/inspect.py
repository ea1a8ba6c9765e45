# SPDX-License-Identifier: Apache-2.0
"""Describes a checkpoint or a calibration without loading weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ConfigDict

from clp_ros.calibration.calibration_file import JSON_FILE, Calibration, StackScores
from clp_ros.checkpoints.manifest import Source
from clp_ros.core.strict_model import StrictModel
from clp_ros.jobs.progress import SILENT, Progress
from clp_ros.jobs.request import FilePath, Request, Result
from clp_ros.policies.checkpoint import Checkpoint


class InspectRequest(Request):
    """Asks for the description of a folder.

    Attributes:
        path: A checkpoint folder (or a Hub repository), or a calibration folder.
    """

    path: FilePath


class StackSummary(StrictModel):
    """A layer stack of a checkpoint: the fields of a calibration's :class:`StackScores` without scores.

    Attributes:
        name: Its name.
        group: Stacks of one group lose the same layers.
        layers: Number of layers.
        period: Layer kinds alternate with the layer index at this period.
        fixed: 0-based layers that may not be removed.
        least: Layers that must be left.
        parameters: Number of parameters in its layers.
    """

    name: str
    group: str
    layers: int
    period: int
    fixed: list[int]
    least: int
    parameters: int


class NamedScores(StackScores):
    """A layer stack of a calibration, with its ``name``."""

    name: str


class InspectedCheckpoint(Result):
    """The content of a checkpoint.

    Attributes:
        path: The folder, absolute.
        family: Its family's name.
        modules: Its layer stacks.
        parameters: Number of stored parameters.
        bytes: Size of all files.
        fingerprint: The hash by which a calibration identifies it.
        manifest: clp.json; None if the checkpoint was never pruned.
    """

    path: str
    family: str
    modules: list[StackSummary]
    parameters: int
    bytes: int
    fingerprint: str
    manifest: Mapping[str, Any] | None


class InspectedCalibration(Result):
    """The content of a calibration: all fields of calibration.json.

    Attributes:
        path: The folder, absolute.
        family: The policy's family.
        checkpoint: The checkpoint that was calibrated.
        modules: Its layer stacks, with their scores.
    """

    model_config = ConfigDict(extra="allow")

    path: str
    family: str
    checkpoint: Source
    modules: list[NamedScores]


type InspectResult = InspectedCheckpoint | InspectedCalibration


def run(request: InspectRequest, progress: Progress = SILENT) -> InspectResult:
    """Describes the folder.

    Raises:
        ClpError: The folder is damaged, or of no known family.
    """
    progress.stage(f"reading {request.path}")
    if not (request.path / JSON_FILE).is_file():
        return _checkpoint(request.path)
    found = Calibration.load(request.path)
    modules = [{"name": name, **entry} for name, entry in found.entries().items()]
    return InspectedCalibration(**{"path": str(request.path.absolute()), **found.meta, "modules": modules})


def _checkpoint(folder: Path) -> InspectedCheckpoint:
    checkpoint = Checkpoint.open(folder)
    parameters = checkpoint.module_parameters()
    return InspectedCheckpoint(
        path=str(checkpoint.path),
        family=checkpoint.family.name,
        modules=[
            StackSummary(
                name=module.name,
                group=module.group,
                layers=module.layers,
                period=module.pattern_period,
                fixed=sorted(module.protected_layers),
                least=module.min_layers,
                parameters=parameters[module.name],
            )
            for module in checkpoint.layer_stacks
        ],
        parameters=checkpoint.parameters(),
        bytes=checkpoint.nbytes,
        fingerprint=checkpoint.fingerprint(),
        manifest=checkpoint.manifest,
    )
