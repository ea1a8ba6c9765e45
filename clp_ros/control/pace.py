# SPDX-License-Identifier: Apache-2.0
"""When chunks are made, and when the robot is stopped."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Pace:
    """When chunks are made.

    Attributes:
        replan_steps: Control steps from one chunk's observation to the next one's; 0: as fast as frames come.
        rate_hz: Most chunks a second; 0: no such limit.
        max_latency_s: Largest age of an observation at the moment its chunk would be sent; older ones are dropped.
    """

    replan_steps: int
    rate_hz: float = 0.0
    max_latency_s: float = 1.0

    def interval_ns(self, period_ns: int) -> int:
        """Least time between two observations, given the control period."""
        return max(self.replan_steps * period_ns, round(1e9 / self.rate_hz) if self.rate_hz else 0)


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
