# SPDX-License-Identifier: Apache-2.0
"""What goes to the controllers: chunks joined by the schedule, and the stop when there is no chunk to follow.

A message begins with points that have passed already: those that the robot has just followed. A
joint_trajectory_controller with ``interpolate_from_desired_state: false``, its default, begins a new trajectory at the
measured state, and goes from there to the first point that is still to come: a step as large as the joints' lag. It
uses the measured state only before the first point of the message. Where that has passed, the controller is on the
trajectory at once, which is the one that it has followed so far, whatever the parameter says.

A robot may scale its speed (Universal Robots: the speed slider, safety limits, a pause). A controller that knows of it
passes through its trajectory as much more slowly, until a new message sets it back to the time of the clock. So the
schedule goes by trajectory time (:mod:`clp_ros.control.scaled_clock`), and a message puts the point at which the robot
is now at the present time of the clock. What goes to a controller that does not know of the scaling is stretched.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import numpy as np

from clp_ros.control.chunk_schedule import ChunkSchedule, Joined, Plan, ScheduleSettings
from clp_ros.control.reference import Reference
from clp_ros.control.safety import Limits, check_measured
from clp_ros.control.scaled_clock import PAUSED_BELOW, ScaledClock
from clp_ros.robots.embodiment import Embodiment
from clp_ros.robots.trajectory import Trajectory, joint_positions, split_trajectory

# A stop says for so long that the robot rests: a controller drops a message whose end has passed when it comes.
REST_S = 1.0
# More than this is not added to the lead time: a computer that is so slow for once is not always.
MAX_PLANNING_NS = 20_000_000


# A change of the speed scaling for which a controller that does not know of it is given what it follows anew.
_RESCALED = 0.02
# A message begins so long before it is sent, or two control steps before: more than the clocks of both hosts may
# differ by.
PAST_NS = 100_000_000


@dataclass(frozen=True)
class Planned:
    """A chunk that has been joined and is ready to be sent.

    Attributes:
        plan: What the schedule is to become.
        messages: What is to be sent.
        followed: What the robot has followed of late, and is to follow.
        stamp_ns: When it is sent.
    """

    plan: Plan
    messages: Any
    followed: Reference
    stamp_ns: int


class TrajectoryOutput:
    """Sends one robot's reference.

    One thread at a time may call :meth:`start`, :meth:`refresh`, :meth:`send`, :meth:`chunk` and :meth:`safe_stop`: its
    owner holds a lock around them. Any thread may call the others at any time.

    Args:
        embodiment: The robot.
        settings: How chunks are joined.
        send: Sends what ``serialise`` has made of the trajectories of one moment, one a controller.
        clock_ns: The time on the robot's clock, nanoseconds.
        serialise: Makes messages of trajectories; called without a lock where that may take its time.

    Attributes:
        stamp_ns: When the last message was made, nanoseconds; None before the first.
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
        self._period_ns = embodiment.period_ns
        self._past_ns = max(PAST_NS, 2 * embodiment.period_ns)
        self._from_measured: frozenset[str] = frozenset()
        # By the joints' indices: two arms may have joints of the same names.
        self._controller_of = [name for name, controller in embodiment.controllers.items() for _ in controller.joints]
        # The reference since some time before now, and when the first point of it may be sent.
        self._followed: Reference | None = None
        self._started_ns = 0
        self._time = ScaledClock()
        scaling = embodiment.speed_scaling
        self._scaled = frozenset(embodiment.controllers if scaling is None else scaling.controllers)
        self._sent_scaling = 1.0
        # Jumps of the clock that what is followed has not been moved by yet.
        self._jumps: deque[int] = deque()
        self.stamp_ns: int | None = None

    @property
    def is_paused(self) -> bool:
        """Whether the robot stands still because its speed scaling is 0."""
        return self._time.is_paused

    def set_speed_scaling(self, scaling: float) -> None:
        """Takes note of the robot's speed scaling, 1 at full speed. Any thread may call it."""
        self._time.set(scaling, self._clock_ns())

    def trajectory_ns(self, time_ns: int) -> int:
        """Trajectory time at a time of the robot's clock: it passes as slowly as the robot is."""
        return self._time.at(time_ns)

    def clock_ns(self, trajectory_ns: int) -> int:
        """The robot's clock at a trajectory time that is not long past, if the robot goes on as fast as it does now."""
        now = self._clock_ns()
        return now + round((trajectory_ns - self._time.at(now)) / max(self._time.scaling, PAUSED_BELOW))

    def start(self, from_measured: Collection[str] = ()) -> None:
        """Begins anew, from where the robot is.

        Args:
            from_measured: The controllers, by their names in the embodiment, that begin a new trajectory at the
                measured state. Their first message, too, begins with points that have passed, at the measured state.
                Any other controller is given time to come from its last command, which may be somewhere else.
        """
        self._from_measured = frozenset(from_measured)
        self._schedule.reset()
        self._followed = None
        self._jumps.clear()
        self._time.restart(self._clock_ns())

    def note_jump(self, jumped_ns: int) -> None:
        """Notes a jump of the clock: no chunk is sent from now on until the next :meth:`safe_stop`."""
        self._jumps.append(jumped_ns)

    @property
    def needs_refresh(self) -> bool:
        """Whether :meth:`refresh` may have something to send."""
        if self._followed is None or len(self._scaled) == len(self._embodiment.controllers):
            return False
        return abs(self._time.scaling - self._sent_scaling) >= _RESCALED

    def refresh(self) -> None:
        """Sends what is followed anew to controllers that do not know of the speed scaling, where that has changed."""
        scaling, now = self._time.scaling, self._clock_ns()
        if not self.needs_refresh:
            return
        place_ns = self._time.at(now)
        if not self._started_ns < place_ns < self._followed.end_ns:
            return
        begin_ns = place_ns - self._past_ns
        sent = self._resting(now) if self._time.is_paused else self._followed.beginning(begin_ns, self._period_ns)
        messages = [one for one in self._split(sent, now, scaling) if one.controller not in self._scaled]
        self._send(self._serialise(messages))
        self._sent_scaling = scaling

    def check_state(self, state: np.ndarray) -> None:
        """Takes note of where the robot is, and refuses to drive one that reports to be outside its limits.

        Args:
            state: (joints,), where the robot is, in the policy's units.

        Raises:
            OutsideError: A joint is.
        """
        measured = joint_positions(state, self._embodiment)
        check_measured(measured, self._schedule.limits)
        self._schedule.observe(measured, self._time.at(self._clock_ns()))

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
        plan = self._schedule.plan(
            positions, self._time.at(observed_ns), self._time.at(now), joint_positions(state, self._embodiment)
        )
        followed = self._following(plan, now)
        planned = Planned(plan, self._messages(followed, plan, plan.ahead, now), followed, now)
        # The clock may jump meanwhile.
        self._planning_ns = min(max(0, self._clock_ns() - begun), MAX_PLANNING_NS)
        return planned

    def send(self, planned: Planned) -> bool:
        """Sends what was planned, and follows it from then on.

        Returns:
            Whether it did: not if the schedule has changed, or the clock has jumped, since the plan was made.
        """
        if self._jumps or not self._schedule.is_current(planned.plan):
            return False
        self._send(planned.messages)
        self._commit(planned.plan, planned.followed)
        self.stamp_ns = planned.stamp_ns
        return True

    def chunk(self, positions: np.ndarray, observed_ns: int, state: np.ndarray) -> Joined:
        """:meth:`plan` and :meth:`send` in one."""
        planned = self.plan(positions, observed_ns, state)
        self.send(planned)
        return planned.plan.joined

    def safe_stop(self) -> bool:
        """Brakes to rest and stays there; returns whether there was anything to brake."""
        now = self._clock_ns()
        while self._jumps:
            jumped_ns = self._jumps.popleft()
            self._schedule.shift(jumped_ns)
            self._time.shift(jumped_ns, now)
            if self._followed is not None:
                self._followed, self._started_ns = self._followed.shifted(jumped_ns), self._started_ns + jumped_ns
        if self._time.is_paused:
            return self._stay(now)
        plan = self._schedule.plan_safe_stop(self._time.at(now))
        if plan.ahead is None:
            self._schedule.commit(plan)
            return False
        followed = self._following(plan, now)
        self._send(self._messages(followed, plan, plan.ahead.resting(round(REST_S * 1e9)), now))
        self._commit(plan, followed)
        self.stamp_ns = now
        return True

    def _stay(self, now: int) -> bool:
        """Keeps a robot that is paused where it is, also when it goes on; returns whether it was on its way.

        It stands still, however fast it was. So the message leads to no other place, whenever it comes.
        """
        followed, place_ns = self._followed, self._time.at(now)
        if followed is None or place_ns >= followed.end_ns:
            return False
        self._send(self._serialise(self._split(self._resting(now), now, 1.0)))
        self._schedule.reset()
        self._followed = None
        self.stamp_ns = now
        return True

    def _resting(self, now: int) -> Reference:
        """At rest where the robot is now, for some time."""
        place_ns = self._time.at(now)
        times = np.array([place_ns - self._past_ns, place_ns + round(REST_S * 1e9)], dtype=np.int64)
        positions = np.repeat(self._followed.sample(place_ns)[0][None], 2, axis=0)
        return Reference(times, positions, np.zeros_like(positions))

    def _commit(self, plan: Plan, followed: Reference) -> None:
        self._schedule.commit(plan)
        self._followed, self._started_ns = followed, plan.after.started_ns
        self._sent_scaling = self._time.scaling

    def _following(self, plan: Plan, now: int) -> Reference:
        """The reference of a plan, and what was followed before it, as far as a message needs it."""
        new, followed = plan.after.reference, self._followed  # which others may take away meanwhile
        if followed is None or plan.after.started_ns != self._started_ns:
            return new  # it begins at rest where the robot is
        return followed.since(self._time.at(now) - self._past_ns).then(new)

    def _messages(self, followed: Reference, plan: Plan, ahead: Reference, now: int) -> Any:
        scaling = self._time.scaling
        past, begin_ns = followed.before(int(ahead.times_ns[0])), self._time.at(now) - self._past_ns
        sent = ahead if past is None else past.beginning(begin_ns, self._period_ns).then(ahead)
        if int(sent.times_ns[0]) >= plan.after.started_ns:
            return self._serialise(self._split(sent, now, scaling))
        # The first moments: no point is before the one at which the controllers have come from their last command.
        others = ahead if past is None else (past.from_time(plan.after.started_ns - 1) or ahead).then(ahead)
        both = zip(self._split(sent, now, scaling), self._split(others, now, scaling), strict=True)
        # One that would be led from outside the limits to their edge at once is given that time too.
        at_once = self._from_measured - {self._controller_of[joint] for joint in plan.after.outside}
        return self._serialise([one if one.controller in at_once else other for one, other in both])

    def _split(self, reference: Reference, now: int, scaling: float) -> list[Trajectory]:
        """One trajectory a controller: what the robot is at now, in trajectory time, is at ``now`` of the clock."""
        after_ns = reference.times_ns - self._time.at(now)
        trajectories = self._stamped(after_ns, reference, 1.0, now)
        if scaling == 1.0 or len(self._scaled) == len(trajectories):
            return trajectories
        slower = self._stamped(after_ns, reference, max(scaling, PAUSED_BELOW), now)
        both = zip(trajectories, slower, strict=True)
        return [one if one.controller in self._scaled else other for one, other in both]

    def _stamped(self, after_ns: np.ndarray, reference: Reference, speed: float, now: int) -> list[Trajectory]:
        if speed != 1.0:
            after_ns = np.round(after_ns / speed).astype(np.int64)
        # A time from the start is positive. The stamp is always as long before now, to be read by a person.
        before_ns = 0
        if after_ns[0] <= 0:
            before_ns = min(-self._past_ns - 2 * self._period_ns, int(after_ns[0]) - self._period_ns)
        times = (after_ns - before_ns) / 1e9
        velocities = reference.velocities * speed
        return split_trajectory(times, reference.positions, self._embodiment, velocities, now + before_ns)
