# SPDX-License-Identifier: Apache-2.0
"""Plans a removal: one set of layers for each group of layer stacks, from a calibration, budgets and a criterion."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from clp_ros.calibration.calibrate import check_seed
from clp_ros.calibration.calibration_file import Calibration
from clp_ros.checkpoints.layer_stack import LayerStack, group_units
from clp_ros.core.errors import ClpError
from clp_ros.core.settings import did_you_mean
from clp_ros.policies.checkpoint import Checkpoint
from clp_ros.pruning.selection import (
    CRITERIA,
    allowed_budgets,
    blocks,
    criterion_scores,
    group_scores,
    select_units,
)


@dataclass(frozen=True)
class GroupPlan:
    """The removal set of layer stacks that lose the same layers.

    Attributes:
        group: Name of the group.
        modules: Its modules.
        scores: (L-1,) float64 by the criterion, larger for more redundant; element i belongs to layer i+1.
        threshold: τ; None if nothing is removed.
        blocks: Runs of layers whose scores reach τ, the anchor first.
        removed: 0-based layers to remove.
    """

    group: str
    modules: tuple[str, ...]
    scores: np.ndarray
    threshold: float | None
    blocks: tuple[tuple[int, ...], ...]
    removed: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """The layers to remove from a checkpoint.

    Attributes:
        criterion: The criterion of the selection.
        groups: The removal sets.
        notes: Remarks on unexpected choices for the user, a sentence each.
    """

    criterion: str
    groups: tuple[GroupPlan, ...]
    notes: tuple[str, ...] = ()

    @property
    def removal(self) -> dict[str, tuple[int, ...]]:
        """0-based layers to remove, by module."""
        return {name: group.removed for group in self.groups for name in group.modules}

    @property
    def scores(self) -> dict[str, np.ndarray]:
        """The scores used for the selection, (L-1,) float64, by module."""
        return {name: group.scores for group in self.groups for name in group.modules}

    @property
    def thresholds(self) -> dict[str, float | None]:
        """τ by module."""
        return {name: group.threshold for group in self.groups for name in group.modules}

    def arguments(self) -> dict[str, Any]:
        """Returns the plan's arguments of :func:`clp_ros.pruning.surgery.prune_checkpoint`, by name."""
        return {
            "removal": self.removal,
            "criterion": self.criterion,
            "thresholds": self.thresholds,
            "scores": {name: scores.tolist() for name, scores in self.scores.items()},
        }

    def report(self) -> dict[str, dict[str, object]]:
        """Returns the data for the report by module: see :class:`clp_ros.report.calibration_report.ModulePlan`."""
        return {
            name: {
                "threshold": group.threshold,
                "blocks": group.blocks,
                "removed": group.removed,
                "group": group.group,
                "scores": group.scores if len(group.modules) > 1 else None,
            }
            for group in self.groups
            for name in group.modules
        }


def make_plan(
    calibration: Calibration,
    budgets: Mapping[str, int] | None = None,
    threshold: float | None = None,
    criterion: str = "cka",
    seed: int = 0,
) -> Plan:
    """Selects the layers to remove (doc/explanation/method.md, steps 3 and 4).

    Args:
        calibration: Scores.
        budgets: Layers to remove, by module; the name of a coupled module means its group. None: with a threshold, as
            many candidates as possible; without a threshold, none. See :func:`default_plan` for the paper's share.
        threshold: τ; by default the largest that the budget allows.
        criterion: One of :data:`clp_ros.pruning.selection.CRITERIA`.
        seed: Seed of the criterion ``random``.

    Raises:
        ClpError: A module or criterion is unknown, budgets of one group differ, or no set fits.
    """
    if criterion not in CRITERIA:
        raise ClpError(
            f"unknown criterion {criterion!r}", where="criterion", hint=did_you_mean(criterion, list(CRITERIA))
        )
    check_seed(seed)
    if threshold is not None and not math.isfinite(threshold):
        raise ClpError(f"the threshold is {threshold}", where="threshold", hint="give a number, or none")
    modules = calibration.meta["modules"]
    unknown = sorted(set(budgets or ()) - set(modules))
    if unknown:
        raise ClpError(
            f"there is no module {unknown[0]!r}", where="budget", hint=did_you_mean(unknown[0], list(modules))
        )
    stacks = [_layer_stack(name, module) for name, module in modules.items()]
    plans = []
    for group, units in group_units(stacks).items():
        members = [stack for stack in stacks if stack.group == group]
        names = tuple(stack.name for stack in members)
        scores = _group_scores(calibration, members, criterion, seed)
        budget = _given_budget(names, budgets)
        if budget is None and threshold is not None and not budgets:
            most = units.count - units.min_left
            budget = max(size for size in allowed_budgets(units, scores, threshold) if size <= most)
        try:
            removed, used = select_units(scores, budget or 0, units, threshold)
        except ClpError as error:
            raise ClpError(error.what, where=" and ".join(names), hint=error.hint) from error
        plans.append(GroupPlan(group, names, scores, used, blocks(scores, used), removed))
    return Plan(criterion, tuple(plans))


