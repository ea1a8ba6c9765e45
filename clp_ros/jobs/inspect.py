# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint or a calibration holds, read without loading any weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from clp_ros.calibration.calibration_file import Calibration
from clp_ros.policies.checkpoint import Checkpoint


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
