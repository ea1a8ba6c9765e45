# SPDX-License-Identifier: Apache-2.0
"""Sends trajectories to the controllers: chunks joined by the schedule, and safe stops.

A message begins with points that have passed: those that the robot has just followed. The reason is the
joint_trajectory_controller's parameter ``interpolate_from_desired_state``, whose default is false. Then a controller
begins a new trajectory at the measured state and moves from there to the first point in the future, which is a step of
the size of the joints' lag. But the controller uses the measured state only before the first point of the message.
Where the first point has passed, the controller continues on the trajectory at once, whatever the parameter says.

A robot may scale its speed (Universal Robots: the speed slider, safety limits, a pause). A controller that supports
speed scaling slows down its trajectory accordingly, until a new message sets it back to the time of the clock. So the
schedule uses trajectory time (:mod:`clp_ros.control.scaled_clock`), and each message puts the point at which the robot
is now at the present time of the clock. For a controller without speed scaling, the message is stretched in time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import numpy as np

from clp_ros.control.chunk_schedule import ChunkSchedule, ScheduleSettings
from clp_ros.control.reference import Reference
from clp_ros.control.safety import Limits, check_measured
from clp_ros.control.scaled_clock import PAUSED_BELOW, ScaledClock
from clp_ros.control.schedule_state import ChunkPlan, Joined, Plan, ScheduleState
from clp_ros.robots.embodiment import Embodiment
from clp_ros.robots.trajectory import Trajectory, joint_positions, split_trajectory

# The last point of a safe stop is repeated after this time. A controller drops a message whose end has already passed.
REST_S = 1.0
# Upper bound of the planning time that is added to the lead time. A longer time is not expected to occur again.
MAX_PLANNING_NS = 20_000_000
# The trajectory is sent again to controllers without speed scaling when the scaling changes by this much.
_RESCALED = 0.02
# A message begins this long before it is sent, or two control steps if that is longer. The clocks of the two hosts must
# differ by less.
PAST_NS = 100_000_000


@dataclass(frozen=True)
class Planned:
    """A chunk that was joined and serialised, but not sent.

    Attributes:
        plan: The change of the schedule.
        messages: What ``serialise`` returned.
        followed: The reference, including the points that the robot has just followed.
        stamp_ns: The time for which the messages were made.
    """

    plan: ChunkPlan
    messages: Any
    followed: Reference
    stamp_ns: int


class TrajectoryOutput:
    """Sends the trajectories of one robot.

    Only one thread at a time may call :meth:`start`, :meth:`refresh`, :meth:`send`, :meth:`chunk` and
    :meth:`safe_stop`: the caller must hold a lock. Any thread may call the other methods at any time.

    Args:
        embodiment: The robot.
        settings: How chunks are joined.
        send: Sends what ``serialise`` returned.
        clock_ns: Returns the time on the robot's clock, in nanoseconds.
        serialise: Makes messages of the trajectories of one moment, one per controller. It may take some time, so it is
            called without a lock where possible.

    Attributes:
        stamp_ns: When the last message was made, in nanoseconds; None before the first.
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
        # How long the last plan took. The next splice is later by this time, because planning delays the message.
        self._planning_ns = 0
        self._period_ns = embodiment.period_ns
        self._past_ns = max(PAST_NS, 2 * embodiment.period_ns)
        self._from_measured: frozenset[str] = frozenset()
        # The controller of each joint, by index: two arms may have joints of the same names.
        self._controller_of = [name for name, controller in embodiment.controllers.items() for _ in controller.joints]
        # The reference since some time before now, and the time before which no point of it may be sent.
        self._followed: Reference | None = None
        self._started_ns = 0
        self._time = ScaledClock()
        scaling = embodiment.speed_scaling
        self._scaled = frozenset(embodiment.controllers if scaling is None else scaling.controllers)
        self._sent_scaling = 1.0
        # Jumps of the clock that are not yet applied to the schedule.
        self._jumps: deque[int] = deque()
        self.stamp_ns: int | None = None

    @property
    def is_paused(self) -> bool:
        """Whether the robot stands still because its speed scaling is 0."""
        return self._time.is_paused

    def set_speed_scaling(self, scaling: float) -> None:
        """Sets the robot's speed scaling, 1 at full speed."""
        self._time.set(scaling, self._clock_ns())

    def trajectory_ns(self, time_ns: int) -> int:
        """Returns the trajectory time at a time of the robot's clock. It passes more slowly on a slowed robot."""
        return self._time.at(time_ns)

    def clock_ns(self, trajectory_ns: int) -> int:
        """Returns the robot's clock at a trajectory time, assuming the present speed scaling.

        Args:
            trajectory_ns: A trajectory time in the future or shortly before now.
        """
        now = self._clock_ns()
        return now + round((trajectory_ns - self._time.at(now)) / max(self._time.scaling, PAUSED_BELOW))

    def start(self, from_measured: Collection[str] = ()) -> None:
        """Begins anew at the robot's position.

        Args:
            from_measured: Names in the embodiment of the controllers that begin a new trajectory at the measured state.
                Their first message also begins with points that have passed, at the measured state. Any other
                controller gets time to move from its last command, which may be at another position.
        """
        self._from_measured = frozenset(from_measured)
        self._schedule.reset()
        self._followed = None
        self._jumps.clear()
        self._time.restart(self._clock_ns())

    def note_jump(self, jumped_ns: int) -> None:
        """Records a jump of the clock by ``jumped_ns``. No chunk is sent until the next :meth:`safe_stop`."""
        self._jumps.append(jumped_ns)

    @property
    def needs_refresh(self) -> bool:
        """Whether :meth:`refresh` may have a message to send."""
        if self._followed is None or len(self._scaled) == len(self._embodiment.controllers):
            return False
        return abs(self._time.scaling - self._sent_scaling) >= _RESCALED

    def refresh(self) -> None:
        """Sends the trajectory again to controllers without speed scaling, if the scaling has changed."""
        scaling, now, followed = self._time.scaling, self._clock_ns(), self._followed
        if followed is None or not self.needs_refresh:
            return
        place_ns = self._time.at(now)
        if not self._started_ns < place_ns < followed.end_ns:
            return
        begin_ns = place_ns - self._past_ns
        sent = self._resting(followed, now) if self._time.is_paused else followed.beginning(begin_ns, self._period_ns)
        messages = [one for one in self._split(sent, now, scaling) if one.controller not in self._scaled]
        self._send(self._serialise(messages))
        self._sent_scaling = scaling

    def check_state(self, state: np.ndarray) -> None:
        """Records the robot's position, and checks that it is inside the limits.

        Args:
            state: (joints,) measured positions, in the policy's units.

        Raises:
            OutsideError: A joint is outside its limits. The error names the joint.
        """
        measured = joint_positions(state, self._embodiment)
        check_measured(measured, self._schedule.limits)
        self._schedule.observe(measured, self._time.at(self._clock_ns()))

    def plan(self, positions: np.ndarray, observed_ns: int, state: np.ndarray) -> Planned:
        """Joins a chunk to the reference. This changes and sends nothing, so the caller needs no lock.

        Args:
            positions: (steps, joints), rad or m.
            observed_ns: Time of the chunk's observation.
            state: (joints,) positions now, in the policy's units.

        Raises:
            ClpError: The chunk must not be sent. See :meth:`ChunkSchedule.plan`.
        """
        begun = self._clock_ns()
        now = begun + self._planning_ns
        plan = self._schedule.plan(
            positions, self._time.at(observed_ns), self._time.at(now), joint_positions(state, self._embodiment)
        )
        followed = self._following(plan.after, now)
        planned = Planned(plan, self._messages(followed, plan.after, plan.ahead, now), followed, now)
        # The difference is negative or large if the clock jumps while planning.
        self._planning_ns = min(max(0, self._clock_ns() - begun), MAX_PLANNING_NS)
        return planned

    def send(self, planned: Planned) -> bool:
        """Sends a planned chunk and commits its plan.

        Returns:
            Whether the chunk was sent. It is not if the schedule has changed or the clock has jumped since planning.
        """
        if self._jumps or not self._schedule.is_current(planned.plan):
            return False
        self._send(planned.messages)
        self._commit(planned.plan, planned.plan.after, planned.followed)
        self.stamp_ns = planned.stamp_ns
        return True

    def chunk(self, positions: np.ndarray, observed_ns: int, state: np.ndarray) -> Joined:
        """Joins and sends a chunk: :meth:`plan` and :meth:`send`."""
        planned = self.plan(positions, observed_ns, state)
        self.send(planned)
        return planned.plan.joined

    def safe_stop(self) -> bool:
        """Brings the robot to rest. Returns whether it was moving, that is, whether a message was sent."""
        now = self._clock_ns()
        while self._jumps:
            jumped_ns = self._jumps.popleft()
            self._schedule.shift(jumped_ns)
            self._time.shift(jumped_ns, now)
            if self._followed is not None:
                self._followed, self._started_ns = self._followed.shifted(jumped_ns), self._started_ns + jumped_ns
        if self._time.is_paused:
            return self._stay_paused(now)
        plan = self._schedule.plan_safe_stop(self._time.at(now))
        if plan.ahead is None or plan.after is None:
            self._schedule.commit(plan)
            return False
        followed = self._following(plan.after, now)
        self._send(self._messages(followed, plan.after, plan.ahead.resting(round(REST_S * 1e9)), now))
        self._commit(plan, plan.after, followed)
        self.stamp_ns = now
        return True

    def _stay_paused(self, now: int) -> bool:
        """Keeps a paused robot at its position, also after the pause. Returns whether a message was sent.

        A paused robot stands still, so the message needs no time to brake.
        """
        followed, place_ns = self._followed, self._time.at(now)
        if followed is None or place_ns >= followed.end_ns:
            return False
        self._send(self._serialise(self._split(self._resting(followed, now), now, 1.0)))
        self._schedule.reset()
        self._followed = None
        self.stamp_ns = now
        return True

    def _resting(self, followed: Reference, now: int) -> Reference:
        """Returns a reference at rest at the present position, from the past until :data:`REST_S` from now."""
        place_ns = self._time.at(now)
        times = np.array([place_ns - self._past_ns, place_ns + round(REST_S * 1e9)], dtype=np.int64)
        positions = np.repeat(followed.sample(place_ns)[0][None], 2, axis=0)
        return Reference(times, positions, np.zeros_like(positions))

    def _commit(self, plan: Plan, after: ScheduleState, followed: Reference) -> None:
        self._schedule.commit(plan)
        self._followed, self._started_ns = followed, after.started_ns
        self._sent_scaling = self._time.scaling

    def _following(self, after: ScheduleState, now: int) -> Reference:
        """Returns the reference of a state, preceded by the points that a message repeats from the past."""
        new, followed = after.reference, self._followed  # read once: another thread may set it to None
        if followed is None or after.started_ns != self._started_ns:
            return new  # the reference begins at rest at the robot's position
        return followed.since(self._time.at(now) - self._past_ns).then(new)

    def _messages(self, followed: Reference, after: ScheduleState, ahead: Reference, now: int) -> Any:
        scaling = self._time.scaling
        past, begin_ns = followed.before(int(ahead.times_ns[0])), self._time.at(now) - self._past_ns
        sent = ahead if past is None else past.beginning(begin_ns, self._period_ns).then(ahead)
        if int(sent.times_ns[0]) >= after.started_ns:
            return self._serialise(self._split(sent, now, scaling))
        # Shortly after the start, points before started_ns go only to controllers that begin at the measured state.
        others = ahead if past is None else (past.from_time(after.started_ns - 1) or ahead).then(ahead)
        both = zip(self._split(sent, now, scaling), self._split(others, now, scaling), strict=True)
        # A controller with a joint outside its limits also gets that time: else the joint would jump to the limit.
        at_once = self._from_measured - {self._controller_of[joint] for joint in after.outside}
        return self._serialise([one if one.controller in at_once else other for one, other in both])

    def _split(self, reference: Reference, now: int, scaling: float) -> list[Trajectory]:
        """Returns one trajectory per controller, in which the present point has the time ``now`` of the clock."""
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
        # Times from the start must be positive, so the stamp lies before the first point. Its distance from now is
        # usually constant, which is easier to read.
        before_ns = 0
        if after_ns[0] <= 0:
            before_ns = min(-self._past_ns - 2 * self._period_ns, int(after_ns[0]) - self._period_ns)
        times = (after_ns - before_ns) / 1e9
        velocities = reference.velocities * speed
        return split_trajectory(times, reference.positions, self._embodiment, velocities, now + before_ns)
