# SPDX-License-Identifier: Apache-2.0
"""Action chunks as curves over the policy's own time, and their mean.

The policy's time runs as the robot's does, but slower while chunks are followed more slowly than the policy meant: so
the steps of chunks that were made before, during and after a slow-down stay side by side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

import numpy as np

from clp_ros.control.cubic import cubic
from clp_ros.control.safety import Limits, bounded_velocities


def slopes(positions: np.ndarray) -> np.ndarray:
    """By how much positions change a step; of second order at the ends too, where the acceleration would double."""
    return np.gradient(positions, axis=0, edge_order=min(2, len(positions) - 1))


class Chunk:
    """A policy's chunk.

    Args:
        positions: (steps, joints), inside the limits.
        observed_ns: When its observation was made, in the policy's time.
        period_ns: One control step: its step i is for the time ``observed_ns + (i + 1) period_ns``.
        limits: The robot's.
    """

    def __init__(self, positions: np.ndarray, observed_ns: int, period_ns: int, limits: Limits) -> None:
        self.positions = positions
        self._first_ns = observed_ns + period_ns
        self._period_ns = period_ns
        self._limits = limits

    @property
    def last_ns(self) -> int:
        """When its last step is."""
        return self._first_ns + (len(self.positions) - 1) * self._period_ns

    def skipped(self, time_ns: int) -> int:
        """How many of its steps are not after a time."""
        return int(np.clip((time_ns - self._first_ns) // self._period_ns + 1, 0, len(self.positions)))

    def left(self, times_ns: np.ndarray) -> np.ndarray:
        """(times,) how many of its steps are still to come; 0 after its end."""
        return np.maximum((self.last_ns - times_ns) / self._period_ns, 0.0)

    def at(self, times_ns: np.ndarray) -> np.ndarray:
        """(times, joints): where it wants the robot; after its end, where it ends.

        A cubic whose slope at a step is that between its neighbours, not straight lines: their corners would be as
        sharp however slowly they are followed. From its first step on it stays in the limits; up to two steps before,
        where a chunk that is followed more slowly may take over, its first cubic is prolonged.
        """
        if len(self.positions) == 1:
            return np.repeat(self.positions, len(times_ns), axis=0)
        last = len(self.positions) - 1
        step = np.clip((times_ns - self._first_ns) / self._period_ns, -2.0, last)
        knot = np.clip(step.astype(np.int64), 0, last - 1)
        ends, share = np.stack([knot, knot + 1]), (step - knot)[:, None]
        return cubic(share, 1.0, self.positions[ends], self._slopes[ends])[0]

    @cached_property
    def _slopes(self) -> np.ndarray:
        """By how much it changes a step, where it is at a step."""
        knots = np.arange(len(self.positions), dtype=np.int64)
        return bounded_velocities(knots * 10**9, self.positions, slopes(self.positions), self._limits)


def mean(chunks: Sequence[Chunk], times_ns: np.ndarray, fade_steps: int, decay: float) -> np.ndarray:
    """The weighted mean of the chunks that reach a time, (times, joints).

    A chunk fades out over its last steps: the mean of a reference that is sent ahead must not jump where one ends.

    Args:
        chunks: The oldest first.
        times_ns: (times,), in the policy's time.
        fade_steps: Over how many steps.
        decay: Weight of the i-th oldest chunk is ``exp(-decay i)``, i from 0.
    """
    if len(chunks) == 1:
        return chunks[0].at(times_ns)
    longest = max(chunks, key=lambda one: one.last_ns)
    total, weights = 0.0, 0.0
    for rank, chunk in enumerate(chunks):
        weight = np.full(len(times_ns), math.exp(-decay * rank))
        if chunk is not longest:
            weight *= fade(1 - np.minimum(chunk.left(times_ns) / fade_steps, 1.0))
        total, weights = total + weight[:, None] * chunk.at(times_ns), weights + weight[:, None]
    return total / weights


def fade(share: np.ndarray) -> np.ndarray:
    """From 1 at 0 to 0 at 1, with neither slope nor curvature at the ends."""
    return 1 - 10 * share**3 + 15 * share**4 - 6 * share**5


class PolicyClock:
    """The policy's time: the robot's clock, slower by the factor that chunks are followed more slowly by."""

    def __init__(self) -> None:
        # When, on either clock, and how many times slower from then on. Before the first, both run alike.
        self._changes: list[tuple[int, int, float]] = []

    def at(self, time_ns: int) -> int:
        """The policy's time at one of the robot's."""
        if not self._changes:
            return time_ns
        since, policy, scale = next(
            (one for one in reversed(self._changes) if one[0] <= time_ns), (*self._changes[0][:2], 1.0)
        )
        return policy + round((time_ns - since) / scale)

    def slow(self, time_ns: int, scale: float, oldest_ns: int) -> None:
        """From a time on it is ``scale`` times slower, whatever was said before; all before ``oldest_ns`` may go."""
        policy = self.at(time_ns)
        kept = [one for one in self._changes if one[0] < time_ns]
        while len(kept) > 1 and kept[1][0] <= oldest_ns:
            kept.pop(0)
        if (kept[-1][2] if kept else 1.0) != scale:
            kept.append((time_ns, policy, scale))
        self._changes = kept

    def reset(self) -> None:
        """Both clocks alike again."""
        self._changes.clear()
