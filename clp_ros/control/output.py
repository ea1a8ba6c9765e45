# SPDX-License-Identifier: Apache-2.0
"""What goes to the controllers: chunks joined by the schedule, and the stop when there is no chunk to follow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from clp_ros.control.chunk_schedule import ChunkSchedule, Joined, Plan, ScheduleSettings
from clp_ros.control.reference import Reference
from clp_ros.control.safety import Limits, check_measured
from clp_ros.robots.embodiment import Embodiment
from clp_ros.robots.trajectory import Trajectory, joint_positions, split_trajectory

# A stop says for so long that the robot rests: a controller drops a message whose end has passed when it comes.
REST_S = 1.0
# More than this is not added to the lead time: a computer that is so slow for once is not always.
MAX_PLANNING_NS = 20_000_000


@dataclass(frozen=True)
class Planned:
    """A chunk that has been joined and is ready to be sent.

    Attributes:
        plan: What the schedule is to become.
        messages: What is to be sent.
        stamp_ns: The messages' stamp.
    """

    plan: Plan
    messages: Any
    stamp_ns: int


class TrajectoryOutput:
    """Sends one robot's reference. Its owner's lock is held around every call, but not around :meth:`plan`.

    Args:
        embodiment: The robot.
        settings: How chunks are joined.
        send: Sends what ``serialise`` has made of the trajectories of one moment, one a controller.
        clock_ns: The time on the robot's clock, nanoseconds.
        serialise: Makes messages of trajectories; called without a lock where that may take its time.

    Attributes:
        stamp_ns: Stamp of what was sent last, nanoseconds; None before the first.
    """

    def __init__(
        self,
        embodiment: Embodiment,
        settings: ScheduleSettings,
        send: Callable[[Any], None],
        clock_ns: Callable[[], int],
        serialise: Callable[[list[Trajectory]], Any] = lambda trajectories: trajectories,
    ) -> None:
        self._embodiment = embodiment
        self._schedule = ChunkSchedule(Limits.of(embodiment), embodiment.period_ns, settings)
        self._send = send
        self._serialise = serialise
        self._clock_ns = clock_ns
        # How long the last plan took. The next one's splice is so much later: its message is sent by then.
        self._planning_ns = 0
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

    def plan(self, positions: np.ndarray, observed_ns: int, state: np.ndarray) -> Planned:
        """Joins a chunk to what the robot follows. Changes nothing and sends nothing: no lock need be held.

        Args:
            positions: (steps, joints), rad or m.
            observed_ns: When its observation was made.
            state: (joints,), where the robot is now, in the policy's units.

        Raises:
            ClpError: It must not be sent (:meth:`ChunkSchedule.plan`).
        """
        begun = self._clock_ns()
        now = begun + self._planning_ns
        plan = self._schedule.plan(positions, observed_ns, now, joint_positions(state, self._embodiment))
        planned = Planned(plan, self._messages(plan.ahead, now), now)
        # The clock may jump meanwhile.
        self._planning_ns = min(max(0, self._clock_ns() - begun), MAX_PLANNING_NS)
        return planned

    def send(self, planned: Planned) -> bool:
        """Sends what was planned, and follows it from then on.

        Returns:
            Whether it did: not if the schedule has changed since the plan was made.
        """
        if not self._schedule.is_current(planned.plan):
            return False
        self._send(planned.messages)
        self._schedule.commit(planned.plan)
        self.stamp_ns = planned.stamp_ns
        return True

    def chunk(self, positions: np.ndarray, observed_ns: int, state: np.ndarray) -> Joined:
        """:meth:`plan` and :meth:`send` in one."""
        planned = self.plan(positions, observed_ns, state)
        self.send(planned)
        return planned.plan.joined

    def hold(self, jumped_ns: int = 0) -> bool:
        """Brakes to rest and stays there; returns whether there was anything to brake.

        Args:
            jumped_ns: By how much the clock has jumped since the last call of anything here.
        """
        now = self._clock_ns()
        if jumped_ns:
            self._schedule.shift(jumped_ns)
        plan = self._schedule.plan_hold(now)
        if plan.ahead is not None:
            self._send(self._messages(plan.ahead.resting(round(REST_S * 1e9)), now))
            self.stamp_ns = now
        self._schedule.commit(plan)
        return plan.ahead is not None

    def _messages(self, reference: Reference, now: int) -> Any:
        times = (reference.times_ns - now) / 1e9
        return self._serialise(
            split_trajectory(times, reference.positions, self._embodiment, reference.velocities, now)
        )
