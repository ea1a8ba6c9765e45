# SPDX-License-Identifier: Apache-2.0
"""Reads how a policy's processors normalise, and whether they have the necessary statistics.

Without statistics for a feature, lerobot's normaliser steps return its values unchanged and without a warning. The
model then receives raw joint positions, and its outputs are used as joint positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from clp_ros.policies.statistics import ACTION, STATE, Statistics

# The statistics that each of lerobot's normalisation modes needs.
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
        modes: lerobot's normalisation mode by feature (``observation.state``, ``action``); ``IDENTITY`` uses raw values
            by design.
        sizes: Number of components of the statistics by feature; no entry for a feature without statistics.
        missing: Features whose mode needs statistics that a step does not have; lerobot uses raw values.
        incomplete: Features with statistics, but not all that their mode needs, and the missing ones; lerobot fails.
        output_size: Number of components that the postprocessor needs in an action; None: any.
        cameras: The image features with statistics, which are those of the training data. Empty if there are none.
    """

    modes: Mapping[str, str]
    sizes: Mapping[str, int]
    missing: tuple[str, ...]
    incomplete: Mapping[str, tuple[str, ...]]
    output_size: int | None
    cameras: frozenset[str]


@dataclass(frozen=True)
class _Found:
    """How one step treats one feature."""

    mode: str
    statistics: Mapping[str, Any]
    ignored: bool = False  # the step has statistics but does not use them
    strict: bool = True  # statistics and values must have equally many components


def read_normalisation(
    preprocessor: Any, postprocessor: Any, config: Any, rename_map: Mapping[str, str]
) -> Normalisation:
    """Reads the normalisation of a policy's processors.

    Args:
        preprocessor: lerobot's pipeline from observations and actions to batches.
        postprocessor: lerobot's pipeline from the model's actions to the robot's.
        config: The policy's lerobot config. Its ``normalization_mapping`` applies to steps without a mapping.
        rename_map: The renaming of the checkpoint's preprocessor, because statistics have the data set's names.
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
        # The last step's size applies: the postprocessor returns the action.
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
    """Sets the statistics of both pipelines' normaliser steps in place, as ``lerobot-train --policy.path`` does.

    Statistics of other features stay. Steps saved with ``features: {}``, as in pi0_base, get the policy's features;
    otherwise lerobot would not normalise observations.

    Returns:
        Whether each pipeline has a step that uses statistics.
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
                step.to(device=step.device)  # creates the tensors that the step computes with
    return True


def _normalisers(pipeline: Any) -> Iterator[Any]:
    """Yields lerobot's (un)normaliser steps, and GR00T's packing steps, which scale by minimum and maximum."""
    for step in pipeline.steps:
        if hasattr(step, "stats") and (hasattr(step, "norm_map") or hasattr(step, "normalize_min_max")):
            yield step


def _find(pipeline: Any, feature: str, config: Any) -> Iterator[_Found]:
    for step in _normalisers(pipeline):
        statistics = (step.stats or {}).get(feature, {})
        if not hasattr(step, "norm_map"):
            # A GR00T N1.7 may have grouped statistics instead, whose size is not known here.
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
