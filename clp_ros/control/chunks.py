# SPDX-License-Identifier: Apache-2.0
"""Action chunks, and what one or several of them want of the robot from a knot on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from clp_ros.control.spline_tracking import Targets

# Control steps over which an older chunk of an ensemble fades out before its end.
_FADE_STEPS = 10


@dataclass(frozen=True)
class Chunk:
    """A policy's chunk.

    Attributes:
        positions: (steps, joints), rad or m, inside the limits.
        observed_ns: When its observation was made: its step i is for the time ``observed_ns + (i + 1) period_ns``.
        period_ns: One control step.
    """

    positions: np.ndarray
    observed_ns: int
    period_ns: int

    @property
    def first_ns(self) -> int:
        """When its first step is."""
        return self.observed_ns + self.period_ns

    @property
    def last_ns(self) -> int:
        """When its last step is."""
        return self.observed_ns + len(self.positions) * self.period_ns

    def skipped(self, time_ns: int) -> int:
        """How many of its steps are not after a time."""
        return int(np.clip((time_ns - self.observed_ns) // self.period_ns, 0, len(self.positions)))

    def at(self, time_ns: int) -> tuple[np.ndarray, np.ndarray]:
        """Position and velocity (per second), each (joints,), on straight lines through its steps, prolonged."""
        last = len(self.positions) - 1
        if not last:
            return self.positions[0], np.zeros(self.positions.shape[1])
        step = (time_ns - self.observed_ns) / self.period_ns - 1
        first = int(np.clip(math.floor(step), 0, last - 1))
        slope = self.positions[first + 1] - self.positions[first]
        return self.positions[first] + (step - first) * slope, slope / (self.period_ns / 1e9)


def targets(chunks: Sequence[Chunk], splice_ns: int, decay: float) -> Targets:
    """What chunks want after a knot: of those that reach a time the weighted mean.

    A chunk fades out over its last steps: the mean of a reference that is sent ahead must not jump where one ends.

    Args:
        chunks: The oldest first; each has steps after the knot.
        splice_ns: When the knot is.
        decay: Weight of the i-th oldest chunk is ``exp(-decay i)``, i from 0.
    """
    period = chunks[0].period_ns
    # The step of each chunk that is in the first interval after the splice; negative: its first one comes later.
    begins = [-1 - (one.observed_ns - splice_ns) // period for one in chunks]
    lengths = [len(one.positions) - begin for one, begin in zip(chunks, begins, strict=True)]
    # Of equally long ones the newest: what it wants may count nowhere else.
    longest = max(range(len(chunks)), key=lambda rank: (lengths[rank], rank))
    weights = np.zeros((max(lengths), len(chunks)))
    positions = np.zeros((max(lengths), len(chunks), chunks[0].positions.shape[1]))
    for rank, (one, begin, length) in enumerate(zip(chunks, begins, lengths, strict=True)):
        reach = slice(max(0, -begin), length)
        positions[reach, rank] = one.positions[max(0, begin) :]
        weights[reach, rank] = math.exp(-decay * rank)
        if rank != longest:
            left = np.arange(length - reach.start - 1, -1, -1) / _FADE_STEPS
            weights[reach, rank] *= _fade_in(np.minimum(left, 1.0))
    total = weights.sum(axis=1, keepdims=True)
    shares = np.array([(one.observed_ns - splice_ns) % period for one in chunks]) / period
    return Targets(shares, np.divide(weights, total, out=np.zeros_like(weights), where=total > 0), positions)


def _fade_in(share: np.ndarray) -> np.ndarray:
    """From 0 at 0 to 1 at 1, with neither slope nor curvature at the ends."""
    return share**3 * (10 - 15 * share + 6 * share**2)
