# SPDX-License-Identifier: Apache-2.0
"""What goes to the controllers: chunks joined by the schedule, and the stop when there is no chunk to follow."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from clp_ros.control.chunk_schedule import ChunkSchedule, Joined, ScheduleSettings
from clp_ros.control.reference import Reference
from clp_ros.control.safety import Limits, check_measured
from clp_ros.robots.embodiment import Embodiment
from clp_ros.robots.trajectory import Trajectory, joint_positions, split_trajectory

# A stop says for so long that the robot rests: a controller drops a message whose end has passed when it comes.
REST_S = 1.0


class TrajectoryOutput:
    """Sends one robot's reference. Not thread-safe: its owner's lock is held around every call.

    Args:
        embodiment: The robot.
        settings: How chunks are joined.
        send: Sends the trajectories of one moment, one a controller.
        clock_ns: The time on the robot's clock, nanoseconds.

    Attributes:
        stamp_ns: Stamp of what was sent last, nanoseconds; None before the first.
    """

    def __init__(
        self,
        embodiment: Embodiment,
        settings: ScheduleSettings,
        send: Callable[[list[Trajectory]], None],
        clock_ns: Callable[[], int],
    ) -> None:
        self._embodiment = embodiment
        self._schedule = ChunkSchedule(Limits.of(embodiment), embodiment.period_ns, settings)
        self._send = send
        self._clock_ns = clock_ns
        self.stamp_ns: int | None = None

    def start(self) -> None:
        """Begins anew, from where the robot is."""
        self._schedule.reset()

    def check_state(self, state: np.ndarray) -> None:
        """Takes note of where the robot is, and refuses to drive one that reports to be outside its limits.

        Args:
            state: (joints,), where the robot is, in the policy's units.

        Raises:
            Outside: A joint is.
        """
        measured = joint_positions(state, self._embodiment)
        check_measured(measured, self._schedule.limits)
        self._schedule.observe(measured, self._clock_ns())

    def chunk(self, positions: np.ndarray, observed_ns: int, state: np.ndarray) -> Joined:
        """Joins a chunk to what the robot follows, and sends it.

        Args:
            positions: (steps, joints), rad or m.
            observed_ns: When its observation was made.
            state: (joints,), where the robot is now, in the policy's units.

        Raises:
            ClpError: It must not be sent (:meth:`ChunkSchedule.add`); nothing was.
        """
        now = self._clock_ns()
        joined = self._schedule.add(positions, observed_ns, now, joint_positions(state, self._embodiment))
        self._publish(joined.reference, now)
        return joined

    def policy_ns(self, time_ns: int) -> int:
        """See :meth:`ChunkSchedule.policy_ns`."""
        return self._schedule.policy_ns(time_ns)

    def hold(self, jumped_ns: int = 0) -> bool:
        """Brakes to rest and stays there; returns whether there was anything to brake.

        Args:
            jumped_ns: By how much the clock has jumped since the last call of anything here.
        """
        now = self._clock_ns()
        if jumped_ns:
            self._schedule.shift(jumped_ns)
        stop = self._schedule.hold(now)
        if stop is None:
            return False
        self._publish(stop.resting(round(REST_S * 1e9)), now)
        return True

    def _publish(self, reference: Reference, now: int) -> None:
        times = (reference.times_ns - now) / 1e9
        self._send(split_trajectory(times, reference.positions, self._embodiment, reference.velocities, now))
        self.stamp_ns = now
