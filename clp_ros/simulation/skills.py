# SPDX-License-Identifier: Apache-2.0
"""What experts are made of: grasping, carrying, dropping and pushing, each a function of the state without memory.

An action that depends on the state alone can be learnt from demonstrations, and recovers from any disturbance.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.spatial.transform import Rotation

from clp_ros.simulation.task import ArmState, Goal, ObjectState

# Height above the goal from which a tool goes down, in metres; of the tool above the goal for each metre beside it.
HOVER_M, _SLOPE = 0.08, 4.0
# A tool goes straight at its goal's height when it is this near beside it; in metres and rad.
_NEAR_M, _NEAR_RAD = 0.006, 0.12
# A tool that is tilted by less than this points down, in rad.
_UPRIGHT_RAD = 0.5
# The tool's point when it grasps, below the centre of the object, in metres.
_GRASP_BELOW_M = 0.005
# While the gripper closes, the object may move by this, in metres.
_CLOSING_M = 0.015
# Opening above which a gripper goes down around an object.
_OPEN = 0.7
# Distance between the tool's point and the centre of a pushed cube, and room behind it before the push, in metres.
_PUSH_M, _BEHIND_M = 0.036, 0.02
# Height of the tool's point above the table while it pushes, in metres.
_PUSH_HEIGHT_M = 0.018
# While it pushes, the tool goes to the point this far ahead on the line through the object, in metres.
_LOOK_AHEAD_M = 0.06
# Distance from the end of a push at which it slows down, in metres.
_SLOW_M = 0.06


def nearest(angle: float, to: float, period: float) -> float:
    """Returns the angle that is equal to ``angle`` up to multiples of ``period``, and nearest to ``to``; in rad."""
    return angle + period * round((to - angle) / period)


def grasp_yaw(state: ArmState, direction: float, period: float = math.pi / 2) -> float:
    """Returns the gripper's yaw for fingers along an object's side, in rad. It stays near the arm's ``down``."""
    yaw = nearest(direction, state.yaw, period)
    return nearest(direction, 0.0, period) if abs(yaw) > 0.6 * math.pi else yaw


def is_firm(state: ArmState, held: ObjectState) -> bool:
    """Returns whether the arm holds the object, and its gripper has been commanded to close on it."""
    return state.arm.name in held.held_by and state.opening_command < 0.05


def approach(state: ArmState, position: np.ndarray, yaw: float, gripper: float, speed: float = 1.0) -> Goal:
    """Returns the goal that brings the tool to a position from above. It goes down as it comes to stand above it.

    Args:
        state: The arm.
        position: (3,) where the tool is wanted, in metres.
        yaw: The gripper's yaw, in rad.
        gripper: Position of the gripper's joint.
        speed: Share of the usual speed.
    """
    beside = float(np.linalg.norm(state.position[:2] - position[:2]))
    turned = abs(yaw - state.yaw)
    extra = _SLOPE * max(0.0, beside - _NEAR_M) + 0.3 * max(0.0, turned - _NEAR_RAD)
    # It points down before it turns: both at once would turn ALOHA's forearm over, and use up its last joint's range.
    rotation = state.arm.turned_down(yaw if state.tilt < _UPRIGHT_RAD else state.yaw)
    return _over(state, position, min(HOVER_M, extra), rotation, gripper, speed)


def _over(
    state: ArmState, position: np.ndarray, height: float, rotation: Rotation, gripper: float, speed: float = 1.0
) -> Goal:
    """Returns a goal above a position. The tool moves sideways only as far as it is high enough."""
    wanted = position + np.array([0.0, 0.0, height])
    share = float(np.clip((state.position[2] - wanted[2] + 0.04) / 0.03, 0.0, 1.0))
    wanted[:2] = state.position[:2] + share * (wanted[:2] - state.position[:2])
    return Goal(wanted, rotation, gripper, speed)


