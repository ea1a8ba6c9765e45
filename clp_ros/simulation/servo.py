# SPDX-License-Identifier: Apache-2.0
"""Moves an arm's command toward a goal, one control step at a time: speed and acceleration of the tool are limited."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation

from clp_ros.robots.embodiment import Embodiment
from clp_ros.simulation.arms import Arm
from clp_ros.simulation.model import load_mujoco
from clp_ros.simulation.task import Goal

# Largest speeds and accelerations of a tool at speed 1: m/s, m/s², rad/s, rad/s².
_SPEED, _ACCELERATION, _TURN, _TURN_ACCELERATION = 0.35, 1.5, 1.6, 8.0
# Speed for each metre or rad from the goal, 1/s.
_GAIN = 5.0
# Share of the joints' velocity limits that is used.
_SHARE = 0.9
# Damping of the inverse kinematics.
_DAMPING = 0.02


class ArmServo:
    """Commands of one arm.

    Args:
        embodiment: The robot.
        arm: The arm.
        model: The ``mujoco.MjModel``.
        addresses: (6,) indices of the arm's joints in ``qpos``.
        dofs: (6,) indices of the arm's joints in ``qvel``.
        speed: Factor on all speeds.
    """

    def __init__(
        self, embodiment: Embodiment, arm: Arm, model: Any, addresses: np.ndarray, dofs: np.ndarray, speed: float = 1.0
    ) -> None:
        self.arm = arm
        self._mujoco, self._model = load_mujoco(), model
        self._data = self._mujoco.MjData(model)
        self._site = model.site(arm.site).id
        self._addresses, self._dofs = addresses, dofs
        self._period_s = embodiment.period_ns / 1e9
        joints = [*embodiment.joints[arm.joints], embodiment.joints[arm.gripper]]
        self._lower, self._upper = (np.array([getattr(one, side) for one in joints]) for side in ("lower", "upper"))
        self._step = _SHARE * self._period_s * np.array([one.velocity for one in joints])
        stroke = abs(arm.opened - arm.grasp) * self._period_s / arm.stroke_s
        self._step[6] = min(self._step[6], stroke)
        self._speed = speed
        self._jacobian = np.zeros((6, model.nv))
        self.reset()

    def reset(self) -> None:
        """Forgets the present speed."""
        self._linear, self._angular = np.zeros(3), np.zeros(3)

    def follow(self, command: np.ndarray, goal: Goal, sag: np.ndarray) -> np.ndarray:
        """Returns the command of the next control step: (7,) rad or m.

        Args:
            command: (7,) the last command of the arm's joints and of its gripper, rad or m.
            goal: Where the tool is wanted.
            sag: (3,) how far the measured tool is from the commanded one, in metres; the goal is moved against it.
        """
        position, rotation = self.kinematics(command[:6])
        factor = self._speed * goal.speed
        target = goal.position - sag
        limit = _ACCELERATION * self._speed**2
        self._linear = _changed(self._linear, target - position, _SPEED * factor, limit, self._period_s)
        turn = (goal.rotation * Rotation.from_matrix(rotation).inv()).as_rotvec()
        limit = _TURN_ACCELERATION * self._speed**2
        self._angular = _changed(self._angular, turn, _TURN * self._speed, limit, self._period_s)
        move = self.joint_steps(np.concatenate([self._linear, self._angular]) * self._period_s)
        largest = float(np.max(np.abs(move) / self._step[:6], initial=1.0))
        wanted = np.append(command[:6] + move / largest, goal.gripper)
        wanted[6] = command[6] + np.clip(goal.gripper - command[6], -self._step[6], self._step[6])
        return np.clip(wanted, self._lower, self._upper)

    def kinematics(self, joints: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns position (3,) in metres and rotation (3, 3) of the tool at some joint positions, (6,) rad."""
        self._data.qpos[self._addresses] = joints
        self._mujoco.mj_kinematics(self._model, self._data)
        return self._data.site_xpos[self._site].copy(), self._data.site_xmat[self._site].reshape(3, 3).copy()

    def joint_steps(self, step: np.ndarray) -> np.ndarray:
        """Returns the change of the joints, (6,) rad, that moves the tool; from where :meth:`kinematics` was called.

        Args:
            step: (6,) change of the position in metres, and rotation vector in rad.
        """
        self._mujoco.mj_comPos(self._model, self._data)
        self._mujoco.mj_jacSite(self._model, self._data, self._jacobian[:3], self._jacobian[3:], self._site)
        jacobian = self._jacobian[:, self._dofs]
        return jacobian.T @ np.linalg.solve(jacobian @ jacobian.T + _DAMPING**2 * np.eye(6), step)


def _changed(now: np.ndarray, error: np.ndarray, speed: float, acceleration: float, period_s: float) -> np.ndarray:
    """Returns the velocity of the next control step, that brings an error to zero within the limits."""
    distance = float(np.linalg.norm(error))
    wanted: np.ndarray = np.zeros(3)
    if distance > 1e-9:
        fastest = min(speed, _GAIN * distance, math.sqrt(acceleration * distance))
        wanted = error * (fastest / distance)
    change = wanted - now
    size = float(np.linalg.norm(change))
    return now + change * min(1.0, acceleration * period_s / size) if size > 0 else now
