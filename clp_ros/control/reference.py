# SPDX-License-Identifier: Apache-2.0
"""The reference trajectory: positions and velocities that the controllers follow and interpolate."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from clp_ros.control.cubic import cubic


@dataclass(frozen=True)
class Reference:
    """Knots joined by cubic polynomials, as a joint_trajectory_controller joins points with velocities.

    A reference ends at rest. Before its first knot and after its last, it is at rest at the position of that knot.

    Attributes:
        times_ns: (knots,) int64, strictly increasing, in nanoseconds.
        positions: (knots, joints) float64, rad or m.
        velocities: (knots, joints) float64, rad/s or m/s.

    Raises:
        ValueError: The lengths differ, or the times do not increase.
    """

    times_ns: np.ndarray
    positions: np.ndarray
    velocities: np.ndarray

    def __post_init__(self) -> None:
        if not (len(self.times_ns) == len(self.positions) == len(self.velocities) > 0):
            raise ValueError("a reference needs as many positions and velocities as times")
        if (self.times_ns[1:] <= self.times_ns[:-1]).any():
            raise ValueError("a reference's times must increase")

    @property
    def end_ns(self) -> int:
        """Time of the last knot, where the reference comes to rest."""
        return int(self.times_ns[-1])

    @cached_property
    def spans_s(self) -> np.ndarray:
        """Time from each knot to the next: (knots - 1, 1) float64, seconds."""
        return (self.times_ns[1:] - self.times_ns[:-1])[:, None] / 1e9

    @property
    def seconds(self) -> np.ndarray:
        """Time from the first knot to each knot: (knots,) float64, seconds."""
        return (self.times_ns - self.times_ns[0]) / 1e9

    def sample(self, time_ns: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns position and velocity (per second) at a time, each (joints,) float64."""
        if time_ns < self.times_ns[0] or time_ns > self.times_ns[-1]:
            resting = self.positions[0 if time_ns < self.times_ns[0] else -1]
            return resting.copy(), np.zeros_like(resting)
        index = int(np.searchsorted(self.times_ns, time_ns))
        if self.times_ns[index] == time_ns:  # bit-equal where a new reference begins
            return self.positions[index].copy(), self.velocities[index].copy()
        before, after = int(self.times_ns[index - 1]), int(self.times_ns[index])
        knots = slice(index - 1, index + 1)
        share, span_s = (time_ns - before) / (after - before), (after - before) / 1e9
        (start, end), (leaving, arriving) = self.positions[knots], self.velocities[knots]
        return cubic(share, span_s, (start, end), (leaving, arriving))

    def from_time(self, time_ns: int) -> Reference | None:
        """Returns the knots after a time; None if there are none."""
        later = self.times_ns > time_ns
        return self._part(later) if later.any() else None

    def before(self, time_ns: int) -> Reference | None:
        """Returns the knots before a time; None if there are none."""
        earlier = self.times_ns < time_ns
        return self._part(earlier) if earlier.any() else None

    def shifted(self, offset_ns: int) -> Reference:
        """Returns the reference with all times moved by an offset, as after a jump of the clock."""
        return Reference(self.times_ns + offset_ns, self.positions, self.velocities)

    def since(self, time_ns: int) -> Reference:
        """Returns the part needed from a time on: the last knot at or before the time, and all later knots."""
        return self._part(slice(max(0, int(np.searchsorted(self.times_ns, time_ns, side="right")) - 1), None))

    def beginning(self, time_ns: int, period_ns: int) -> Reference:
        """Returns the same curve with a new first knot at a time, or less than ``period_ns`` before it.

        The new knot is a whole number of periods before the next one. If the time is before the first knot, a reference
        that begins at rest is extended at rest, and any other is returned unchanged.

        Args:
            time_ns: The time.
            period_ns: One control step.
        """
        if time_ns < self.times_ns[0] and self.velocities[0].any():
            return self
        later, first_ns = self.from_time(time_ns), time_ns
        if later is not None:
            next_ns = int(later.times_ns[0])
            first_ns = next_ns + (time_ns - next_ns) // period_ns * period_ns
        position, velocity = self.sample(first_ns)
        first = Reference(np.array([first_ns], dtype=np.int64), position[None], velocity[None])
        return first if later is None else first.then(later)

    def resting(self, duration_ns: int) -> Reference:
        """Returns the reference with one more knot at its end position, ``duration_ns`` after its end."""
        end = Reference(np.array([self.end_ns + duration_ns]), self.positions[-1:], np.zeros_like(self.velocities[-1:]))
        return self.then(end)

    def then(self, other: Reference) -> Reference:
        """Returns this reference's knots before the first knot of ``other``, followed by ``other``."""
        before = self.times_ns < other.times_ns[0]
        return Reference(
            np.concatenate([self.times_ns[before], other.times_ns]),
            np.concatenate([self.positions[before], other.positions]),
            np.concatenate([self.velocities[before], other.velocities]),
        )

    def _part(self, knots: np.ndarray | slice) -> Reference:
        return Reference(self.times_ns[knots], self.positions[knots], self.velocities[knots])
