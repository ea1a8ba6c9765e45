# SPDX-License-Identifier: Apache-2.0
"""Put the cube into the bin; with two arms, by the one that is nearer to the cube."""

from __future__ import annotations

import numpy as np

from clp_ros.simulation import skills
from clp_ros.simulation.scene import Bin, Scene
from clp_ros.simulation.scenes.one_arm_table import OneArmTable
from clp_ros.simulation.scenes.two_arm_table import TwoArmTable
from clp_ros.simulation.task import Goal, SimulatedTask, TaskState

# Height of the tool above the table while it carries the cube, and where it drops the cube, in metres.
_CARRY_M, _DROP_M = 0.15, 0.075


class PutIntoBin(SimulatedTask):
    """The cube lies in the bin, and no gripper touches it."""

    name = "put_into_bin"
    robots = ("ur5", "ur10e", "aloha_single", "aloha_bimanual")
    wordings = ("Put the cube into the bin.", "Drop the {cube} cube into the {bin} bin.", "Place the cube in the bin.")

    def scene(self, robot: str) -> Scene:
        """See :class:`SimulatedTask`."""
        return TwoArmTable() if robot == "aloha_bimanual" else OneArmTable(robot)

    def success(self, state: TaskState) -> bool:
        """See :class:`SimulatedTask`."""
        return _is_inside(state) and not state.objects["cube"].touched_by

    def goals(self, state: TaskState) -> dict[str, Goal]:
        """See :class:`SimulatedTask`."""
        cube, box = state.objects["cube"], state.objects["bin"]
        goals = {}
        start = state.layout["cube"].position
        for name, arm in state.arms.items():
            if len(state.arms) > 1 and (name == "right") != (start[0] > 0):
                continue  # The arm that is farther from the cube rests.
            above_bin = np.linalg.norm(arm.position[:2] - box.position[:2]) < 0.03
            dropping = above_bin and arm.opening_command > 0.05 and arm.arm.name in cube.touched_by
            if _is_inside(state) or dropping:
                low = dropping and not _is_inside(state)
                goals[name] = skills.retreat(arm, _DROP_M if low else _CARRY_M, arm.arm.opened)
            elif skills.is_firm(arm, cube):
                goals[name] = skills.drop_into(arm, box.position, _DROP_M, _CARRY_M)
            else:
                goals[name] = skills.grasp(arm, cube, skills.grasp_yaw(arm, cube.yaw))
        return goals


def _is_inside(state: TaskState) -> bool:
    cube, box = state.objects["cube"].position, state.objects["bin"].position
    return bool(np.abs(cube[:2] - box[:2]).max() < Bin.half and cube[2] < Bin.rim)


TASK = PutIntoBin()
