# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint or a calibration holds, read without loading any weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from clp_ros.calibration.calibration_file import JSON_FILE, Calibration
from clp_ros.jobs.progress import SILENT, Progress
from clp_ros.jobs.request import FilePath, Request, Result
from clp_ros.policies.checkpoint import Checkpoint


class InspectRequest(Request):
    """Asks what a folder holds.

    Attributes:
        path: A checkpoint folder (or a repository on the hub), or a calibration folder.
    """

    path: FilePath


class InspectResult(Result):
    """What it holds.

    Attributes:
        found: The document of :func:`inspect_checkpoint` or :func:`inspect_calibration`.
    """

    found: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """The document itself."""
        return self.found

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        """See :meth:`Result.from_json`."""
        return super().from_json({"found": dict(document)})


def run(request: InspectRequest, progress: Progress = SILENT) -> InspectResult:
    """Reads the folder.

    Raises:
        ClpError: It is damaged, or of no known family.
    """
    progress.stage(f"reading {request.path}")
    is_calibration = (request.path / JSON_FILE).is_file()
    return InspectResult(
        found=inspect_calibration(request.path) if is_calibration else inspect_checkpoint(request.path)
    )


def inspect_checkpoint(folder: str | Path) -> dict[str, Any]:
    """Family, modules, layers and parameters of a checkpoint.

    Raises:
        ClpError: It is damaged or of no known family.
    """
    checkpoint = Checkpoint.open(folder)
    parameters = checkpoint.module_parameters()
    return {
        "path": str(checkpoint.path),
        "family": checkpoint.family.name,
        "modules": [
            {
                "name": module.name,
                "group": module.group,
                "layers": module.layers,
                "period": module.pattern_period,
                "fixed": sorted(module.protected_layers),
                "least": module.min_layers,
                "parameters": parameters[module.name],
            }
            for module in checkpoint.modules
        ],
        "parameters": checkpoint.parameters(),
        "bytes": checkpoint.bytes,
        "fingerprint": checkpoint.fingerprint(),
        "manifest": checkpoint.manifest,
    }


def inspect_calibration(folder: str | Path) -> dict[str, Any]:
    """How a calibration was made, and its scores.

    Raises:
        ClpError: It is damaged.
    """
    calibration = Calibration.load(folder)
    modules = [
        {
            "name": name,
            **module,
            "adjacent": calibration.adjacent[name].tolist(),
            "mse": calibration.mse[name].tolist(),
            "cosine": calibration.cosine[name].tolist(),
        }
        for name, module in calibration.meta["modules"].items()
    ]
    return {"path": str(Path(folder).absolute()), **calibration.meta, "modules": modules}
