# SPDX-License-Identifier: Apache-2.0
"""The arms of the simulated robots: tool, gripper and the joints that move them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from scipy.spatial.transform import Rotation

from clp_ros.robots.embodiment import Embodiment


@dataclass(frozen=True)
class Arm:
    """An arm with six joints and a gripper.

    Attributes:
        name: ``arm``, or ``left`` and ``right``.
        first: Index of its first joint in the action. The gripper's joint follows its six joints.
        site: The model's site between the fingertips.
        down: Orientation of the site where the gripper points down and its fingers close along the world's y axis.
        level: Orientation where the gripper points forward; None: the arm is not used so.
        fingers: Names of the two fingers' shapes.
        opened: Position of the gripper's joint where it is open, rad or m.
        grasp: Position that is commanded to hold an object of 3 to 4 cm, rad or m.
        shut: Position where it is closed without an object, rad or m.
        stroke_s: Shortest time from open to closed, in seconds.
    """

    name: str
    first: int
    site: str
    down: Rotation
    level: Rotation | None
    fingers: tuple[str, str]
    opened: float
    grasp: float
    shut: float
    stroke_s: float = 0.4

    @property
    def joints(self) -> slice:
        """Its six joints in the action."""
        return slice(self.first, self.first + 6)

    @property
    def gripper(self) -> int:
        """The gripper's joint in the action."""
        return self.first + 6

    def turned_down(self, yaw: float) -> Rotation:
        """Returns the orientation that points down, turned about the vertical by ``yaw`` rad."""
        return Rotation.from_euler("z", yaw) * self.down


def arms_of(embodiment: Embodiment) -> dict[str, Arm]:
    """Returns the arms of an embodiment that can be simulated, by name."""
    if not embodiment.name.startswith("aloha"):
        down = Rotation.from_euler("ZYX", (math.pi / 2, 0.0, math.pi))
        return {"arm": Arm("arm", 0, "tool", down, None, ("left_finger", "right_finger"), 0.0, 0.6, 0.8)}
    sides = ("left", "right") if embodiment.action_size == 14 else ("right",)
    found = {}
    for index, side in enumerate(sides):
        facing = Rotation.from_euler("z", math.pi if side == "right" else 0.0)
        fingers = (f"vx300s_{side}/10_left_gripper_finger", f"vx300s_{side}/10_right_gripper_finger")
        down = facing * Rotation.from_euler("y", math.pi / 2)
        site = f"cali_{side}_site1"
        found[side] = Arm(side, 7 * index, site, down, facing, fingers, 0.057, 0.021, 0.021)
    return found
