# SPDX-License-Identifier: Apache-2.0
"""When chunks are made, and when the robot is stopped."""

from __future__ import annotations

from dataclasses import dataclass

# So long after its splice, the robot follows a new chunk: about three time constants of the tracking.
_IN_EFFECT_S = 0.1
# A policy takes long if a chunk takes over so much later than its observation was made.
_SLOW_S = 0.12
# Steps of a chunk that are left when the next one comes, at least.
_SPARE_STEPS = 2


@dataclass(frozen=True)
class Pace:
    """When chunks are made.

    Attributes:
        replan_steps: Least number of control steps from one chunk's observation to the next one's; 0: as fast as frames
            come. See :meth:`due_ns`.
        rate_hz: Most chunks a second; 0: no such limit.
        max_latency_s: Largest age of an observation at the moment its chunk would be sent; older ones are dropped.
    """

    replan_steps: int
    rate_hz: float = 0.0
    max_latency_s: float = 1.0

    def interval_ns(self, period_ns: int) -> int:
        """Least time between two observations, given the control period."""
        return max(self.replan_steps * period_ns, round(1e9 / self.rate_hz) if self.rate_hz else 0)

    def due_ns(self, mode: str, observed_ns: int, splice_ns: int, steps: int, period_ns: int, expected_s: float) -> int:
        """When the next observation may be made, after a chunk has been sent.

        Not before :meth:`interval_ns` has passed. In mode ``replace`` with a policy that takes long, not before the
        robot follows the chunk either: before that the policy would see a robot that follows an older chunk, and the
        next chunk, which alone counts then, would contradict this one. The other modes bring both together. In any case
        so early that the next chunk comes before this one ends.

        Args:
            mode: See :class:`~clp_ros.control.chunk_schedule.ScheduleSettings`.
            observed_ns: When the observation of the chunk was made.
            splice_ns: When the chunk takes over.
            steps: Of the chunk.
            period_ns: One control step.
            expected_s: What the next chunk is expected to take, from its observation until its splice.
        """
        earliest = observed_ns + self.interval_ns(period_ns)
        if mode == "replace" and splice_ns - observed_ns > _SLOW_S * 1e9:
            earliest = max(earliest, splice_ns + round(_IN_EFFECT_S * 1e9))
        spare = (steps - _SPARE_STEPS) * period_ns - round(expected_s * 1e9)
        return min(earliest, observed_ns + max(0, spare))


@dataclass(frozen=True)
class Watch:
    """When the guard stops the robot.

    Attributes:
        input_timeout_s: An input may be missing, stale, or stamped in the future for so long.
        policy_timeout_s: A chunk may take so long.
        max_faults: After so many faults since the activation :attr:`ChunkRunner.failed` is called; 0: never.
    """

    input_timeout_s: float = 0.3
    policy_timeout_s: float = 5.0
    max_faults: int = 20
