# SPDX-License-Identifier: Apache-2.0
"""Pick the cube up with the nearer arm, and hand it over to the other one."""

from __future__ import annotations

import numpy as np
from scipy.spatial.transform import Rotation

from clp_ros.simulation import skills
from clp_ros.simulation.arms import Arm
from clp_ros.simulation.scene import Scene
from clp_ros.simulation.scenes.two_arm_table import TwoArmTable
from clp_ros.simulation.task import ArmState, Goal, SimulatedTask, TaskState

# Where the arms meet, where the receiving tool waits, and where both go afterwards from there, in metres.
_MEET = np.array([0.0, 0.5, 0.24])
_READY_M, _AWAY_M = 0.14, 0.12
_HELD_M = 0.10
_LIFT_M = 0.10


class HandOver(SimulatedTask):
    """Only the arm that was farther from the cube holds it, above the table."""

    name = "hand_over"
    robots = ("aloha_bimanual",)
    wordings = (
        "Hand the cube over to the other arm.",
        "Pick up the {cube} cube with one arm and give it to the other.",
        "Pass the cube from one gripper to the other.",
    )
    hold_s = 0.5

    def scene(self, robot: str) -> Scene:
        """See :class:`SimulatedTask`."""
        return TwoArmTable()

    def success(self, state: TaskState) -> bool:
        """See :class:`SimulatedTask`."""
        cube = state.objects["cube"]
        _, taker = _roles(state)
        only = cube.touched_by == {taker.arm.name} and cube.held_by == cube.touched_by
        return bool(only and cube.position[2] > _HELD_M)

    def goals(self, state: TaskState) -> dict[str, Goal]:
        """See :class:`SimulatedTask`."""
        cube = state.objects["cube"]
        giver, taker = _roles(state)
        side = 1.0 if giver.arm.name == "right" else -1.0
        giving, taking = giver.arm.level, _turned(taker.arm)
        ready = _MEET - np.array([side * _READY_M, 0, 0])
        wait = Goal(ready, taking, taker.arm.opened)
        if skills.is_firm(taker, cube):
            released = giver.arm.name not in cube.touched_by and giver.opening > 0.6
            away = giver.position + np.array([side * 0.05, 0, 0]) if released else giver.position
            if side * (giver.position[0] - _MEET[0]) > _AWAY_M:
                away = giver.position
            held = taker.position.copy()
            return {
                giver.arm.name: Goal(away, giving, giver.arm.opened, 0.7),
                taker.arm.name: Goal(held, taking, taker.arm.grasp),
            }
        if skills.is_firm(giver, cube):
            if giver.position[2] < _LIFT_M and np.abs(giver.position[:2] - _MEET[:2]).max() > 0.04:
                carry = skills.retreat(giver, _MEET[2], giver.arm.grasp)
            else:
                carry = Goal(_MEET, giving, giver.arm.grasp)
            arrived = np.linalg.norm(giver.position - _MEET) < 0.02 and _off(giver, giving) < 0.1
            take = _take(taker, cube.position, taking, wait) if arrived else wait
            return {giver.arm.name: carry, taker.arm.name: take}
        return {giver.arm.name: skills.grasp(giver, cube, skills.grasp_yaw(giver, cube.yaw)), taker.arm.name: wait}


def _roles(state: TaskState) -> tuple[ArmState, ArmState]:
    """Returns the arm that gives and the arm that takes."""
    names = ("right", "left") if state.layout["cube"].position[0] > 0 else ("left", "right")
    return state.arms[names[0]], state.arms[names[1]]


def _turned(arm: Arm) -> Rotation:
    """Returns the level orientation in which the fingers close on the faces that the other gripper leaves free."""
    if arm.level is None:
        raise ValueError(f"{arm.name} has no level orientation")
    return arm.level * Rotation.from_euler("x", np.pi / 2)


def _off(arm: ArmState, rotation: Rotation | None) -> float:
    """Returns the angle between the arm's tool and an orientation, in rad."""
    if rotation is None:
        raise ValueError(f"{arm.arm.name} has no level orientation")
    return float((rotation * Rotation.from_matrix(arm.rotation).inv()).magnitude())


def _take(arm: ArmState, cube: np.ndarray, rotation: Rotation, wait: Goal) -> Goal:
    """Returns the goal that takes the cube out of the other gripper: open to it, then close."""
    away = float(np.linalg.norm(arm.position - cube))
    closing = arm.opening_command < 0.95
    if away < (0.02 if closing else 0.01):
        return Goal(cube, rotation, arm.arm.grasp)
    if arm.opening < 0.7 or _off(arm, rotation) > 0.15:
        return wait
    return Goal(cube, rotation, arm.arm.opened, 0.6)


TASK = HandOver()
