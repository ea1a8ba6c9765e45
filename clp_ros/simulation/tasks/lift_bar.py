# SPDX-License-Identifier: Apache-2.0
"""Lift the bar with both arms, an end in each gripper."""

from __future__ import annotations

import numpy as np

from clp_ros.simulation import skills
from clp_ros.simulation.scene import Scene
from clp_ros.simulation.scenes.two_arm_table import TwoArmTable
from clp_ros.simulation.task import Goal, SimulatedTask, TaskState

# Height of the bar's centre that counts as lifted, and where the expert stops, in metres.
_LIFTED_M, _STOP_M = 0.10, 0.15
# Where an arm grasps the bar, from its centre, in metres.
_END_M = 0.09
# Largest slope of a bar that is level.
_LEVEL, _STILL = 0.25, 0.06


class LiftBar(SimulatedTask):
    """Both grippers hold the bar, which is level and still above the table."""

    name = "lift_bar"
    robots = ("aloha_bimanual",)
    wordings = ("Lift the bar with both arms.", "Pick up the {bar} bar with both grippers.", "Raise the bar together.")

    def scene(self, robot: str) -> Scene:
        """See :class:`SimulatedTask`."""
        return TwoArmTable()

    def success(self, state: TaskState) -> bool:
        """See :class:`SimulatedTask`."""
        bar = state.objects["bar"]
        level = abs(bar.rotation[2, 0]) < _LEVEL
        return bool(len(bar.held_by) == 2 and bar.position[2] > _LIFTED_M and level and bar.speed < _STILL)

    def goals(self, state: TaskState) -> dict[str, Goal]:
        """See :class:`SimulatedTask`."""
        bar = state.objects["bar"]
        firm = {name: skills.is_firm(arm, bar) for name, arm in state.arms.items()}
        along = bar.rotation[:, 0] * np.sign(bar.rotation[0, 0])
        goals = {}
        for name, arm in state.arms.items():
            end = along * (_END_M if name == "right" else -_END_M)
            yaw = skills.grasp_yaw(arm, bar.yaw, np.pi)
            if all(firm.values()):
                # Neither arm goes ahead of the other.
                height = min(_STOP_M, min(one.position[2] for one in state.arms.values()) + 0.03)
                goals[name] = skills.retreat(arm, height, arm.arm.grasp)
            elif firm[name]:
                goals[name] = Goal(arm.position.copy(), arm.arm.turned_down(yaw), arm.arm.grasp)
            else:
                goals[name] = skills.grasp(arm, bar, yaw, end)
        return goals


TASK = LiftBar()
