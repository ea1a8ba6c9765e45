# SPDX-License-Identifier: Apache-2.0
"""What a chunk schedule keeps between two chunks, and the plans that change it. All objects here are immutable."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from clp_ros.control.chunks import Chunk
from clp_ros.control.reference import Reference
from clp_ros.control.spline_tracking import ORDER, extended, knots


@dataclass(frozen=True)
class Spline:
    """The reference since the last splice, as a uniform cubic B-spline that ends at rest.

    Attributes:
        start_ns: Time of the first knot.
        period_ns: Time between two knots: one control step.
        coefficients: (knots + 2, joints) float64, rad or m.
    """

    start_ns: int
    period_ns: int
    coefficients: np.ndarray

    def knot_after(self, time_ns: int) -> int:
        """Returns the index of the first knot at or after a time."""
        return max(0, -((self.start_ns - time_ns) // self.period_ns))

    def rest(self, knot: int) -> np.ndarray:
        """Returns the coefficients from a knot on: (coefficients, joints), at least three."""
        return extended(self.coefficients[min(knot, len(self.coefficients) - 1) :], ORDER)

    def reference(self, until_ns: int) -> Reference:
        """Returns the knots as a reference that ends where the spline is at rest, but not before ``until_ns``."""
        changing = np.flatnonzero((np.diff(self.coefficients, axis=0) != 0).any(axis=1))
        count = max(int(changing[-1]) + 2 if len(changing) else 1, self.knot_after(until_ns) + 1)
        positions, velocities = knots(self.coefficients[: count + 2], self.period_ns / 1e9)
        times = self.start_ns + np.arange(len(positions), dtype=np.int64) * self.period_ns
        return Reference(times, positions, velocities)


@dataclass(frozen=True)
class ScheduleState:
    """The reference that the robot follows, and how it was made.

    Attributes:
        reference: The reference, including knots that have passed.
        spline: The reference since the last splice.
        chunks: The chunks that the reference tracks, the oldest first.
        started_ns: No point before this time is sent, because the controllers still move from their last command to
            the beginning of the reference; 0 before the first chunk.
        is_stopping: Whether the reference is a safe stop.
        outside: Indices of the joints that were outside their limits when the reference began.
    """

    reference: Reference
    spline: Spline
    chunks: tuple[Chunk, ...] = ()
    started_ns: int = 0
    is_stopping: bool = False
    outside: tuple[int, ...] = ()

    def ahead(self, now_ns: int) -> Reference:
        """Returns the points to send.

        The points before ``started_ns`` are left out. They are close to the measured position, which may be a step
        away from the controllers' last command.

        Args:
            now_ns: The time; only later points are returned.
        """
        first_ns = max(now_ns + 1, self.started_ns)
        reference = self.reference
        if reference.end_ns < first_ns:
            reference = reference.resting(first_ns - reference.end_ns)
        return reference.from_time(first_ns - 1) or reference

    def shifted(self, offset_ns: int) -> ScheduleState:
        """Returns the state with all times moved, without its chunks. A safe stop does not stay one."""
        return ScheduleState(
            self.reference.shifted(offset_ns),
            replace(self.spline, start_ns=self.spline.start_ns + offset_ns),
            started_ns=self.started_ns + offset_ns,
            outside=self.outside,
        )


@dataclass(frozen=True)
class Joined:
    """How a chunk was joined to the reference.

    Attributes:
        reference: What the controllers follow from now on: the remaining knots of the old reference up to the splice,
            and the new reference.
        splice_ns: Time of the splice.
        skipped: Number of steps of the chunk that lie before the splice.
        position_gap: (joints,) float64, rad or m: distance of the chunk from the old reference at the splice.
        velocity_gap: (joints,) float64, per second: the same for velocities.
        deviation: (joints,) float64, rad or m: largest distance of the new reference from the chunk.
    """

    reference: Reference
    splice_ns: int
    skipped: int
    position_gap: np.ndarray
    velocity_gap: np.ndarray
    deviation: np.ndarray


@dataclass(frozen=True)
class Plan:
    """A change of the schedule that was computed, but not applied.

    Attributes:
        version: The schedule's version that the plan changes.
        after: The state after the change; None: the robot follows nothing.
        ahead: The points to send; None where there is nothing to send.
    """

    version: int
    after: ScheduleState | None
    ahead: Reference | None


@dataclass(frozen=True)
class ChunkPlan(Plan):
    """A plan that adds a chunk.

    Attributes:
        joined: How the chunk is joined.
    """

    after: ScheduleState
    ahead: Reference
    joined: Joined
