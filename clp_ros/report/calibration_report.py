# SPDX-License-Identifier: Apache-2.0
"""Writes a calibration folder with numbers, heatmaps and page, completely or not at all."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from clp_ros.core.errors import ClpError
from clp_ros.core.files import atomic_folder
from clp_ros.report.heatmaps import draw_heatmap
from clp_ros.report.page import write_report

if TYPE_CHECKING:
    from clp_ros.calibration.calibration_file import Calibration


class ModulePlan(TypedDict, total=False):
    """The planned removal from a layer stack. Every key may be missing.

    Attributes:
        threshold: τ, or None.
        blocks: The 0-based layers of each block; the first one is its anchor, which stays.
        removed: The 0-based layers that would be removed.
        scores: ``(L-1,)`` the mean score of the group, if the selection uses it instead of the stack's adjacent scores.
    """

    threshold: float | None
    blocks: Sequence[Sequence[int]]
    removed: Sequence[int]
    scores: Sequence[float] | None


def write_calibration(
    calibration: "Calibration",
    output: str | os.PathLike[str],
    plan: Mapping[str, ModulePlan],
    *,
    command: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes a calibration folder: ``calibration.json``, ``cka.npz``, heatmaps and ``report.html``.

    The folder appears when it is complete. After a failure or Ctrl-C, nothing is left.

    Args:
        calibration: The calibration.
        output: The folder to write.
        plan: The planned removal by layer stack. Other layer stacks are shown without one.
        command: The next command, for the page.
        overwrite: Whether to replace a folder that is not empty.

    Returns:
        The folder.

    Raises:
        ClpError: The output is not empty, not a folder, or cannot be written.
        ValueError: The plan names a layer stack that was not calibrated.
    """
    unknown = sorted(set(plan) - set(calibration.matrices))
    if unknown:
        raise ValueError(f"the plan names modules that were not calibrated: {', '.join(unknown)}")
    output = Path(output)
    try:
        with atomic_folder(output, overwrite) as folder:
            _write(calibration, folder, plan, command)
    except OSError as error:
        raise ClpError(
            f"the calibration cannot be written ({error.strerror or error})",
            where=error.filename or output,
            hint="free some disk space, or give another --output",
        ) from error
    return output


def _write(calibration: "Calibration", folder: Path, plan: Mapping[str, ModulePlan], command: str | None) -> None:
    calibration.save(folder)
    modules: list[dict[str, Any]] = []
    adjacent = calibration.adjacent
    for name, matrix in calibration.matrices.items():
        module_plan = plan.get(name, {})
        draw_heatmap(
            matrix,
            module=name,
            threshold=module_plan.get("threshold"),
            blocks=module_plan.get("blocks", ()),
            removed=module_plan.get("removed", ()),
            path=folder / f"heatmap_{name}.png",
            scores=module_plan.get("scores"),
        )
        measured = {"adjacent": adjacent[name], "mse": calibration.mse[name], "cosine": calibration.cosine[name]}
        modules.append({"name": name, **calibration.meta["modules"][name], **measured, **module_plan})
    meta = dict(calibration.meta)
    if "statistics" in meta:  # left out: some hundred numbers, which are in calibration.json
        meta["statistics"] = {key: value for key, value in meta["statistics"].items() if key != "values"}
    write_report(folder, {"meta": meta, "modules": modules, "command": command})
