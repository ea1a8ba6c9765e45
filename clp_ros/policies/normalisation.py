# SPDX-License-Identifier: Apache-2.0
"""What a policy's processors normalise by, and whether they have the statistics for it.

lerobot's normaliser steps leave a value as it is where they hold no statistics for its feature: the model then sees raw
joint positions, and what it gives is taken for joint positions. Nothing in lerobot says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from clp_ros.policies.statistics import ACTION, STATE, Statistics

# The statistics that lerobot's normalisation modes go by.
MODE_STATISTICS = {
    "MEAN_STD": ("mean", "std"),
    "MIN_MAX": ("min", "max"),
    "QUANTILES": ("q01", "q99"),
    "QUANTILE10": ("q10", "q90"),
}
_KINDS = {STATE: "STATE", ACTION: "ACTION"}  # lerobot's FeatureType, by feature
_ANY_STATISTICS = ("mean", "min", "q01", "q10")


@dataclass(frozen=True)
class Normalisation:
    """How a policy's processors treat its state and its actions.

    Attributes:
        modes: lerobot's normalisation mode by feature (``observation.state``, ``action``); ``IDENTITY`` takes values as
            they are, on purpose.
        sizes: Number of components of a feature's statistics, by feature; no entry where there are none.
        missing: Features whose mode asks for statistics that a step does not have: lerobot uses their raw values.
        incomplete: Features that have statistics, but not those of their mode, with the ones they lack: lerobot fails.
        output_size: Number of components an action must have for the postprocessor; None where it takes any.
        cameras: The image features that have statistics: those of the data set the policy was trained on. Empty where
            none has.
    """

    modes: Mapping[str, str]
    sizes: Mapping[str, int]
    missing: tuple[str, ...]
    incomplete: Mapping[str, tuple[str, ...]]
    output_size: int | None
    cameras: frozenset[str]


@dataclass(frozen=True)
class _Found:
    """What one step does to one feature."""

    mode: str
    statistics: Mapping[str, Any]
    ignored: bool = False  # the step has statistics, and does not use them
    strict: bool = True  # they must have as many components as the values


def read_normalisation(
    preprocessor: Any, postprocessor: Any, config: Any, rename_map: Mapping[str, str]
) -> Normalisation:
    """Reads it out of a policy's processors.

    Args:
        preprocessor: lerobot's pipeline of observations and actions into batches.
        postprocessor: lerobot's pipeline of the model's actions into the robot's.
        config: The policy's lerobot config, whose ``normalization_mapping`` counts where a step has none.
        rename_map: What the checkpoint's preprocessor renames: statistics are under the data set's own names.
    """
    found = {
        STATE: list(_find(preprocessor, STATE, config)),
        ACTION: [*_find(preprocessor, ACTION, config), *_find(postprocessor, ACTION, config)],
    }
    modes, sizes, missing, incomplete = {}, {}, [], {}
    for feature, steps in found.items():
        if not steps:
            steps = [_Found(_configured_mode(config, _KINDS[feature]), {})]
        modes[feature] = next((step.mode for step in steps if step.mode != "IDENTITY"), "IDENTITY")
        # The last step's count: an action is what the postprocessor gives.
        for size in (_size(step) for step in steps):
            if size is not None:
                sizes[feature] = size
        for step in steps:
            needed = MODE_STATISTICS.get(step.mode, ())
            lacking = tuple(name for name in needed if name not in step.statistics)
            if step.mode != "IDENTITY" and (not step.statistics or step.ignored):
                missing.append(feature)
            elif lacking:
                incomplete[feature] = lacking
    cameras = {
        rename_map.get(name, name)
        for step in _normalisers(preprocessor)
        for name in (step.stats or {})
        if name.startswith("observation.image")
    }
    output = [_size(step) for step in _find(postprocessor, ACTION, config) if step.strict and step.mode != "IDENTITY"]
    return Normalisation(
        modes, sizes, tuple(dict.fromkeys(missing)), incomplete, next(iter(output), None), frozenset(cameras)
    )


def normalise_by(preprocessor: Any, postprocessor: Any, config: Any, statistics: Statistics) -> bool:
    """Gives the normaliser steps of both pipelines these statistics, in place, as ``lerobot-train --policy.path`` does.

    Statistics that the steps have for other features stay. Steps saved with ``features: {}``, as those of pi0_base,
    get the policy's features: without, lerobot normalises no observation.

    Returns:
        Whether each of the two has a step that takes them.
    """
    import torch

    values = {
        feature: {name: torch.tensor(value, dtype=torch.float32) for name, value in numbers.items()}
        for feature, numbers in statistics.values.items()
    }
    for pipeline, features in (
        (preprocessor, {**config.input_features, **config.output_features}),
        (postprocessor, dict(config.output_features)),
    ):
        steps = list(_normalisers(pipeline))
        if not steps:
            return False
        for step in steps:
            step.stats = {**(step.stats or {}), **values}
            if hasattr(step, "norm_map"):
                step.features = features
                step.norm_map = {_kind(name): mode for name, mode in config.normalization_mapping.items()}
                step.to(device=step.device)  # makes the tensors it computes with
    return True


def _normalisers(pipeline: Any) -> Iterator[Any]:
    """lerobot's (un)normaliser steps, and GR00T's, which scale by minimum and maximum while they pack and unpack."""
    for step in pipeline.steps:
        if hasattr(step, "stats") and (hasattr(step, "norm_map") or hasattr(step, "normalize_min_max")):
            yield step


def _find(pipeline: Any, feature: str, config: Any) -> Iterator[_Found]:
    for step in _normalisers(pipeline):
        statistics = (step.stats or {}).get(feature, {})
        if not hasattr(step, "norm_map"):
            # A GR00T N1.7 may have statistics of its own in groups instead, which name no component count here.
            grouped = bool(getattr(step, "raw_stats", None))
            yield _Found("MIN_MAX" if step.normalize_min_max and not grouped else "IDENTITY", statistics, strict=False)
            continue
        only = step.normalize_observation_keys
        used = feature == ACTION or (feature in step.features and (only is None or feature in only))
        kind = _KINDS[feature] if feature == ACTION or not used else step.features[feature].type.value
        mode = next((mode.value for key, mode in step.norm_map.items() if key.value == kind), None)
        yield _Found(mode or _configured_mode(config, kind), statistics, ignored=not used or mode is None)


def _configured_mode(config: Any, kind: str) -> str:
    mode = (getattr(config, "normalization_mapping", None) or {}).get(kind)
    return "IDENTITY" if mode is None else mode.value


def _kind(name: Any) -> Any:
    from lerobot.configs.types import FeatureType

    return FeatureType(name)


def _size(step: _Found) -> int | None:
    for name in (*MODE_STATISTICS.get(step.mode, ()), *_ANY_STATISTICS):
        if name in step.statistics:
            return int((np.shape(step.statistics[name]) or (1,))[-1])
    return None
