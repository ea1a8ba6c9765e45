# SPDX-License-Identifier: Apache-2.0
"""The outcome of one episode, and how smooth its motion was."""

from __future__ import annotations

import numpy as np

from clp_ros.core.strict_model import StrictModel


class EpisodeOutcome(StrictModel):
    """What happened in one episode.

    Attributes:
        task: Name of the task.
        seed: Seed of the start.
        success: Whether the task was solved.
        seconds: Time to success, or the episode's duration, in seconds.
        start: A hash of the start and the instruction. Two episodes with the same hash began in the same way.
        instruction: The instruction.
        chunks: Number of chunks that were sent to the controllers.
        late: Number of chunks that came too late to be sent.
        refused: Number of chunks that the chunk control refused, each of which caused a safe stop.
        limits_hit: Number of positions in chunks that were clipped to the joints' limits.
        smoothness: Log dimensionless jerk of the commanded motion (:func:`log_dimensionless_jerk`); None if the robot
            did not move, or it is not known.
    """

    task: str
    seed: int
    success: bool
    seconds: float
    start: str
    instruction: str
    chunks: int = 0
    late: int = 0
    refused: int = 0
    limits_hit: int = 0
    smoothness: float | None = None


def log_dimensionless_jerk(positions: np.ndarray, period_s: float) -> float | None:
    """Returns the log dimensionless jerk of a motion; larger (nearer to 0) is smoother.

    It is ``-ln(T^3 / v_peak^2 * integral of |jerk|^2)``, with the duration T and the peak speed (Hogan and Sternad
    2009; Balasubramanian et al. 2015). It depends neither on the duration nor on the amplitude of a motion of the same
    shape.

    Args:
        positions: (steps, joints), in one unit.
        period_s: Time between two steps, in seconds.

    Returns:
        The value; None for fewer than four steps, or if nothing moves.
    """
    positions = np.asarray(positions, dtype=np.float64)
    if len(positions) < 4:
        return None
    speed = np.linalg.norm(np.diff(positions, axis=0), axis=1).max() / period_s
    jerk = np.diff(positions, 3, axis=0) / period_s**3
    total = float(np.sum(jerk**2) * period_s)
    if speed < 1e-9 or total <= 0:
        return None
    return float(-np.log((len(positions) * period_s) ** 3 / speed**2 * total))