def grasp(state: ArmState, target: ObjectState, yaw: float, offset: np.ndarray | None = None) -> Goal:
    """Returns the goal that grasps an object that lies on something.

    Args:
        state: The arm.
        target: The object.
        yaw: The gripper's yaw, in rad.
        offset: (3,) from the object's centre to where it is grasped, in metres.
    """
    arm = state.arm
    point = target.position + (0 if offset is None else offset) - np.array([0, 0, _GRASP_BELOW_M])
    beside, above = np.linalg.norm(state.position[:2] - point[:2]), state.position[2] - point[2]
    closing = state.opening_command < 0.95 and arm.name in target.touched_by
    tolerance = _CLOSING_M if closing else _NEAR_M + 0.002
    ready = closing or state.opening > _OPEN or state.opening_command < 0.9
    if beside < tolerance and abs(above) < tolerance and ready:
        return Goal(point, arm.turned_down(yaw), arm.grasp)
    if state.opening < _OPEN and above < 0.05 + _GRASP_BELOW_M and beside < 0.06:
        # It came down, or dropped the object, with a closed gripper: it opens above.
        return Goal(np.array([*state.position[:2], point[2] + HOVER_M]), arm.turned_down(yaw), arm.opened)
    goal = approach(state, point, yaw, arm.opened)
    if state.opening < _OPEN:
        goal.position[2] = max(goal.position[2], point[2] + HOVER_M)
    return goal


def drop_into(state: ArmState, target: np.ndarray, height: float, clear: float) -> Goal:
    """Returns the goal that carries what the arm holds to a place and drops it.

    Args:
        state: The arm.
        target: (3,) the place, on the table, in metres.
        height: Height of the tool above the place when it opens, in metres.
        clear: Height of the tool above the table on the way, in metres.
    """
    point = target + np.array([0, 0, height])
    beside = float(np.linalg.norm(state.position[:2] - point[:2]))
    if beside < 0.02 and state.position[2] < point[2] + 0.015:
        return Goal(point, state.arm.turned_down(state.yaw), state.arm.opened)
    extra = min(clear - height, _SLOPE * max(0.0, beside - 0.01))
    return _over(state, point, extra, state.arm.turned_down(nearest(0.0, state.yaw, math.pi)), state.arm.grasp)


def push(state: ArmState, target: ObjectState, to: np.ndarray) -> Goal:
    """Returns the goal that pushes an object along the table with the closed gripper.

    Args:
        state: The arm.
        target: The object.
        to: (2,) where its centre is wanted, in metres.
    """
    way = to - target.position[:2]
    left = float(np.linalg.norm(way))
    forward = way / left
    yaw = grasp_yaw(state, math.atan2(forward[1], forward[0]), math.pi)
    behind = state.position[:2] - target.position[:2]
    along = float(behind @ forward)
    beside = float(np.linalg.norm(behind - along * forward))
    low = state.position[2] < _PUSH_HEIGHT_M + 0.012
    if low and along < -0.02 and beside < 0.012 and abs(yaw - state.yaw) < 0.2:
        ahead = min(left - _PUSH_M, along + _LOOK_AHEAD_M)
        point = np.array([*(target.position[:2] + ahead * forward), _PUSH_HEIGHT_M])
        # It slows down near the end, so that the object does not slide past.
        slow = float(np.clip(left / _SLOW_M, 0.3, 1.0))
        return Goal(point, state.arm.turned_down(yaw), state.arm.shut, 0.5 * slow)
    start = np.array([*(target.position[:2] - (_PUSH_M + _BEHIND_M) * forward), _PUSH_HEIGHT_M])
    return approach(state, start, yaw, state.arm.shut)


def retreat(state: ArmState, height: float, gripper: float) -> Goal:
    """Returns the goal that moves the tool straight up, to a height above the table in metres."""
    return Goal(np.array([*state.position[:2], height]), state.arm.turned_down(state.yaw), gripper)
