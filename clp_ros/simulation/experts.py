# SPDX-License-Identifier: Apache-2.0
"""Scripted experts: from where the cube lies to a motion that solves the robot's task.

A UR and a single ALOHA arm pick the cube up; two ALOHA arms hand it over. Tool poses are solved by inverse kinematics
and joined in joint space.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import least_squares
from scipy.spatial.transform import Rotation

from clp_ros.simulation.model import load_mujoco
from clp_ros.simulation.motion import Motion, Part
from clp_ros.simulation.robot import SimulatedRobot

# How far a solved pose may be off, in metres and rad.
_EXACT = 1e-4
# The cube is up when it is so far above where it lay, in metres.
_LIFTED_M = 0.05
# Seconds of the handover, near the joints' top speed, and of a pick.
TRANSFER_S, PICK_S = 9.0, 9.0
# Where the simulated ALOHA's fingers are closed and open, in metres.
_ALOHA_FINGER = (0.021, 0.057)
# Where a UR's gripper holds the cube fast, in rad; it opens to 0.
_UR_GRASP = 0.6
_DOWN, _LEVEL, _TURNED = (math.pi, math.pi / 2, 0.0), (math.pi, 0.0, 0.0), (0.0, 0.0, math.pi / 2)


@dataclass(frozen=True)
class Waypoint:
    """Where one tool is at a moment of the motion.

    Attributes:
        moment: Share of the motion that has passed, 0 to 1.
        position: Of the tool point, in metres; None is the arm's start pose.
        angles: Yaw, pitch and roll of the gripper in rad; for an ALOHA arm, positive pitch points down.
        gripper: 0 closed, 1 open.
    """

    moment: float
    position: np.ndarray | None
    angles: tuple[float, float, float]
    gripper: float


def demonstration(robot: SimulatedRobot) -> Motion:
    """The motion that solves the robot's task from where its cube lies now.

    Raises:
        ValueError: A waypoint is out of reach.
    """
    cube = robot.cube()
    cube[2] = robot.cube_rests_at
    if robot.embodiment.name == "aloha_bimanual":
        motion = transfer_motion(cube)
        return Motion(tuple(_aloha_part(robot, side, motion[side], TRANSFER_S) for side in ("left", "right")))
    if robot.embodiment.name == "aloha_single":
        return Motion((_aloha_part(robot, "right", pick_motion(cube, _DOWN), PICK_S),))
    # A UR's tool points along its z, which is down where it begins.
    waypoints = pick_motion(cube, (math.pi / 2, 0.0, math.pi))
    arm = _solve(robot, "tool", slice(0, 6), waypoints)
    gripper = np.array([[_UR_GRASP * (1 - one.gripper)] for one in waypoints])
    return Motion((Part(_moments(waypoints, PICK_S), np.concatenate([arm, gripper], axis=1)),))


def solved(robot: SimulatedRobot) -> bool:
    """Whether the task is done: the cube is lifted, or the left gripper alone holds it above the table."""
    if robot.embodiment.name != "aloha_bimanual":
        return bool(robot.cube()[2] > robot.cube_rests_at + _LIFTED_M)
    touching = robot.touching_cube()
    return any(name.startswith("vx300s_left/") for name in touching) and not any(
        name == "table" or name.startswith("vx300s_right/") for name in touching
    )


def pick_motion(cube: np.ndarray, angles: tuple[float, float, float]) -> list[Waypoint]:
    """Above the cube, down, close, up: for a cube whose centre is at (3,) metres."""
    above, grasp, lift = (cube + np.array([0, 0, height]) for height in (0.1, -0.005, 0.12))
    return [
        Waypoint(0.00, None, angles, 1),
        Waypoint(0.03, None, angles, 1),
        Waypoint(0.30, above, angles, 1),
        Waypoint(0.45, grasp, angles, 1),
        Waypoint(0.48, grasp, angles, 1),
        Waypoint(0.80, grasp, angles, 0),
        Waypoint(1.00, lift, angles, 0),
    ]


def transfer_motion(cube: np.ndarray) -> dict[str, list[Waypoint]]:
    """The pick and the handover as tool poses.

    Args:
        cube: Centre of the cube on the table, (3,) in metres.

    Returns:
        Waypoints of the left and the right arm, in time order, from moment 0 to 1.
    """
    down, level, turned = _DOWN, _LEVEL, _TURNED
    meet = np.array([0.0, 0.5, 0.22])
    above, grasp, lift = (cube + np.array([0, 0, height]) for height in (0.1, -0.005, 0.12))
    # The left gripper is turned by a quarter so that its fingers close on the two faces the right one leaves free.
    left_ready, left_away, right_away = (meet + np.array(by) for by in ([-0.14, 0, 0], [-0.14, 0, 0.04], [0.12, 0, 0]))
    right = [
        Waypoint(0.00, None, level, 0),
        Waypoint(0.14, above, down, 1),
        Waypoint(0.22, grasp, down, 1),
        Waypoint(0.25, grasp, down, 1),
        Waypoint(0.31, grasp, down, 0),
        Waypoint(0.38, lift, down, 0),
        Waypoint(0.56, meet, level, 0),
        Waypoint(0.72, meet, level, 0),
        Waypoint(0.77, meet, level, 1),
        Waypoint(0.85, right_away, level, 1),
        Waypoint(1.00, None, level, 0),
    ]
    left = [
        Waypoint(0.00, None, turned, 0),
        Waypoint(0.25, None, turned, 0),
        Waypoint(0.45, left_ready, turned, 1),
        Waypoint(0.56, left_ready, turned, 1),
        Waypoint(0.63, meet, turned, 1),
        Waypoint(0.65, meet, turned, 1),
        Waypoint(0.72, meet, turned, 0),
        Waypoint(0.77, meet, turned, 0),
        Waypoint(0.92, left_away, turned, 0),
        Waypoint(1.00, left_away, turned, 0),
    ]
    return {"left": left, "right": right}


def _aloha_part(robot: SimulatedRobot, side: str, waypoints: list[Waypoint], seconds: float) -> Part:
    first = 7 if side == "right" and robot.embodiment.action_size == 14 else 0
    arm = _solve(robot, f"cali_{side}_site1", slice(first, first + 6), waypoints)
    closed, opened = _ALOHA_FINGER
    finger = np.array([[closed + (opened - closed) * one.gripper] for one in waypoints])
    positions = np.concatenate([arm, finger], axis=1)
    positions[0, -1] = robot.home[first + 6]
    return Part(_moments(waypoints, seconds), positions)


def _moments(waypoints: list[Waypoint], seconds: float) -> np.ndarray:
    return np.array([one.moment for one in waypoints]) * seconds


def _solve(robot: SimulatedRobot, site: str, joints: slice, waypoints: list[Waypoint]) -> np.ndarray:
    """(waypoints, joints): each from the one before, so that the arm keeps its posture."""
    mujoco, model = load_mujoco(), robot.mujoco_model
    data: Any = mujoco.MjData(model)
    data.qpos[:] = robot.data.qpos
    at = robot.qpos_addresses(joints)
    limits = robot.embodiment.joints[joints]
    bounds = [one.lower for one in limits], [one.upper for one in limits]
    start = robot.home[joints]
    solutions = [start]
    for waypoint in waypoints:
        if waypoint.position is None:
            solutions.append(start)
            continue
        turn = Rotation.from_euler("ZYX", waypoint.angles)

        def off(positions: np.ndarray, turn: Rotation = turn, target: np.ndarray = waypoint.position) -> np.ndarray:
            data.qpos[at] = positions
            mujoco.mj_kinematics(model, data)
            found = Rotation.from_matrix(data.site(site).xmat.reshape(3, 3))
            return np.concatenate([data.site(site).xpos - target, (found * turn.inv()).as_rotvec()])

        solution = least_squares(off, solutions[-1], bounds=bounds, xtol=1e-12, ftol=1e-12)
        if np.abs(solution.fun).max() > _EXACT:
            raise ValueError(f"{site} does not reach {waypoint.position} at moment {waypoint.moment}")
        solutions.append(solution.x)
    return np.array(solutions[1:])
