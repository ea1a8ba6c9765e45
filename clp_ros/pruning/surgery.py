# SPDX-License-Identifier: Apache-2.0
"""Removes layers from a checkpoint folder by copying byte ranges, without building a model or parsing tensors."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from clp_ros.core.errors import ClpError
from clp_ros.core.files import atomic_folder, clear_leftovers
from clp_ros.core.json_object import read_json_object
from clp_ros.policies.checkpoint import Checkpoint
from clp_ros.pruning.surgery_manifest import build_manifest
from clp_ros.pruning.surgery_plan import SurgeryPlan, plan_surgery
from clp_ros.pruning.surgery_writer import Progress, write_checkpoint

__all__ = ["Progress", "SurgeryPlan", "build_manifest", "plan_surgery", "prune_checkpoint"]


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

    Remaining tensors keep their bytes. The weights are written to one ``model.safetensors``, because stock lerobot does
    not load shards. Other files are copied; links become files. config.json gets the new depths, paths into the folder
    point into ``output``, and clp.json describes the pruning. The folder appears under its name only when it is
    complete. A killed process leaves at most a hidden folder beside it, which is not a checkpoint and which the next
    run deletes. As with ``cp``, files are not flushed to the disk: after a power failure they may be too short, and
    then do not load.

    Args:
        source: The checkpoint folder.
        output: The folder to write.
        removal: See :func:`plan_surgery`.
        criterion: How the layers were chosen, for the manifest.
        thresholds: The thresholds of the selection, by module, for the manifest.
        scores: Adjacent scores by module, for the manifest: ``scores[m][i]`` compares the source's layers i and i+1.
        overwrite: Whether an ``output`` that is not empty may be replaced.
        progress: Called with the bytes copied so far and the bytes to copy.
        check: Called with the plan before anything is written. It raises to refuse the plan.

    Returns:
        The manifest, as written to clp.json.

    Raises:
        ClpError: The source is damaged (:meth:`Checkpoint.open`), the removal is impossible (:func:`plan_surgery`), the
            output is inside the source, contains it or is not empty, or the disk is full. Nothing has been written
            then.
    """
    checkpoint = Checkpoint.open(source)
    plan = plan_surgery(checkpoint, removal)
    _ = plan.config  # raises before anything is written if the model would be too shallow
    target = Path(output).absolute()
    _check_processors(checkpoint)
    clear_leftovers(target)  # they may occupy the disk space that this run needs
    _check_output(plan, target)
    manifest = build_manifest(plan, criterion, thresholds or {}, scores or {})
    if check is not None:
        check(plan)
    try:
        with atomic_folder(target, overwrite) as folder:
            write_checkpoint(plan, folder, target, manifest, progress)
    except OSError as error:
        raise ClpError(
            f"the checkpoint cannot be written ({error.strerror or error})",
            where=error.filename or target,
            hint="make room on the disk, or give another --output",
        ) from error
    return manifest


def _check_processors(checkpoint: Checkpoint) -> None:
    """Refuses processor files that lerobot cannot read, because the result would not load."""
    for name in ("policy_preprocessor.json", "policy_postprocessor.json"):
        if name in checkpoint.files:
            steps = read_json_object(checkpoint.path / name).get("steps")
            if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
                raise ClpError(
                    "steps is not a list of objects",
                    where=checkpoint.path / name,
                    hint="save the checkpoint again with lerobot",
                )


def _check_output(plan: SurgeryPlan, target: Path) -> None:
    source, real = os.path.realpath(plan.checkpoint.path), os.path.realpath(target)
    if os.path.commonpath([source, real]) in {source, real}:
        raise ClpError(
            "the output lies in the source checkpoint or around it", where=target, hint="give an --output apart from it"
        )
    existing = next(parent for parent in target.parents if parent.exists())
    free = shutil.disk_usage(existing).free
    if plan.nbytes > free:
        raise ClpError(
            f"the disk has {free:,} bytes free, but the checkpoint needs {plan.nbytes:,}",
            where=existing,
            hint="make room, or give an --output on another disk",
        )
