# SPDX-License-Identifier: Apache-2.0
"""The table of a robot with one arm: a cube, a bin, a marked zone, and up to two distractors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from clp_ros.simulation.scene import WRIST_FOVY, Bin, Box, Can, Layout, Scene, Zone, aim
from clp_ros.simulation.scenes.colours import BIN, BRIGHT, DULL, ZONE, painted

# Smallest distances between the centres of two objects, in metres: room for the open gripper beside each.
_APART = {"bin": 0.16, "zone": 0.13, "can": 0.10, "brick": 0.10}
# A pushed cube, and the gripper behind it, keep this distance from the centres of the others, in metres.
_CLEAR = {"bin": 0.14, "can": 0.09, "brick": 0.09}
_YAW = 0.35


@dataclass(frozen=True)
class Workspace:
    """Where objects are drawn, in the frame of the arm: x forward, y to its left, from its base, in metres.

    Attributes:
        origin: (2,) the base, in the world's frame.
        facing: Direction of x: 1 or -1, along the world's x axis.
        near: Smallest distance forward.
        far: Largest distance forward.
        distractors: Largest distance to the side, of a distractor.
    """

    origin: tuple[float, float]
    facing: int
    near: float
    far: float
    distractors: float = 0.27

    def at(self, forward: float, left: float) -> np.ndarray:
        """Returns a position in the world's frame: (3,) float64, on the table."""
        return np.array([self.origin[0] + self.facing * forward, self.origin[1] + self.facing * left, 0.0])


_UR = Workspace((0.0, 0.0), 1, 0.40, 0.58)
_ALOHA = Workspace((0.469, 0.5), -1, 0.29, 0.43)
WORKSPACES = {"ur5": _UR, "ur10e": _UR, "aloha_single": _ALOHA}


class OneArmTable(Scene):
    """The cube in the middle, the bin on one side, the zone on the other, and up to two distractors.

    Args:
        robot: Name of the embodiment.
    """

    objects = (
        Bin("bin"),
        Zone("zone"),
        Can("can", 0.018, 0.025, 0.05),
        Box("brick", (0.03, 0.015, 0.012), 0.05),
    )

    def __init__(self, robot: str) -> None:
        self.robot = robot

    def furnish(self, spec: Any) -> None:
        """Adds the objects, and moves the camera nearer. The wrist camera of ALOHA gets a wider view."""
        super().furnish(spec)
        if self.robot == "aloha_single":
            aim(spec.camera("top"), (-0.35, 0.5, 0.5), (0.12, 0.5, 0.0), 54)
            spec.camera("right_wrist").fovy = WRIST_FOVY
        else:
            aim(spec.camera("cam_front"), (1.05, 0.0, 0.5), (0.48, 0.0, 0.03), 46)

    def draw(self, rng: np.random.Generator) -> Layout:
        """See :class:`clp_ros.simulation.scene.Scene`."""
        space = WORKSPACES[self.robot]
        while True:
            side = rng.choice([-1, 1])
            forward = rng.uniform(space.near, space.far, 5)
            cube = np.array([forward[0], rng.uniform(-0.1, 0.1)])
            box = np.array([np.clip(forward[1], space.near + 0.03, space.far - 0.03), side * rng.uniform(0.19, 0.25)])
            zone = np.array([forward[2], -side * rng.uniform(0.14, 0.24)])
            sides = rng.uniform(-space.distractors, space.distractors, 2)
            others = {"can": np.array([forward[3], sides[0]]), "brick": np.array([forward[4], sides[1]])}
            others = {name: at for name, at in others.items() if rng.random() < 0.6}
            if _is_clear(cube, zone, {"bin": box} | others):
                break
        layout = {
            "cube": painted(rng, BRIGHT, space.at(*cube), rng.uniform(-_YAW, _YAW)),
            "bin": painted(rng, BIN, space.at(*box)),
            "zone": painted(rng, ZONE, space.at(*zone)),
        }
        for name, at in others.items():
            layout[name] = painted(rng, DULL, space.at(*at), rng.uniform(-np.pi, np.pi))
        return layout


def _is_clear(cube: np.ndarray, zone: np.ndarray, others: dict[str, np.ndarray]) -> bool:
    """Returns whether there is room around each object, and on the way along which the cube is pushed."""
    places = {"zone": zone} | others
    for name, at in places.items():
        if np.linalg.norm(at - cube) < _APART[name]:
            return False
        if any(np.linalg.norm(at - there) < _APART[other] for other, there in places.items() if other != name):
            return False
    way = zone - cube
    behind = cube - 0.08 * way / np.linalg.norm(way)
    for name, at in others.items():
        share = np.clip(np.dot(at - behind, zone - behind) / np.dot(zone - behind, zone - behind), 0.0, 1.0)
        if np.linalg.norm(behind + share * (zone - behind) - at) < _CLEAR[name]:
            return False
    return True
