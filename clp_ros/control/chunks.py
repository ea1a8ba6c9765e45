# SPDX-License-Identifier: Apache-2.0
"""Action chunks, and the targets that they set for the reference."""

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
    """A policy's action chunk.

    Attributes:
        positions: (steps, joints) float64, rad or m, inside the limits.
        observed_ns: Time of the observation. Step i is for the time ``observed_ns + (i + 1) period_ns``.
        period_ns: One control step, in nanoseconds.
    """

    positions: np.ndarray
    observed_ns: int
    period_ns: int

    @property
    def first_ns(self) -> int:
        """Time of the first step."""
        return self.observed_ns + self.period_ns

    @property
    def last_ns(self) -> int:
        """Time of the last step."""
        return self.observed_ns + len(self.positions) * self.period_ns

    def skipped(self, time_ns: int) -> int:
        """Returns the number of steps at or before a time."""
        return int(np.clip((time_ns - self.observed_ns) // self.period_ns, 0, len(self.positions)))

    def at(self, time_ns: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns position and velocity (per second) at a time, each (joints,) float64.

        The steps are joined by straight lines. The first and the last line are extrapolated.
        """
        last = len(self.positions) - 1
        if not last:
            return self.positions[0], np.zeros(self.positions.shape[1])
        step = (time_ns - self.observed_ns) / self.period_ns - 1
        first = int(np.clip(math.floor(step), 0, last - 1))
        slope = self.positions[first + 1] - self.positions[first]
        return self.positions[first] + (step - first) * slope, slope / (self.period_ns / 1e9)


def targets(chunks: Sequence[Chunk], splice_ns: int, decay: float) -> Targets:
    """Returns the weighted mean of chunks as targets after a knot.

    The weight of a chunk fades to 0 over its last steps. Otherwise the mean would jump where a chunk ends.

    Args:
        chunks: The chunks, the oldest first. Each has steps after the knot.
        splice_ns: Time of the knot.
        decay: The i-th oldest chunk has the weight ``exp(-decay i)``, with i from 0.
    """
    period = chunks[0].period_ns
    # Index of each chunk's step in the first interval after the splice; negative if the chunk begins later.
    begins = [-1 - (one.observed_ns - splice_ns) // period for one in chunks]
    lengths = [len(one.positions) - begin for one, begin in zip(chunks, begins, strict=True)]
    # The longest chunk does not fade out. Of equally long chunks, this is the newest.
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
    """Returns a smooth step from 0 at 0 to 1 at 1, without slope and curvature at both ends."""
    return share**3 * (10 - 15 * share + 6 * share**2)
