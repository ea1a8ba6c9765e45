# SPDX-License-Identifier: Apache-2.0
"""The cubic between two knots with velocities, as a joint_trajectory_controller interpolates them."""

from __future__ import annotations

import numpy as np


def cubic(
    share: np.ndarray | float,
    span_s: float,
    positions: tuple[np.ndarray, np.ndarray],
    velocities: tuple[np.ndarray, np.ndarray],
) -> tuple[np.ndarray, np.ndarray]:
    """Returns position and velocity on the Hermite cubic between two knots.

    scipy's CubicHermiteSpline computes the same for whole curves, but constructing one takes as long as all other steps
    of sending a chunk.

    Args:
        share: Elapsed share of the span, a number or (points, 1). Outside 0 to 1, the cubic is extrapolated.
        span_s: Time from the first knot to the second, in seconds.
        positions: Positions at the first and the second knot, each (joints,) or (points, joints), rad or m.
        velocities: Velocities at the two knots, per second.

    Returns:
        Positions and velocities, each (joints,) or (points, joints).
    """
    (start, end), (leaving, arriving) = positions, (velocities[0] * span_s, velocities[1] * span_s)
    gap = end - start
    square, cube = 3 * gap - 2 * leaving - arriving, leaving + arriving - 2 * gap
    position = start + share * (leaving + share * (square + share * cube))
    return position, (leaving + share * (2 * square + 3 * share * cube)) / span_s
