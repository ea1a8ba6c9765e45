# SPDX-License-Identifier: Apache-2.0
"""When the policy makes the next chunk."""

from __future__ import annotations

from dataclasses import dataclass

# Time after the splice until the robot follows a new chunk: about three time constants of the tracking.
_IN_EFFECT_S = 0.1
# A policy counts as slow if more time than this passes from an observation to the splice of its chunk.
_SLOW_S = 0.12
# The next chunk must arrive while at least this many steps of the current one remain.
_SPARE_STEPS = 2


@dataclass(frozen=True)
class ReplanConfig:
    """When the policy makes chunks.

    Attributes:
        replan_steps: Least number of control steps between the observations of two chunks. With 0, a chunk is made
            whenever new frames arrive. See :meth:`due_ns`.
        rate_hz: Largest number of chunks per second; 0: no limit.
        max_latency_s: Largest age of an observation, in seconds, when its chunk is sent. Older chunks are dropped.
    """

    replan_steps: int
    rate_hz: float = 0.0
    max_latency_s: float = 1.0

    def interval_ns(self, period_ns: int) -> int:
        """Returns the least time between two observations, in nanoseconds.

        Args:
            period_ns: One control step.
        """
        return max(self.replan_steps * period_ns, round(1e9 / self.rate_hz) if self.rate_hz else 0)

    def due_ns(self, mode: str, observed_ns: int, splice_ns: int, steps: int, period_ns: int, expected_s: float) -> int:
        """Returns the earliest time of the next observation, after a chunk was sent.

        The next observation waits for :meth:`interval_ns`. In mode ``replace`` with a slow policy, the next observation
        also waits until the robot follows the chunk. Otherwise the policy would observe a robot that still follows an
        older chunk, and its next chunk would contradict this one. The modes ``ensemble`` and ``rtc`` reconcile both
        chunks and need no such wait. In every mode, the observation is early enough for the next chunk to arrive
        before this one ends.

        Args:
            mode: See :class:`~clp_ros.control.chunk_schedule.ScheduleSettings`.
            observed_ns: Observation time of the chunk that was sent.
            splice_ns: Time of the splice of that chunk.
            steps: Number of steps of that chunk.
            period_ns: One control step.
            expected_s: Expected time from the next observation to the splice of its chunk.

        Returns:
            The time in nanoseconds, on the clock of ``observed_ns``.
        """
        earliest = observed_ns + self.interval_ns(period_ns)
        if mode == "replace" and splice_ns - observed_ns > _SLOW_S * 1e9:
            earliest = max(earliest, splice_ns + round(_IN_EFFECT_S * 1e9))
        spare = (steps - _SPARE_STEPS) * period_ns - round(expected_s * 1e9)
        return min(earliest, observed_ns + max(0, spare))
