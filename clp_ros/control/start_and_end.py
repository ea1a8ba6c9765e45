# SPDX-License-Identifier: Apache-2.0
"""How the first trajectory begins at the controllers' last command, and how long the last one takes to rest."""

from __future__ import annotations

import math

import numpy as np

from clp_ros.control.chunks import Chunk
from clp_ros.control.safety import Limits
from clp_ros.control.spline_tracking import ORDER, Head
from clp_ros.core.errors import ClpError

# Time in which the controllers move from their last command to the first reference. The last command differs from the
# measured position: an arm that carries a load droops.
_START_NS = 200_000_000
# A robot outside its limits returns with at most this share of its velocity and acceleration limits. The remainder is
# for the motion of the chunk, which is added.
_RETURN_SHARE = 0.5
# Shortest and longest time from the end of a chunk to rest. A robot that brakes more slowly than the longest is moved
# only as fast as it can stop in that time. The time and memory of the quadratic program grow with it.
_TAIL_S = 0.5
_LONGEST_TAIL_S = 5.0
# Number of last steps of a chunk from which its final velocity is estimated.
_END_STEPS = 5


def first_head(
    position: np.ndarray, measured: np.ndarray, limits: Limits, period_ns: int, send_lead_time_s: float
) -> tuple[Head, int]:
    """Returns the beginning of the first spline: one cubic from rest.

    The controllers move to its end along a cubic of their own, from their last command. From rest to rest, the largest
    velocity of a cubic is 1.5 times its mean, and its largest acceleration is 6 times the distance divided by the
    squared time.

    Args:
        position: (joints,) where the spline begins, inside the limits, rad or m.
        measured: (joints,) where the robot is, which may be outside the limits.
        limits: The limits.
        period_ns: One control step.
        send_lead_time_s: How long before the spline's beginning a message may be sent.

    Returns:
        The beginning, and its number of control steps.
    """
    beyond = measured - position
    distance = np.abs(beyond)
    velocity_s = 1.5 * distance / (_RETURN_SHARE * limits.velocity)
    acceleration_s = np.sqrt(6 * distance / (_RETURN_SHARE * limits.acceleration))
    longest_s = float(max(velocity_s.max(), acceleration_s.max()))
    steps = math.ceil(max(_START_NS, 1e9 * longest_s) / period_ns)
    early = 1 + send_lead_time_s * 1e9 / period_ns
    return Head.one_cubic(position, np.zeros_like(position), steps, early, beyond), steps


def check_return(beyond: np.ndarray, started_ns: int, chunk: Chunk, limits: Limits) -> None:
    """Checks that a robot outside its limits is back inside before the chunk ends.

    Args:
        beyond: (joints,) distance outside the limits, rad or m; 0 inside.
        started_ns: When the robot is back.
        chunk: The chunk.
        limits: The limits.

    Raises:
        ClpError: It is not. The error names the joint.
    """
    if beyond.any() and started_ns > chunk.last_ns:
        joint = int(np.argmax(np.abs(beyond) / limits.velocity))
        raise ClpError(
            f"the joint is {abs(beyond[joint]):.3f} outside its limits, and a chunk is too short to come back slowly",
            where=limits.names[joint],
            hint="bring the joint back",
        )


def tail_steps(chunk: Chunk, limits: Limits, period_s: float) -> int:
    """Returns the number of control steps from the end of a chunk until the robot is at rest.

    Args:
        chunk: The chunk.
        limits: The limits.
        period_s: One control step.
    """
    last = chunk.positions[-_END_STEPS:]
    speed = np.abs(last[-1] - last[0]) / (max(1, len(last) - 1) * period_s)
    braking_s = float((np.minimum(speed, limits.velocity) / limits.braking).max())
    return math.ceil(min(max(_TAIL_S, 1.5 * braking_s), _LONGEST_TAIL_S) / period_s) + ORDER