def default_plan(calibration: Calibration, checkpoint: Checkpoint, criterion: str = "cka", seed: int = 0) -> Plan:
    """Returns the plan without budget and threshold: the paper's share (Table 5) of each group.

    If the structure of a stack does not allow this number, the next smaller one is used, with a note. Args and errors
    as :func:`make_plan`.
    """
    budgets: dict[str, int] = {}
    notes = []
    shares = checkpoint.family.default_budget(checkpoint.config)
    for group, units in group_units(checkpoint.layer_stacks).items():
        share, members = shares[group], [stack for stack in checkpoint.layer_stacks if stack.group == group]
        budget = max(size for size in allowed_budgets(units) if size <= share)
        budgets |= {stack.name: budget for stack in members}
        if budget < share:
            names = " and ".join(stack.name for stack in members)
            notes.append(f"{names}: {budget} layers are removed, because the paper's {share} do not fit its structure")
    return replace(make_plan(calibration, budgets, criterion=criterion, seed=seed), notes=tuple(notes))


def check_calibration(calibration: Calibration, checkpoint: Checkpoint) -> None:
    """Refuses a calibration of another checkpoint.

    Raises:
        ClpError: The fingerprints differ.
    """
    if calibration.meta["checkpoint"]["fingerprint"] != checkpoint.fingerprint():
        raise ClpError(
            f"the calibration is of another checkpoint ({calibration.meta['checkpoint']['path']})",
            where=checkpoint.path,
            hint="calibrate this checkpoint, or give the one that was calibrated",
        )


def _layer_stack(name: str, module: Mapping[str, Any]) -> LayerStack:
    """Returns a stack from its description in calibration.json, without attribute paths."""
    return LayerStack(
        name,
        module["group"],
        module["layers"],
        layer_prefix="",
        layers_path="",
        pattern_period=module["period"],
        last_output_unused=module["dead_last"],
        protected_layers=frozenset(module.get("fixed", ())),
        min_layers=module.get("least", 1),
    )


def _group_scores(calibration: Calibration, stacks: Sequence[LayerStack], criterion: str, seed: int) -> np.ndarray:
    layers = stacks[0].layers
    measured = {"cka": calibration.adjacent, "mse": calibration.mse, "cosine": calibration.cosine}.get(criterion)
    if measured is None:
        return criterion_scores(criterion, layers, seed=seed)
    unused = [stack.name for stack in stacks if stack.last_output_unused and len(stacks) > 1]
    members = {stack.name: criterion_scores(criterion, layers, measured[stack.name], seed) for stack in stacks}
    return group_scores(members, unused)


def _given_budget(names: Sequence[str], budgets: Mapping[str, int] | None) -> int | None:
    given = {budgets[name] for name in names if budgets and name in budgets}
    if len(given) > 1:
        raise ClpError(
            "they lose the same layers, but their budgets differ",
            where=" and ".join(names),
            hint="give one budget for the group",
        )
    return given.pop() if given else None
