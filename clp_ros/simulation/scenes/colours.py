# SPDX-License-Identifier: Apache-2.0
"""Colours of the scenes' objects. Only what a task is about has bright ones, so that distractors can be told apart."""

from __future__ import annotations

from types import MappingProxyType

import numpy as np

from clp_ros.simulation.scene import Placement

Palette = MappingProxyType[str, tuple[float, float, float, float]]

BRIGHT: Palette = MappingProxyType(
    {
        "red": (0.9, 0.08, 0.08, 1.0),
        "green": (0.05, 0.65, 0.15, 1.0),
        "blue": (0.1, 0.25, 0.95, 1.0),
        "yellow": (1.0, 0.85, 0.05, 1.0),
    }
)
ZONE: Palette = MappingProxyType(
    {"pink": (1.0, 0.35, 0.75, 1.0), "turquoise": (0.1, 0.85, 0.85, 1.0), "white": (1.0, 1.0, 1.0, 1.0)}
)
BIN: Palette = MappingProxyType(
    {"purple": (0.35, 0.15, 0.55, 1.0), "brown": (0.4, 0.2, 0.08, 1.0), "orange": (0.95, 0.5, 0.1, 1.0)}
)
DULL: Palette = MappingProxyType(
    {
        "grey": (0.5, 0.5, 0.52, 1.0),
        "beige": (0.85, 0.78, 0.65, 1.0),
        "olive": (0.4, 0.42, 0.2, 1.0),
        "slate": (0.3, 0.36, 0.42, 1.0),
    }
)


def painted(rng: np.random.Generator, palette: Palette, position: np.ndarray, yaw: float = 0.0) -> Placement:
    """Returns a placement with a colour drawn from a palette."""
    name = list(palette)[rng.integers(len(palette))]
    return Placement(np.asarray(position, dtype=np.float64), float(yaw), name, palette[name])
