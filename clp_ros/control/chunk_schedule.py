# SPDX-License-Identifier: Apache-2.0
"""From action chunks, which come late and overlap, to one reference inside a robot's limits.

A chunk's step ``i`` is for the time ``i + 1`` control steps after its observation was made. Steps that have passed by
the time the chunk is there are left out. At the *splice*, a knot of the reference that is being followed, a new
reference goes on with the same position, velocity and acceleration. It tracks the chunk, or the mean of several, as
closely as the limits allow (:mod:`clp_ros.control.spline_tracking`). The rest of the old reference is one way to go on,
so that there is always a solution. Nothing is slowed down.

After its last step the reference comes to rest: if no further chunk comes, the robot stops smoothly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from clp_ros.control.chunks import Chunk, targets
from clp_ros.control.reference import Reference
from clp_ros.control.safety import Limits, check, check_measured
from clp_ros.control.spline_tracking import ORDER, Head, extended, knots, positions_at, stop, track
from clp_ros.core.errors import ClpError

Mode = Literal["replace", "ensemble", "rtc"]
MODES: tuple[Mode, ...] = ("replace", "ensemble", "rtc")
# Where nothing is followed yet, controllers are given so long to come from their last command, which is not quite where
# the robot is: one that holds a load droops.
_START_NS = 200_000_000
# A robot that is outside its limits comes back with at most this share of its velocity and acceleration limits: what
# the chunk wants comes on top.
_RETURN_SHARE = 0.5
# Rad or m outside the limits that are rounding.
_EDGE = 1e-6
# Share of the allowed deviation by which a robot that has come to rest may have moved since, or else it begins anew.
_MOVED = 0.1
# So long after it has been told to rest, a robot does.
_SETTLED_NS = 300_000_000
# The limits may delay the robot by so long, at its largest velocity, before it counts as far from the chunk.
_LAG_S = 0.75
# A chunk's end is followed by at least so long a way to rest.
_TAIL_S = 0.5
# And by no longer one: what brakes so slowly is led no faster than it can stop by then. A program's time and memory
# grow with it.
_LONGEST_TAIL_S = 5.0
# Last steps of a chunk that say how fast it ends.
_END_STEPS = 5
_BRING = "bring the arm to where the demonstrations begin"
_HELD = "see what holds it, or whether its controller runs"
_TOO_FAST = "raise the velocity and acceleration limits, if the robot can do it"


@dataclass(frozen=True)
class ScheduleSettings:
    """How chunks are joined.

    Attributes:
        mode: ``replace``: the newest chunk alone counts. ``ensemble``: the mean of all chunks that reach a time, the
            oldest weighing most (ACT, arXiv 2304.13705, temporal ensembling). ``rtc``: as ``replace``; the policy
            itself makes a chunk that continues the last one (real-time chunking, arXiv 2506.07339).
        send_lead_time_s: Least time from sending to the splice: how long a message may take to the controller.
        max_deviation: How far the arm may be from where the reference says it is, and a chunk may begin from there: a
            share of each joint's range, see :meth:`Limits.deviation`. From the rest of the chunk the reference may be
            as far, and farther by what the joint can go in 0.75 s: the limits may delay the robot so long.
        start_distance: The same in rad or m, for all joints alike; None: as a share. Goes in the next release.
        ensemble_decay: Weight of the i-th oldest chunk is ``exp(-ensemble_decay i)``, i from 0.
    """

    mode: Mode = "replace"
    send_lead_time_s: float = 0.02
    max_deviation: float = 0.05
    start_distance: float | None = None
    ensemble_decay: float = 0.01


class LateError(ClpError):
    """All of a chunk's steps have passed by the time it could be sent."""


Late = LateError
"""Old name of :class:`LateError`; it goes with the next release."""


@dataclass(frozen=True)
class Joined:
    """What became of a chunk.

    Attributes:
        reference: What the controllers are to follow from now on: knots still ahead of the old one, then the new.
        splice_ns: When the new chunk takes over.
        skipped: Steps of the chunk that had passed by then.
        position_gap, velocity_gap: (joints,) how far the chunk was from the reference at the splice.
        deviation: (joints,) how far the new reference is from the chunk at most.
    """

    reference: Reference
    splice_ns: int
    skipped: int
    position_gap: np.ndarray
    velocity_gap: np.ndarray
    deviation: np.ndarray


