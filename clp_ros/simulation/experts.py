# SPDX-License-Identifier: Apache-2.0
"""Scripted experts: motions that solve the robot's task, given the position of the cube.

A UR and a single ALOHA arm lift the cube. Two ALOHA arms hand it over. Inverse kinematics converts tool poses to joint
positions, which are joined in joint space.
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

# Largest error of a solved pose, in metres and rad.
_EXACT = 1e-4
# Height above the table at which the cube counts as lifted, in metres.
_LIFTED_M = 0.05
# Durations of the handover, near the velocity limits, and of a pick, in seconds.
TRANSFER_S, PICK_S = 9.0, 9.0
# Positions of the simulated ALOHA's fingers, closed and open, in metres.
_ALOHA_FINGER = (0.021, 0.057)
# Position of a UR's gripper that holds the cube, in rad. It is open at 0.
_UR_GRASP = 0.6
_DOWN, _LEVEL, _TURNED = (math.pi, math.pi / 2, 0.0), (math.pi, 0.0, 0.0), (0.0, 0.0, math.pi / 2)


@dataclass(frozen=True)
class Waypoint:
    """A tool pose at a time of the motion.

    Attributes:
        moment: The time as a share of the motion, 0 to 1.
        position: (3,) position of the tool point, in metres; None: the arm's initial pose.
        angles: Yaw, pitch and roll of the gripper, in rad. For an ALOHA arm, positive pitch points down.
        gripper: 0: closed, 1: open.
    """

    moment: float
    position: np.ndarray | None
    angles: tuple[float, float, float]
    gripper: float


def demonstration(robot: SimulatedRobot) -> Motion:
    """Returns the motion that solves the robot's task, given the present position of the cube.

    Args:
        robot: The simulated robot.

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
    # A UR's tool points along its z axis, which points down at the beginning.
    waypoints = pick_motion(cube, (math.pi / 2, 0.0, math.pi))
    arm = _solve(robot, "tool", slice(0, 6), waypoints)
    gripper = np.array([[_UR_GRASP * (1 - one.gripper)] for one in waypoints])
    return Motion((Part(_moments(waypoints, PICK_S), np.concatenate([arm, gripper], axis=1)),))


def solved(robot: SimulatedRobot) -> bool:
    """Returns whether the task is done: the cube is lifted, or, with two arms, only the left gripper holds it."""
    if robot.embodiment.name != "aloha_bimanual":
        return bool(robot.cube()[2] > robot.cube_rests_at + _LIFTED_M)
    touching = robot.touching_cube()
    return any(name.startswith("vx300s_left/") for name in touching) and not any(
        name == "table" or name.startswith("vx300s_right/") for name in touching
    )


def pick_motion(cube: np.ndarray, angles: tuple[float, float, float]) -> list[Waypoint]:
    """Returns the waypoints of a pick: above the cube, down, close, up.

    Args:
        cube: (3,) centre of the cube, in metres.
        angles: Yaw, pitch and roll of the gripper, in rad.
    """
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
    """Returns the waypoints of the pick and the handover.

    Args:
        cube: (3,) centre of the cube on the table, in metres.

    Returns:
        The waypoints of the arms ``left`` and ``right``, in the order of time, from moment 0 to 1.
    """
    down, level, turned = _DOWN, _LEVEL, _TURNED
    meet = np.array([0.0, 0.5, 0.22])
    above, grasp, lift = (cube + np.array([0, 0, height]) for height in (0.1, -0.005, 0.12))
    # The left gripper is turned by 90 degrees: its fingers close on the two faces that the right one leaves free.
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
    """Returns joint positions, (waypoints, joints). Each solve starts at the last solution, to keep the posture."""
    mujoco, model = load_mujoco(), robot.mujoco_model
    data: Any = mujoco.MjData(model)
    data.qpos[:] = robot.data.qpos
    at = robot.qpos_addresses(joints)
    limits = robot.embodiment.joints[joints]
    bounds = [one.lower for one in limits], [one.upper for one in limits]
    start = robot.home[joints]
    solutions = [start]

    def off(positions: np.ndarray, target: np.ndarray, turn: Rotation) -> np.ndarray:
        data.qpos[at] = positions
        mujoco.mj_kinematics(model, data)
        found = Rotation.from_matrix(data.site(site).xmat.reshape(3, 3))
        return np.concatenate([data.site(site).xpos - target, (found * turn.inv()).as_rotvec()])

    for waypoint in waypoints:
        if waypoint.position is None:
            solutions.append(start)
            continue
        pose = waypoint.position, Rotation.from_euler("ZYX", waypoint.angles)
        solution = least_squares(off, solutions[-1], bounds=bounds, xtol=1e-12, ftol=1e-12, args=pose)
        if np.abs(solution.fun).max() > _EXACT:
            raise ValueError(f"{site} does not reach {waypoint.position} at moment {waypoint.moment}")
        solutions.append(solution.x)
    return np.array(solutions[1:])
