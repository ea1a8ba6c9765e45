# SPDX-License-Identifier: Apache-2.0
"""Writes a checkpoint without its redundant layers: those that a calibration shows, or given ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import Field, model_validator

from clp_ros.core.errors import ClpError
from clp_ros.core.files import check_apart
from clp_ros.jobs.progress import SILENT, Progress
from clp_ros.jobs.request import FilePath, Request, Result, Seed
from clp_ros.policies.checkpoint import Checkpoint
from clp_ros.pruning.loadable import check_loadable
from clp_ros.pruning.surgery import SurgeryPlan, build_manifest, plan_surgery, prune_checkpoint

if TYPE_CHECKING:
    from clp_ros.pruning.plan import Plan


class PruneRequest(Request):
    """Asks for a pruned checkpoint.

    Attributes:
        checkpoint: Checkpoint folder, or a repository on the hub.
        output: Checkpoint folder to write; None: a dry run, which writes nothing.
        calibration: Calibration folder of that checkpoint; None if ``removal`` is given.
        removal: 0-based layers to remove, by module. The fields from ``budgets`` to ``seed`` do not apply then.
        budgets: Number of layers to remove, by module; empty, and no threshold: the paper's share.
        threshold: Minimum score of a layer to remove.
        criterion: One of :data:`clp_ros.pruning.selection.CRITERIA`.
        seed: Seed of the criterion ``random``.
        overwrite: Whether an output folder that is not empty is replaced.
    """

    checkpoint: FilePath
    output: FilePath | None
    calibration: FilePath | None = None
    removal: dict[str, tuple[int, ...]] | None = None
    budgets: dict[str, int] = Field(default_factory=dict)
    threshold: float | None = None
    criterion: str = "cka"
    seed: Seed = 0
    overwrite: bool = False

    @model_validator(mode="after")
    def _either(self) -> Self:
        if (self.calibration is None) == (self.removal is None):
            raise ValueError("give either a calibration or the layers to remove")
        return self


class PruneResult(Result):
    """What was removed.

    Attributes:
        output: The folder, absolute; None in a dry run.
        dry_run: Whether it was one.
        criterion: The criterion by which the layers were chosen.
        thresholds: τ by module, None where there is none; ``threshold``: the τ of all modules, None where theirs
            differ.
        removed: 0-based layers that were removed, and ``layers``, how many are left, by module.
        units: By module and kind of unit, the numbers ``removed`` and ``kept``: of ``layers``; of units inside of
            layers by layer.
        parameters: Their numbers ``before`` and ``after``.
        notes: Notes for the user, a sentence each.
        unchecked: Why lerobot's model and processors could not be compared with the result; None where they were.
        plan: The removal sets (:class:`clp_ros.pruning.plan.Plan`); None if the layers were given.
    """

    output: str | None
    dry_run: bool
    criterion: str
    threshold: float | None
    thresholds: dict[str, float | None]
    removed: dict[str, list[int]]
    layers: dict[str, int]
    units: dict[str, dict[str, Any]]
    parameters: dict[str, int]
    notes: list[str]
    unchecked: str | None
    plan: Any = Field(default=None, exclude=True)


def run(request: PruneRequest, progress: Progress = SILENT) -> PruneResult:
    """Prunes the checkpoint.

    Raises:
        ClpError: The calibration is of another checkpoint, no removal set fits, the output folder is not empty
            (:func:`clp_ros.pruning.surgery.prune_checkpoint`), or the result would not load
            (:func:`clp_ros.pruning.loadable.check_loadable`).
    """
    plan: Plan | None = None
    notes: list[str] = []
    if request.calibration is not None:
        progress.stage("reading the calibration")
        plan = plan_from_calibration(
            request.checkpoint,
            request.calibration,
            request.budgets,
            request.threshold,
            request.criterion,
            request.seed,
        )
        if request.output is not None:
            check_apart(request.output, [request.checkpoint, request.calibration])
        notes = list(plan.notes)
        for note in notes:
            progress.note(note)
    progress.stage("pruning", "B")
    chosen: dict[str, Any] = {"removal": request.removal} if plan is None else plan.arguments()
    unchecked: str | None = "nothing is written in a dry run"
    if request.output is None:
        surgery = plan_surgery(Checkpoint.open(request.checkpoint), chosen["removal"])
        _ = surgery.config  # raises if the model would be too shallow
        manifest = build_manifest(
            surgery, chosen.get("criterion", "given"), chosen.get("thresholds", {}), chosen.get("scores", {})
        )
    else:

        def check(surgery: SurgeryPlan) -> None:
            nonlocal unchecked
            unchecked = check_loadable(surgery)

        manifest = prune_checkpoint(
            request.checkpoint,
            request.output,
            **chosen,
            overwrite=request.overwrite,
            progress=progress.advance,
            check=check,
        )
    step = manifest["steps"][-1]
    records: dict[str, dict[str, Any]] = step["modules"]
    return PruneResult(
        output=None if request.output is None else str(request.output.absolute()),
        dry_run=request.output is None,
        criterion=step["criterion"],
        threshold=step["threshold"],
        thresholds={name: record["threshold"] for name, record in records.items()},
        removed={name: record["removed"] for name, record in records.items()},
        layers={name: len(record["kept"]) for name, record in records.items()},
        units={name: _units(record) for name, record in records.items()},
        parameters=step["parameters"],
        notes=notes,
        unchecked=unchecked,
        plan=plan,
    )


def plan_from_calibration(
    checkpoint: str | Path,
    calibration: str | Path,
    budgets: Mapping[str, int] | None = None,
    threshold: float | None = None,
    criterion: str = "cka",
    seed: int = 0,
) -> Plan:
    """Returns the plan for pruning a checkpoint by a calibration. Without budgets and threshold: the paper's share.

    Raises:
        ClpError: The calibration is of another checkpoint, or no removal set fits.
    """
    # Reading calibrations takes the bag reader's libraries; removing given layers does not wait for them.
    from clp_ros.calibration.calibration_file import Calibration
    from clp_ros.pruning.plan import check_calibration, default_plan, make_plan

    source = Checkpoint.open(checkpoint)
    found = Calibration.load(calibration)
    check_calibration(found, source)
    if budgets or threshold is not None:
        plan = make_plan(found, budgets, threshold, criterion, seed)
    else:
        plan = default_plan(found, source, criterion, seed)
    if not any(plan.removal.values()):
        raise ClpError("nothing would be removed", where=calibration, hint="raise the budget or lower the threshold")
    return plan


def _units(record: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the removed and kept numbers of a stack's units by kind, from its record in the manifest."""
    inner = {
        kind: {
            layer: {
                "removed": lost["removed"],
                "kept": sorted(set(range(lost["original"])).difference(lost["removed"])),
            }
            for layer, lost in layers.items()
        }
        for kind, layers in record["units"].items()
    }
    return {"layers": {"removed": record["removed"], "kept": record["kept"]}, **inner}