@dataclass(frozen=True)
class Spline:
    """What is followed from the last splice on; at rest at its end.

    Attributes:
        start_ns: When its first knot is.
        period_ns: From each knot to the next.
        coefficients: (knots + 2, joints).
    """

    start_ns: int
    period_ns: int
    coefficients: np.ndarray

    def knot_after(self, time_ns: int) -> int:
        """The first knot that is not before a time."""
        return max(0, -((self.start_ns - time_ns) // self.period_ns))

    def rest(self, knot: int) -> np.ndarray:
        """The coefficients from a knot on, at least three."""
        return extended(self.coefficients[min(knot, len(self.coefficients) - 1) :], ORDER)

    def reference(self, until_ns: int) -> Reference:
        """Its knots up to a time, and on until it rests."""
        changing = np.flatnonzero((np.diff(self.coefficients, axis=0) != 0).any(axis=1))
        count = max(int(changing[-1]) + 2 if len(changing) else 1, self.knot_after(until_ns) + 1)
        positions, velocities = knots(self.coefficients[: count + 2], self.period_ns / 1e9)
        times = self.start_ns + np.arange(len(positions), dtype=np.int64) * self.period_ns
        return Reference(times, positions, velocities)


@dataclass(frozen=True)
class _State:
    """All that the schedule knows. Never changed, only replaced.

    Attributes:
        reference: What is followed; None before the first chunk.
        spline: The same from the last splice on.
        chunks: Those that count.
        started_ns: Before this time no point is sent.
        braking: Whether it leads to rest because of :meth:`ChunkSchedule.safe_stop`.
        outside: Indices of the joints that were outside their limits when the reference began, at the limit.
    """

    reference: Reference | None = None
    spline: Spline | None = None
    chunks: tuple[Chunk, ...] = ()
    started_ns: int = 0
    braking: bool = False
    outside: tuple[int, ...] = ()

    def ahead(self, now_ns: int) -> Reference:
        """What is to be sent.

        Neither the robot's own place nor what follows soon is a point to send: it is a step from the last command.
        """
        first_ns = max(now_ns + 1, self.started_ns)
        reference = self.reference
        if reference.end_ns < first_ns:
            reference = reference.resting(first_ns - reference.end_ns)
        return reference.from_time(first_ns - 1)


@dataclass(frozen=True)
class Plan:
    """A change of the schedule that has been computed, but not been made.

    Attributes:
        before, after: The schedule's state.
        joined: What became of the chunk; None for a hold.
        ahead: What to send; None where there is nothing to send.
    """

    before: _State
    after: _State
    joined: Joined | None
    ahead: Reference | None


class ChunkSchedule:
    """The reference of one robot.

    :meth:`plan` and :meth:`plan_safe_stop` change nothing, and any thread may call them. :meth:`commit` applies a plan
    if nothing has changed since. All other methods must not be called by several threads at once.

    Args:
        limits: Of the robot's joints, in the order of its action.
        period_ns: One control step.
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
        self._state = _State()
        # Where the robot was when it had come to rest at the end of a reference.
        self._rested: tuple[Reference, np.ndarray] | None = None

    @property
    def reference(self) -> Reference | None:
        """What the controllers follow at present, from its first knot on; None before the first chunk."""
        return self._state.reference

    def observe(self, measured: np.ndarray, now_ns: int) -> None:
        """Takes note of where the robot is, (joints,): often, so that it is known where it came to rest.

        That need not be where it was told to: an arm droops, and a gripper closes on what it holds.
        """
        reference = self._state.reference
        if reference is None or now_ns < reference.end_ns + _SETTLED_NS:
            return
        if self._rested is None or self._rested[0] is not reference:
            self._rested = reference, np.array(measured, dtype=np.float64)

    def reset(self) -> None:
        """Forgets all, as when the clock has jumped or others have moved the robot."""
        self._state = _State()

    def shift(self, offset_ns: int) -> None:
        """Moves all times, as when the clock has jumped by so much."""
        old = self._state
        if old.reference is not None:
            times, positions, velocities = (
                getattr(old.reference, name) for name in ("times_ns", "positions", "velocities")
            )
            self._state = _State(
                Reference(times + offset_ns, positions, velocities),
                replace(old.spline, start_ns=old.spline.start_ns + offset_ns),
                started_ns=old.started_ns + offset_ns,
                outside=old.outside,
            )

    def add(self, positions: np.ndarray, observed_ns: int, now_ns: int, measured: np.ndarray) -> Joined:
        """Takes a chunk in: :meth:`plan` and :meth:`commit` in one."""
        plan = self.plan(positions, observed_ns, now_ns, measured)
        self.commit(plan)
        return plan.joined

    def safe_stop(self, now_ns: int) -> Reference | None:
        """Brakes to rest, as soon as the controllers can be told to.

        Returns:
            What to send; None where the robot brakes or rests already, or was never moved.
        """
        plan = self.plan_safe_stop(now_ns)
        self.commit(plan)
        return plan.ahead

    hold = safe_stop  # the method's name before 0.2

    def commit(self, plan: Plan) -> bool:
        """Makes a change; returns whether it did: not if there was another since it was planned."""
        if self._state is not plan.before:
            return False
        self._state = plan.after
        return True

    def is_current(self, plan: Plan) -> bool:
        """Whether nothing has changed since a plan was made."""
        return self._state is plan.before

    def plan(self, positions: np.ndarray, observed_ns: int, now_ns: int, measured: np.ndarray) -> Plan:
        """What taking a chunk in would change.

        Args:
            positions: (steps, joints), rad or m; those outside the position limits are moved to them.
            observed_ns: When the observation it was made of was.
            now_ns: The time.
            measured: (joints,), where the robot is.

        Raises:
            LateError: Nothing of it lies ahead.
            ClpError: It must not be sent.
        """
        limits, before = self.limits, self._state
        positions = np.asarray(positions, dtype=np.float64)
        if positions.ndim != 2 or not len(positions) or positions.shape[1] != len(limits.names):
            raise ClpError(f"a chunk of shape {positions.shape} for a robot of {len(limits.names)} joints")
        if not np.isfinite(positions).all():
            raise ClpError("the chunk is not finite")
        chunk = Chunk(np.clip(positions, limits.lower, limits.upper), observed_ns, self._period_ns)
        measured = np.asarray(measured, dtype=np.float64)
        old = self._followed(before, now_ns, measured)
        # While the controllers come from their last command, on one cubic, they are left to.
        earliest = now_ns + round(self.settings.send_lead_time_s * 1e9)
        knot = old.spline.knot_after(max(earliest, old.started_ns))
        splice_ns = old.spline.start_ns + knot * self._period_ns
        if chunk.last_ns <= splice_ns:
            late = (splice_ns - chunk.last_ns) / 1e9
            raise LateError(f"a chunk came {late:.2f} s after the time its last step was for")
        begins, feasible = old.reference.sample(splice_ns), old.spline.rest(knot)
        wanted, speed = chunk.at(splice_ns)
        gap = np.abs(wanted - begins[0])
        # It begins where the arm was when it was observed, or goes on as the last one did. How far the limits have kept
        # the arm from it since then is not its fault.
        first = (chunk.at(time)[0] - old.reference.sample(time)[0] for time in (observed_ns, chunk.first_ns))
        gaps = [gap, *map(np.abs, first)]
        gaps += [np.abs(wanted - one.at(splice_ns)[0]) for one in old.chunks[-1:] if one.last_ns >= splice_ns]
        self._check_distance(np.min(gaps, axis=0), "the chunk begins {} from where the arm is", _BRING)
        head, started_ns = Head.going_on(feasible[:ORDER]), old.started_ns
        if old.started_ns == 0:
            beyond = measured - begins[0]
            steps = self._start_steps(beyond)
            early = 1 + self.settings.send_lead_time_s * 1e9 / self._period_ns
            head = Head.one_cubic(begins[0], np.zeros_like(begins[0]), steps, early, beyond)
            started_ns = splice_ns + steps * self._period_ns
            if beyond.any() and started_ns > chunk.last_ns:
                joint = int(np.argmax(np.abs(beyond) / limits.velocity))
                raise ClpError(
                    f"it is {abs(beyond[joint]):.3f} outside its limits, and a chunk is too short to come back slowly",
                    where=limits.names[joint],
                    fix="bring the joint back",
                )
        older = [one for one in old.chunks if one.last_ns > splice_ns] if self.settings.mode == "ensemble" else []
        coefficients, deviation, chunks = self._tracked([*older, chunk], head, feasible, splice_ns)
        spline = Spline(splice_ns, self._period_ns, coefficients)
        new = spline.reference(chunk.last_ns)
        check(new, limits)
        # Since its observation, for the next one's is later.
        after = _State(
            old.reference.since(min(now_ns, observed_ns)).then(new),
            spline,
            tuple(chunks),
            started_ns,
            outside=old.outside,
        )
        ahead = after.ahead(now_ns)
        joined = Joined(
            ahead,
            splice_ns,
            chunk.skipped(splice_ns),
            gap,
            np.abs(speed - begins[1]),
            deviation,
        )
        return Plan(before, after, joined, ahead)

    def plan_safe_stop(self, now_ns: int) -> Plan:
        """What :meth:`safe_stop` would change."""
        old = self._state
        resting = replace(old, chunks=(), braking=True)
        if old.reference is None or old.braking or now_ns >= old.reference.end_ns:
            return Plan(old, resting, None, None)
        period_s = self._period_ns / 1e9
        knot = old.spline.knot_after(now_ns + round(self.settings.send_lead_time_s * 1e9))
        splice_ns = old.spline.start_ns + knot * self._period_ns
        feasible = old.spline.rest(knot)
        steps = (old.started_ns - splice_ns) // self._period_ns
        before = feasible[:0]
        if steps > 0:
            # The first point to send is still to come: until then the controllers follow one cubic.
            position, speed = (one[0] for one in knots(feasible[:ORDER], 1.0))
            try:
                slowed = track(Head.one_cubic(position, speed, steps), feasible, None, self.limits, period_s, 0)
            except ClpError:
                slowed = feasible  # it goes on until then, and brakes: a brake must not fail
            before, feasible = slowed[:steps], slowed[steps:]
        braked = np.concatenate([before, stop(feasible[:ORDER], self.limits, period_s)])
        spline = Spline(splice_ns, self._period_ns, braked)
        after = replace(resting, reference=old.reference.since(now_ns).then(spline.reference(now_ns)), spline=spline)
        check(after.reference, self.limits)
        return Plan(old, after, None, after.ahead(now_ns))

    def _followed(self, old: _State, now_ns: int, measured: np.ndarray) -> _State:
        """The state whose reference the arm follows; one at rest where the arm is, before the first chunk.

        Raises:
            ClpError: The arm is not where the reference says it is, or outside its limits.
        """
        limits = self.limits
        check_measured(measured, limits)
        if old.reference is not None:
            distance = np.abs(old.reference.sample(now_ns)[0] - measured)
            at_rest = self._rested  # another thread may replace it
            rested = at_rest[1] if at_rest and at_rest[0] is old.reference else measured
            was_moved = (np.abs(rested - measured) > _MOVED * self._allowed).any()
            if (distance <= self._allowed).all() and not was_moved:
                return old
            if now_ns < old.reference.end_ns:
                self._check_distance(
                    distance,
                    "the arm is {} from where it was sent",
                    _HELD,
                )
            # It has come to rest, and somebody else has moved it since: its controllers may have been given another
            # command, from which they need time.
        resting = np.clip(measured, limits.lower, limits.upper)[None]
        reference = Reference(np.array([now_ns], dtype=np.int64), resting, np.zeros_like(resting))
        outside = tuple(np.flatnonzero(np.abs(resting[0] - measured) > _EDGE).tolist())
        return _State(reference, Spline(now_ns, self._period_ns, np.repeat(resting, ORDER, axis=0)), outside=outside)

    def _start_steps(self, beyond: np.ndarray) -> int:
        """Control steps of the controllers' first cubic, for a robot that is (joints,) outside its limits.

        From rest to rest, a cubic's largest velocity is 1.5 times its mean, and its acceleration 6 times its way a
        squared time.
        """
        way, limits = np.abs(beyond), self.limits
        fast = 1.5 * way / (_RETURN_SHARE * limits.velocity)
        forceful = np.sqrt(6 * way / (_RETURN_SHARE * limits.acceleration))
        return math.ceil(max(_START_NS, 1e9 * float(max(fast.max(), forceful.max()))) / self._period_ns)

    def _check_distance(self, distance: np.ndarray, words: str, fix: str, lag_s: float = 0.0) -> None:
        """Refuses what is farther than allowed.

        Args:
            distance: (joints,).
            words: What is, with ``{}`` for how far.
            fix: What to do about it.
            lag_s: The way at the velocity limits in so many seconds is allowed too.
        """
        allowed = self._allowed + lag_s * self.limits.velocity
        if (distance <= allowed).all():
            return
        joint = int(np.argmax(distance / allowed))
        raise ClpError(
            f"{words.format(f'{distance[joint]:.3f}')}, max_deviation allows {allowed[joint]:.3g}",
            where=self.limits.names[joint],
            fix=fix,
        )

    def _tracked(
        self, chunks: Sequence[Chunk], head: Head, feasible: np.ndarray, splice_ns: int
    ) -> tuple[np.ndarray, np.ndarray, Sequence[Chunk]]:
        """Coefficients, the deviation from the newest chunk, (joints,), and the chunks that count.

        Where the mean of chunks leads too far from the newest one, that one counts alone.
        """
        wanted = targets(chunks, splice_ns, self.settings.ensemble_decay)
        period_s = self._period_ns / 1e9
        coefficients = track(head, feasible, wanted, self.limits, period_s, self._tail(chunks[-1]))
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

    def _tail(self, chunk: Chunk) -> int:
        """Control steps from the end of a chunk until the robot rests."""
        last = chunk.positions[-_END_STEPS:]
        period_s = self._period_ns / 1e9
        speed = np.abs(last[-1] - last[0]) / (max(1, len(last) - 1) * period_s)
        braking_s = float((np.minimum(speed, self.limits.velocity) / self.limits.braking).max())
        return math.ceil(min(max(_TAIL_S, 1.5 * braking_s), _LONGEST_TAIL_S) / period_s) + ORDER
