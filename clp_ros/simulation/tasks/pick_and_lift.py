# SPDX-License-Identifier: Apache-2.0
"""Pick the cube up and hold it in the air."""

from __future__ import annotations

import numpy as np

from clp_ros.simulation import skills
from clp_ros.simulation.scene import Scene
from clp_ros.simulation.scenes.one_arm_table import OneArmTable
from clp_ros.simulation.task import Goal, SimulatedTask, TaskState

# Height of the cube's centre above the table that counts as lifted, and where the expert stops, in metres.
_LIFTED_M, _STOP_M = 0.10, 0.16
# A held cube that moves slower than this is not on its way to somewhere else, in m/s.
_STILL = 0.06
# Beside the bin's centre, the cube is not lifted but carried, in metres.
_BESIDE_BIN_M = 0.09


class PickAndLift(SimulatedTask):
    """The cube is held still, above the table and not above the bin."""

    name = "pick_and_lift"
    robots = ("ur5", "ur10e", "aloha_single")
    wordings = ("Pick up the cube and lift it.", "Lift the {cube} cube.", "Take the cube and hold it up.")
    hold_s = 0.5

    def scene(self, robot: str) -> Scene:
        """See :class:`SimulatedTask`."""
        return OneArmTable(robot)

    def success(self, state: TaskState) -> bool:
        """See :class:`SimulatedTask`."""
        cube = state.objects["cube"]
        beside = np.linalg.norm(cube.position[:2] - state.objects["bin"].position[:2])
        lifted = cube.position[2] > _LIFTED_M and beside > _BESIDE_BIN_M
        return bool(lifted and cube.held_by and cube.speed < _STILL)

    def goals(self, state: TaskState) -> dict[str, Goal]:
        """See :class:`SimulatedTask`."""
        ((name, arm),) = state.arms.items()
        cube = state.objects["cube"]
        if skills.is_firm(arm, cube):
            return {name: skills.retreat(arm, _STOP_M, arm.arm.grasp)}
        return {name: skills.grasp(arm, cube, skills.grasp_yaw(arm, cube.yaw))}


TASK = PickAndLift()
