# SPDX-License-Identifier: Apache-2.0
"""Builds the clp.json of a surgery plan."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import clp_ros
from clp_ros.checkpoints.layer_stack import LayerStack
from clp_ros.pruning.surgery_plan import SurgeryPlan


def build_manifest(
    plan: SurgeryPlan,
    criterion: str,
    thresholds: Mapping[str, float | None],
    scores: Mapping[str, Sequence[float]],
) -> dict[str, Any]:
    """Returns the clp.json of a plan (:class:`clp_ros.checkpoints.manifest.Manifest`). That of a pruned source is
    continued."""
    checkpoint = plan.checkpoint
    records = {stack.name: _record(plan, stack, thresholds, scores) for stack in checkpoint.layer_stacks}
    used = {record["threshold"] for record in records.values() if record["removed"]}
    step = {
        "source": {"path": str(checkpoint.path), "fingerprint": checkpoint.fingerprint()},
        "criterion": criterion,
        "threshold": used.pop() if len(used) == 1 else None,
        "modules": records,
        "parameters": {"before": checkpoint.parameters(), "after": plan.parameters},
    }
    earlier = copy.deepcopy(checkpoint.manifest)
    first: Mapping[str, Any] = earlier or step
    return {
        "schema_version": 3,
        "clp_ros_version": clp_ros.__version__,
        "family": checkpoint.family.name,
        "source": first["source"],
        "criterion": criterion,
        "threshold": step["threshold"],
        "modules": {name: _since_first(earlier["modules"][name], record) for name, record in records.items()}
        if earlier
        else records,
        "parameters": {"before": first["parameters"]["before"], "after": plan.parameters},
        "steps": [*(earlier["steps"] if earlier else []), step],
    }


def _record(
    plan: SurgeryPlan,
    stack: LayerStack,
    thresholds: Mapping[str, float | None],
    scores: Mapping[str, Sequence[float]],
) -> dict[str, Any]:
    """Returns the record of a stack's removed units, in the source's numbers."""
    given = [float(score) for score in scores[stack.name]] if stack.name in scores else None
    if given is not None and len(given) != stack.layers - 1:
        raise ValueError(f"{stack.name} has {stack.layers} layers, so {stack.layers - 1} scores, not {len(given)}")
    threshold = thresholds.get(stack.name)
    units: dict[str, dict[str, Any]] = {}
    for layer, kept in plan.kept_inside.get(stack.name, {}).items():
        for kind in stack.inner_units[layer]:
            if kind.name in kept:
                removed = list(kind.without(kept[kind.name]))
                units.setdefault(kind.name, {})[str(layer)] = {"original": kind.count, "removed": removed}
    return {
        "original_layers": stack.layers,
        "removed": list(plan.removal[stack.name]),
        "kept": list(plan.kept[stack.name]),
        "threshold": None if threshold is None else float(threshold),
        "scores": given,
        "units": units,
    }


def _since_first(earlier: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a stack's record in the first source's numbers, with the last step's threshold and scores."""
    kept = [earlier["kept"][layer] for layer in record["kept"]]
    layers = earlier["original_layers"]
    removed = sorted(set(range(layers)) - set(kept))
    units: dict[str, dict[str, Any]] = {
        kind: {layer: inner for layer, inner in layers.items() if int(layer) in kept}
        for kind, layers in earlier.get("units", {}).items()
    }
    for kind, inner_layers in record["units"].items():
        known = units.setdefault(kind, {})
        for layer, now in inner_layers.items():
            first = str(earlier["kept"][int(layer)])
            original, gone = known[first].values() if first in known else (now["original"], [])
            left = sorted(set(range(original)) - set(gone))
            known[first] = {"original": original, "removed": sorted([*gone, *(left[unit] for unit in now["removed"])])}
    return {**record, "original_layers": layers, "removed": removed, "kept": kept, "units": units}
