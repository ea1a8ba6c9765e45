# SPDX-License-Identifier: Apache-2.0
"""The cubic between two knots that have velocities, as a joint_trajectory_controller interpolates them."""

from __future__ import annotations

import numpy as np


def cubic(
    share: np.ndarray | float,
    span_s: float,
    positions: tuple[np.ndarray, np.ndarray],
    velocities: tuple[np.ndarray, np.ndarray],
) -> tuple[np.ndarray, np.ndarray]:
    """Position and velocity between two knots, by Hermite's cubic.

    scipy's CubicHermiteSpline is the same for whole curves; to make one takes as long as all else of sending a chunk.

    Args:
        share: (points, 1) or one: how much of the span has passed. Beyond 0 and 1 the cubic is prolonged.
        span_s: Seconds from the first knot to the second.
        positions: At the first and at the second knot, (joints,) or (points, joints).
        velocities: There, per second.
    """
    (start, end), (leaving, arriving) = positions, (velocities[0] * span_s, velocities[1] * span_s)
    gap = end - start
    square, cube = 3 * gap - 2 * leaving - arriving, leaving + arriving - 2 * gap
    position = start + share * (leaving + share * (square + share * cube))
    return position, (leaving + share * (2 * square + 3 * share * cube)) / span_s
