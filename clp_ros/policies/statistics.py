# SPDX-License-Identifier: Apache-2.0
"""Statistics of states and actions: a LeRobotDataset's, or those of given episodes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clp_ros.core.errors import ClpError
from clp_ros.core.json_object import read_json_object

STATE, ACTION = "observation.state", "action"
DATASET_STATISTICS = "meta/stats.json"
_STATISTICS_V21 = "meta/episodes_stats.jsonl"
_QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}
_NAMES = ("mean", "std", "min", "max", *_QUANTILES)


@dataclass(frozen=True)
class Statistics:
    """Statistics for the normalisation.

    Attributes:
        values: By feature (``observation.state`` and ``action``) and name (``mean``, ``std``, ``min``, ``max``,
            ``q01`` …): one number a component, in the policy's units.
        source: Their origin, for calibration.json: ``source`` (``dataset`` or ``bags``) and details.
    """

    values: Mapping[str, Mapping[str, tuple[float, ...]]]
    source: Mapping[str, Any]

    def size(self, feature: str) -> int:
        """Returns the number of components of a feature."""
        return len(next(iter(self.values[feature].values())))

    def describe(self) -> dict[str, Any]:
        """Returns the source and the values, for calibration.json."""
        values = {name: {key: list(value) for key, value in one.items()} for name, one in self.values.items()}
        return {**self.source, "values": values}


def read_dataset_statistics(folder: str | Path) -> Statistics:
    """Reads the statistics of state and action of a LeRobotDataset (``meta/stats.json``).

    Raises:
        ClpError: There are none, or they are damaged.
    """
    folder = Path(folder)
    path = folder / DATASET_STATISTICS
    hint = "give the folder of a LeRobotDataset (v2.0 or v3), or `bags` for the calibration bags' own statistics"
    if not path.is_file():
        if (folder / _STATISTICS_V21).is_file():
            raise ClpError(
                "the folder is a LeRobotDataset v2.1, which has only statistics of each episode",
                where=folder,
                hint="convert it (python -m lerobot.scripts.convert_dataset_v21_to_v30 --help), or use `bags`",
            )
        what = f"there is no {DATASET_STATISTICS}" if folder.is_dir() else "there is no such folder"
        raise ClpError(what, where=folder, hint=hint)
    try:
        document = read_json_object(path)
    except OSError as error:
        raise ClpError(f"the file cannot be read ({error.strerror or error})", where=path, hint=hint) from error
    values = {feature: _vectors(document.get(feature), feature, path) for feature in (STATE, ACTION)}
    return Statistics(values, {"source": "dataset", "path": str(folder.resolve())})


def _vectors(found: Any, feature: str, path: Path) -> dict[str, tuple[float, ...]]:
    hint = "compute the dataset's statistics again, or use `bags`"
    if not isinstance(found, dict):
        raise ClpError(f"the file has no statistics of {feature}", where=path, hint=hint)
    vectors = {name: found[name] for name in _NAMES if name in found}
    for name, vector in vectors.items():
        if not isinstance(vector, list) or not all(type(one) in (int, float) and math.isfinite(one) for one in vector):
            raise ClpError(f"{name} of {feature} is not a list of finite numbers", where=path, hint=hint)
    if not vectors or len({len(vector) for vector in vectors.values()}) > 1 or not min(map(len, vectors.values())):
        raise ClpError(f"the statistics of {feature} are missing or differ in length", where=path, hint=hint)
    for low, high in (("min", "max"), ("q01", "q99"), ("q10", "q90")):
        if any(one > other for one, other in zip(vectors.get(low, ()), vectors.get(high, ()), strict=False)):
            raise ClpError(f"{low} of {feature} is above {high}", where=path, hint=hint)
    if min(vectors.get("std", [0])) < 0:
        raise ClpError(f"std of {feature} is negative", where=path, hint=hint)
    return {name: tuple(map(float, vector)) for name, vector in vectors.items()}


def compute_statistics(states: Sequence[Sequence[np.ndarray]], actions: Sequence[Sequence[np.ndarray]]) -> Statistics:
    """Computes exact statistics over all steps of some episodes. Quantiles are linearly interpolated.

    Args:
        states: (state_size,) a step, by episode, in the policy's units.
        actions: (action_size,) a step, by episode, in the policy's units.
    """
    values = {}
    for feature, episodes in ((STATE, states), (ACTION, actions)):
        steps = np.concatenate([np.asarray(episode, dtype=np.float64) for episode in episodes])
        numbers = {
            "mean": steps.mean(axis=0),
            "std": steps.std(axis=0),
            "min": steps.min(axis=0),
            "max": steps.max(axis=0),
        }
        numbers |= {name: np.quantile(steps, share, axis=0) for name, share in _QUANTILES.items()}
        values[feature] = {name: tuple(vector.tolist()) for name, vector in numbers.items()}
    count = sum(len(episode) for episode in states)
    return Statistics(values, {"source": "bags", "steps": count})
