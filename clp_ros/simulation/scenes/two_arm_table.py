# SPDX-License-Identifier: Apache-2.0
"""The table between two ALOHA arms: a cube on one side, a bar and a bin in the middle, and up to one distractor."""

from __future__ import annotations

from typing import Any

import numpy as np

from clp_ros.simulation.scene import WRIST_FOVY, Bin, Box, Can, Layout, Scene, aim
from clp_ros.simulation.scenes.colours import BIN, BRIGHT, DULL, ZONE, painted

_YAW = 0.25


class TwoArmTable(Scene):
    """The cube is nearer to one arm. The bar lies across the middle, so that each arm reaches one of its ends."""

    objects = (
        Bin("bin"),
        Box("bar", (0.12, 0.015, 0.015), 0.1),
        Can("can", 0.018, 0.025, 0.05),
    )

    def furnish(self, spec: Any) -> None:
        """Adds the objects, and moves the camera above the table nearer. The wrist cameras get a wider view."""
        super().furnish(spec)
        aim(spec.camera("top"), (0.0, 0.53, 0.75), (0.0, 0.53, 0.0), 50)
        for side in ("left", "right"):
            spec.camera(f"{side}_wrist").fovy = WRIST_FOVY

    def draw(self, rng: np.random.Generator) -> Layout:
        """See :class:`clp_ros.simulation.scene.Scene`."""
        side = rng.choice([-1, 1])
        cube = np.array([side * rng.uniform(0.10, 0.18), rng.uniform(0.50, 0.55), 0.0])
        bar = np.array([rng.uniform(-0.02, 0.02), rng.uniform(0.36, 0.40), 0.0])
        box = np.array([rng.uniform(-0.03, 0.03), rng.uniform(0.65, 0.67), 0.0])
        layout = {
            "cube": painted(rng, BRIGHT, cube, rng.uniform(-_YAW, _YAW)),
            "bar": painted(rng, ZONE, bar, rng.uniform(-0.08, 0.08)),
            "bin": painted(rng, BIN, box),
        }
        if rng.random() < 0.6:
            can = np.array([-side * rng.uniform(0.14, 0.20), rng.uniform(0.50, 0.64), 0.0])
            layout["can"] = painted(rng, DULL, can)
        return layout
