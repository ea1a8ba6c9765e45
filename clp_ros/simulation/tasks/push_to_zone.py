# SPDX-License-Identifier: Apache-2.0
"""Push the cube to the marked zone."""

from __future__ import annotations

import numpy as np

from clp_ros.simulation import skills
from clp_ros.simulation.scene import Scene
from clp_ros.simulation.scenes.one_arm_table import OneArmTable
from clp_ros.simulation.task import Goal, SimulatedTask, TaskState

# Distance between the centres of cube and zone that counts as there, and at which the expert stops, in metres.
_THERE_M, _STOP_M = 0.035, 0.018
# A cube whose centre is not higher than this lies on the table, in metres.
_ON_TABLE_M = 0.03
_STILL = 0.02


class PushToZone(SimulatedTask):
    """The cube rests on the table, with its centre well inside the zone."""

    name = "push_to_zone"
    robots = ("ur5", "ur10e", "aloha_single")
    wordings = (
        "Push the cube to the marked zone.",
        "Push the {cube} cube onto the {zone} disc.",
        "Slide the cube into the zone.",
    )

    def scene(self, robot: str) -> Scene:
        """See :class:`SimulatedTask`."""
        return OneArmTable(robot)

    def success(self, state: TaskState) -> bool:
        """See :class:`SimulatedTask`."""
        cube = state.objects["cube"]
        low = cube.position[2] < _ON_TABLE_M
        return bool(_distance(state) < _THERE_M and low and not cube.held_by and cube.speed < _STILL)

    def goals(self, state: TaskState) -> dict[str, Goal]:
        """See :class:`SimulatedTask`."""
        ((name, arm),) = state.arms.items()
        if _distance(state) < _STOP_M:
            return {name: skills.retreat(arm, 0.12, arm.arm.shut)}
        return {name: skills.push(arm, state.objects["cube"], state.objects["zone"].position[:2])}


def _distance(state: TaskState) -> float:
    return float(np.linalg.norm(state.objects["cube"].position[:2] - state.objects["zone"].position[:2]))


TASK = PushToZone()
