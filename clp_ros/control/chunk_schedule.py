# SPDX-License-Identifier: Apache-2.0
"""Joins action chunks, which arrive late and overlap, to one reference inside a robot's limits.

Step ``i`` of a chunk is for the time ``i + 1`` control steps after the chunk's observation. Steps that have passed when
the chunk arrives are left out. The new reference begins at the *splice*, a knot of the old reference, with the same
position, velocity and acceleration. From there it tracks the chunk, or the mean of several chunks, as closely as the
limits allow (:mod:`clp_ros.control.spline_tracking`). The remainder of the old reference is always a feasible solution.
The chunk is never slowed down.

After the last step of the chunk, the reference comes to rest. So the robot stops smoothly if no further chunk arrives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from clp_ros.control.chunks import Chunk, targets
from clp_ros.control.reference import Reference
from clp_ros.control.safety import Limits, check, check_measured
from clp_ros.control.schedule_state import ChunkPlan, Joined, Plan, ScheduleState, Spline
from clp_ros.control.spline_tracking import ORDER, Head, knots, positions_at, stop, track
from clp_ros.control.start_and_end import check_return, first_head, tail_steps
from clp_ros.core.errors import ClpError
from clp_ros.core.renamed import renamed

Mode = Literal["replace", "ensemble", "rtc"]
MODES: tuple[Mode, ...] = ("replace", "ensemble", "rtc")
# A distance outside the limits up to this, in rad or m, is rounding.
_EDGE = 1e-6
# A robot at rest that has moved by more than this share of the allowed deviation was moved by somebody else.
_MOVED = 0.1
# The robot is at rest this long after the end of the reference.
_SETTLED_NS = 300_000_000
# The limits may delay the robot by this time, at the velocity limit, before it counts as too far from the chunk.
_LAG_S = 0.75
_BRING = "bring the arm to where the demonstrations begin"
_HELD = "see what holds it, or whether its controller runs"
_TOO_FAST = "raise the velocity and acceleration limits, if the robot can do it"


@dataclass(frozen=True)
class ScheduleSettings:
    """How chunks are joined.

    Attributes:
        mode: ``replace``: only the newest chunk counts. ``ensemble``: the mean of all chunks that reach a time, with
            the largest weight on the oldest (temporal ensembling, ACT, arXiv 2304.13705). ``rtc``: as ``replace``, but
            the policy continues its last chunk (real-time chunking, arXiv 2506.07339).
        send_lead_time_s: Least time from sending to the splice, in seconds: how long a message may take to reach the
            controllers.
        max_deviation: Largest distance of the arm from the reference, and of a chunk's beginning from the arm, as a
            share of each joint's range (see :meth:`Limits.deviation`). The later steps of a chunk may be farther from
            the reference, by the distance at the velocity limit in 0.75 s, because the limits may delay the robot.
        start_distance: The same distance in rad or m for all joints; None: use ``max_deviation``. Deprecated.
        ensemble_decay: The i-th oldest chunk has the weight ``exp(-ensemble_decay i)``, with i from 0.
    """

    mode: Mode = "replace"
    send_lead_time_s: float = 0.02
    max_deviation: float = 0.05
    start_distance: float | None = None
    ensemble_decay: float = 0.01


class LateError(ClpError):
    """All steps of a chunk have passed when it could be sent."""


class ChunkSchedule:
    """The reference of one robot, made of chunks.

    :meth:`plan` and :meth:`plan_safe_stop` change nothing, and any thread may call them. :meth:`commit` applies a plan
    if nothing has changed since. All other methods must not be called by several threads at once.

    Args:
        limits: Limits of the robot's joints, in the order of its action.
        period_ns: One control step, in nanoseconds.
        settings: How chunks are joined.
    """

    def __init__(self, limits: Limits, period_ns: int, settings: ScheduleSettings) -> None:
        self.limits = limits
        self.settings = settings
        self._period_ns = period_ns
        if settings.start_distance is None:
            self._allowed = limits.deviation(settings.max_deviation)
        else:
            self._allowed = np.full(len(limits.names), settings.start_distance)
        self._state: ScheduleState | None = None
        # Counts the changes of the state: a plan for another version is not applied.
        self._version = 0
        # The last reference that the robot followed to its end, and the measured position there.
        self._rested: tuple[Reference, np.ndarray] | None = None

    @property
    def reference(self) -> Reference | None:
        """The reference that the controllers follow; None before the first chunk."""
        return None if self._state is None else self._state.reference

    def observe(self, measured: np.ndarray, now_ns: int) -> None:
        """Records where the robot came to rest, which may differ from the end of the reference.

        An arm droops, and a gripper closes on an object. Call this method with every measurement.

        Args:
            measured: (joints,) measured positions, rad or m.
            now_ns: Time of the measurement.
        """
        reference = self.reference
        if reference is None or now_ns < reference.end_ns + _SETTLED_NS:
            return
        if self._rested is None or self._rested[0] is not reference:
            self._rested = reference, np.array(measured, dtype=np.float64)

    def reset(self) -> None:
        """Forgets the reference and all chunks, as after others have moved the robot."""
        self._replace(None)

    def shift(self, offset_ns: int) -> None:
        """Moves all times by an offset, as after a jump of the clock."""
        if self._state is not None:
            self._replace(self._state.shifted(offset_ns))

    def add(self, positions: np.ndarray, observed_ns: int, now_ns: int, measured: np.ndarray) -> Joined:
        """Adds a chunk: :meth:`plan` and :meth:`commit`.

        Args:
            positions: (steps, joints), rad or m. Positions outside the limits are clipped.
            observed_ns: Time of the chunk's observation.
            now_ns: The time.
            measured: (joints,) measured positions, rad or m.

        Raises:
            LateError: All steps of the chunk have passed.
            ClpError: The chunk must not be sent.
        """
        plan = self.plan(positions, observed_ns, now_ns, measured)
        self.commit(plan)
        return plan.joined

    def safe_stop(self, now_ns: int) -> Reference | None:
        """Brings the robot to rest, beginning as soon as a message can reach the controllers.

        Args:
            now_ns: The time.

        Returns:
            The points to send. None if the robot is at rest, is already stopping, or was never moved.
        """
        plan = self.plan_safe_stop(now_ns)
        self.commit(plan)
        return plan.ahead

    hold = safe_stop  # the method's name before 0.2

    def commit(self, plan: Plan) -> bool:
        """Applies a plan.

        Returns:
            Whether the plan was applied. It is not if the schedule has changed since the plan was made.
        """
        if not self.is_current(plan):
            return False
        self._replace(plan.after)
        return True

    def is_current(self, plan: Plan) -> bool:
        """Returns whether the schedule is unchanged since the plan was made."""
        return self._version == plan.version

    def _replace(self, state: ScheduleState | None) -> None:
        # In this order: plan() reads the version first, so a plan never carries a newer version than its state.
        self._state = state
        self._version += 1

    def plan(self, positions: np.ndarray, observed_ns: int, now_ns: int, measured: np.ndarray) -> ChunkPlan:
        """Returns the plan that adds a chunk. See :meth:`add` for the arguments.

        Raises:
            LateError: All steps of the chunk have passed.
            ClpError: The chunk has a wrong shape or is not finite; the arm is not where the reference is; the chunk
                begins too far from the arm; the limits leave the reference too far behind the chunk; or the robot
                reports a position outside its limits.
        """
        version, before = self._version, self._state
        chunk = self._checked(positions, observed_ns)
        measured = np.asarray(measured, dtype=np.float64)
        old = self._followed(before, now_ns, measured)
        # The splice waits until the controllers have moved from their last command, along one cubic, to the reference.
        earliest = now_ns + round(self.settings.send_lead_time_s * 1e9)
        knot = old.spline.knot_after(max(earliest, old.started_ns))
        splice_ns = old.spline.start_ns + knot * self._period_ns
        if chunk.last_ns <= splice_ns:
            late = (splice_ns - chunk.last_ns) / 1e9
            what = f"a chunk came {late:.2f} s after the time its last step was for"
            raise LateError(what, where="policy", hint="use a faster policy, or one with longer chunks")
        begins, feasible = old.reference.sample(splice_ns), old.spline.rest(knot)
        wanted, speed = chunk.at(splice_ns)
        gap = np.abs(wanted - begins[0])
        # The chunk may begin where the arm was when it was observed, or continue the last chunk. The distance by which
        # the limits have delayed the arm since then is no fault of the chunk.
        first = (chunk.at(time)[0] - old.reference.sample(time)[0] for time in (observed_ns, chunk.first_ns))
        gaps = [gap, *map(np.abs, first)]
        gaps += [np.abs(wanted - one.at(splice_ns)[0]) for one in old.chunks[-1:] if one.last_ns >= splice_ns]
        self._check_distance(np.min(gaps, axis=0), "the chunk begins {} from where the arm is", _BRING)
        head, started_ns = Head.going_on(feasible[:ORDER]), old.started_ns
        if old.started_ns == 0:
            lead_s = self.settings.send_lead_time_s
            head, steps = first_head(begins[0], measured, self.limits, self._period_ns, lead_s)
            started_ns = splice_ns + steps * self._period_ns
            check_return(measured - begins[0], started_ns, chunk, self.limits)
        older = [one for one in old.chunks if one.last_ns > splice_ns] if self.settings.mode == "ensemble" else []
        coefficients, deviation, chunks = self._tracked([*older, chunk], head, feasible, splice_ns)
        spline = Spline(splice_ns, self._period_ns, coefficients)
        new = spline.reference(chunk.last_ns)
        check(new, self.limits)
        # The knots since the observation are kept: the next chunk's observation is later.
        reference = old.reference.since(min(now_ns, observed_ns)).then(new)
        after = ScheduleState(reference, spline, tuple(chunks), started_ns, outside=old.outside)
        ahead = after.ahead(now_ns)
        skipped = chunk.skipped(splice_ns)
        joined = Joined(ahead, splice_ns, skipped, gap, np.abs(speed - begins[1]), deviation)
        return ChunkPlan(version, after, ahead, joined)

    def plan_safe_stop(self, now_ns: int) -> Plan:
        """Returns the plan of :meth:`safe_stop`."""
        version, old = self._version, self._state
        if old is None:
            return Plan(version, None, None)
        resting = replace(old, chunks=(), is_stopping=True)
        if old.is_stopping or now_ns >= old.reference.end_ns:
            return Plan(version, resting, None)
        period_s = self._period_ns / 1e9
        knot = old.spline.knot_after(now_ns + round(self.settings.send_lead_time_s * 1e9))
        splice_ns = old.spline.start_ns + knot * self._period_ns
        feasible = old.spline.rest(knot)
        steps = (old.started_ns - splice_ns) // self._period_ns
        before = feasible[:0]
        if steps > 0:
            # The controllers follow one cubic until the first point that is sent.
            position, speed = (one[0] for one in knots(feasible[:ORDER], 1.0))
            try:
                slowed = track(Head.one_cubic(position, speed, steps), feasible, None, self.limits, period_s, 0)
            except ClpError:
                slowed = feasible  # The robot brakes only after the first point: a safe stop must not fail.
            before, feasible = slowed[:steps], slowed[steps:]
        braked = np.concatenate([before, stop(feasible[:ORDER], self.limits, period_s)])
        spline = Spline(splice_ns, self._period_ns, braked)
        after = replace(resting, reference=old.reference.since(now_ns).then(spline.reference(now_ns)), spline=spline)
        check(after.reference, self.limits)
        return Plan(version, after, after.ahead(now_ns))

    def _checked(self, positions: np.ndarray, observed_ns: int) -> Chunk:
        """Returns the chunk, clipped to the position limits.

        Raises:
            ClpError: The chunk has a wrong shape or is not finite.
        """
        limits = self.limits
        positions = np.asarray(positions, dtype=np.float64)
        if positions.ndim != 2 or not len(positions) or positions.shape[1] != len(limits.names):
            wanted = f"(steps, {len(limits.names)})"
            raise ClpError(
                f"its shape is {positions.shape}, not {wanted}", where="chunk", hint=f"give {wanted} positions"
            )
        if not np.isfinite(positions).all():
            raise ClpError("it is not finite", where="chunk", hint="check the policy's weights")
        return Chunk(np.clip(positions, limits.lower, limits.upper), observed_ns, self._period_ns)

    def _followed(self, old: ScheduleState | None, now_ns: int, measured: np.ndarray) -> ScheduleState:
        """Returns the state whose reference the arm follows; before the first chunk, one at rest at the arm's position.

        Raises:
            ClpError: The arm is not where the reference is, or outside its limits.
        """
        limits = self.limits
        check_measured(measured, limits)
        if old is not None:
            distance = np.abs(old.reference.sample(now_ns)[0] - measured)
            at_rest = self._rested  # read once: another thread may replace it
            rested = at_rest[1] if at_rest and at_rest[0] is old.reference else measured
            was_moved = (np.abs(rested - measured) > _MOVED * self._allowed).any()
            if (distance <= self._allowed).all() and not was_moved:
                return old
            if now_ns < old.reference.end_ns:
                self._check_distance(distance, "the arm is {} from where it was sent", _HELD)
            # The robot had come to rest and was moved by somebody else. Its controllers may have another last command,
            # so the schedule begins anew, with time for the controllers to move from that command.
        resting = np.clip(measured, limits.lower, limits.upper)[None]
        reference = Reference(np.array([now_ns], dtype=np.int64), resting, np.zeros_like(resting))
        outside = tuple(np.flatnonzero(np.abs(resting[0] - measured) > _EDGE).tolist())
        spline = Spline(now_ns, self._period_ns, np.repeat(resting, ORDER, axis=0))
        return ScheduleState(reference, spline, outside=outside)

    def _check_distance(self, distance: np.ndarray, words: str, hint: str, lag_s: float = 0.0) -> None:
        """Checks a distance against the allowed deviation.

        Args:
            distance: (joints,), rad or m.
            words: The error's text, with ``{}`` for the distance.
            hint: What the user can do.
            lag_s: The distance at the velocity limit in this time is allowed in addition, in seconds.

        Raises:
            ClpError: A joint's distance is larger than allowed.
        """
        allowed = self._allowed + lag_s * self.limits.velocity
        if (distance <= allowed).all():
            return
        joint = int(np.argmax(distance / allowed))
        raise ClpError(
            f"{words.format(f'{distance[joint]:.3f}')}, max_deviation allows {allowed[joint]:.3g}",
            where=self.limits.names[joint],
            hint=hint,
        )

    def _tracked(
        self, chunks: Sequence[Chunk], head: Head, feasible: np.ndarray, splice_ns: int
    ) -> tuple[np.ndarray, np.ndarray, Sequence[Chunk]]:
        """Returns the spline that tracks the mean of chunks.

        If that spline is too far from the newest chunk, only the newest chunk is tracked.

        Returns:
            The coefficients, (coefficients, joints); the largest distance from the newest chunk, (joints,); and the
            chunks that are tracked.

        Raises:
            ClpError: The spline is too far from the newest chunk, also when only that is tracked.
        """
        wanted = targets(chunks, splice_ns, self.settings.ensemble_decay)
        period_s = self._period_ns / 1e9
        tail = tail_steps(chunks[-1], self.limits, period_s)
        coefficients = track(head, feasible, wanted, self.limits, period_s, tail)
        is_wanted = wanted.weights[:, -1] > 0
        followed = positions_at(coefficients, wanted.shares[-1], len(is_wanted))
        deviation = np.abs(followed - wanted.positions[:, -1])[is_wanted].max(axis=0, initial=0.0)
        try:
            self._check_distance(deviation, "inside its limits the arm is left {} behind the chunk", _TOO_FAST, _LAG_S)
        except ClpError:
            if len(chunks) == 1:
                raise
            return self._tracked(chunks[-1:], head, feasible, splice_ns)
        return coefficients, deviation, chunks


__getattr__ = renamed(__name__, {"Late": "control.chunk_schedule:LateError"})
