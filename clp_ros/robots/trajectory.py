# SPDX-License-Identifier: Apache-2.0
"""Converts a policy's actions to the joints' units and to one trajectory for each controller."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from clp_ros.core.errors import ClpError
from clp_ros.robots.embodiment import Embodiment

# Positions this close to a limit, in rad or m, are not counted as clamped: float32 actions at a limit are rounded.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Trajectory:
    """A trajectory for a joint_trajectory_controller.

    Attributes:
        controller: The controller's name in the embodiment.
        topic: The controller's topic.
        joint_names: In the embodiment's order.
        positions: (points, joints) float64, in the controller's units (rad or m), inside the joints' limits.
        times: (points,) float64, seconds from the start, positive and strictly increasing.
        velocities: (points, joints) float64, per second; None: the controller interpolates linearly.
        start_ns: The start on the robot's clock, nanoseconds; 0: on receipt by the controller.
    """

    controller: str
    topic: str
    joint_names: tuple[str, ...]
    positions: np.ndarray
    times: np.ndarray
    velocities: np.ndarray | None = None
    start_ns: int = 0


def joint_positions(values: np.ndarray, embodiment: Embodiment) -> np.ndarray:
    """Converts states or actions to the joints' units.

    Args:
        values: (..., action_size), in the policy's units (see :class:`clp_ros.robots.embodiment.Joint`).
        embodiment: The robot.

    Returns:
        (..., action_size) float64, rad or m.
    """
    offset, scale = (np.array([getattr(joint, part) for joint in embodiment.joints]) for part in ("offset", "scale"))
    return offset + np.asarray(values, dtype=float) * scale


def chunk_positions(chunk: np.ndarray, embodiment: Embodiment) -> tuple[np.ndarray, int]:
    """Converts an action chunk to joint positions.

    Positions outside a joint's limits are moved to the limit, because a joint_trajectory_controller does not check
    limits.

    Args:
        chunk: (steps, action_size), in the policy's units.
        embodiment: The robot.

    Returns:
        (steps, action_size) float64, rad or m, and how many positions were moved to a limit.

    Raises:
        ClpError: The chunk is empty, of the wrong size, or not finite. It must not be sent then.
    """
    chunk = np.asarray(chunk, dtype=float)
    if chunk.ndim != 2 or len(chunk) == 0 or chunk.shape[1] != embodiment.action_size:
        raise ClpError(
            f"the policy's chunk has shape {chunk.shape}, not (steps, {embodiment.action_size})",
            where=embodiment.name,
            hint="use a checkpoint that was trained for this embodiment",
        )
    if not np.isfinite(chunk).all():
        step, component = np.argwhere(~np.isfinite(chunk))[0]
        joint = embodiment.joints[component].name
        raise ClpError(
            f"the policy's chunk is not finite at step {step}, joint {joint!r}",
            where=embodiment.name,
            hint="check the checkpoint's weights",
        )
    wanted = joint_positions(chunk, embodiment)
    lower, upper = (np.array([getattr(joint, side) for joint in embodiment.joints]) for side in ("lower", "upper"))
    positions = np.clip(wanted, lower, upper)
    return positions, int((np.abs(positions - wanted) > _ROUNDING).sum())


def split_trajectory(
    times: np.ndarray,
    positions: np.ndarray,
    embodiment: Embodiment,
    velocities: np.ndarray | None = None,
    start_ns: int = 0,
) -> list[Trajectory]:
    """Splits a trajectory of all joints into one for each controller. The arguments are as in :class:`Trajectory`."""
    trajectories, start = [], 0
    for name, controller in embodiment.controllers.items():
        names = tuple(joint.name for joint in controller.joints)
        part = slice(start, start + len(names))
        start += len(names)
        speeds = None if velocities is None else velocities[:, part]
        trajectories.append(Trajectory(name, controller.topic, names, positions[:, part], times, speeds, start_ns))
    return trajectories
