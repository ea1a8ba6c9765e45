# SPDX-License-Identifier: Apache-2.0
"""Building the clp.json of a surgery plan."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import clp_ros
from clp_ros.pruning.surgery_plan import SurgeryPlan


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
