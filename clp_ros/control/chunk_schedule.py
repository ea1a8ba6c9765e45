# SPDX-License-Identifier: Apache-2.0
"""From action chunks, which come late and overlap, to one reference that is continuous in position and velocity.

A chunk's step ``i`` is for the time ``i + 1`` control steps after its observation was made, so that what has passed by
the time the chunk is there is left out. The new chunk takes over at a knot of the reference that is being followed, the
*seam*: it begins with that knot's position and velocity, and what these are off the chunk's own fades within some
control steps, the takeover.

The next chunk may come before that is over. What is left of the takeover then goes on as it was, and only what the new
chunk differs from the last one fades anew: a chunk that goes on as the last one did changes nothing, however often it
comes. Were all of the gap to fade anew, a robot that plans at every control step would never close it.

A chunk beyond the limits is followed more slowly. The policy's time passes as slowly then, so that of the next chunk,
and of the others of an ensemble, only the steps are left out that the robot has done.

After its last step the reference brakes to rest: if no further chunk comes, the robot stops smoothly.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from clp_ros.control.chunks import Chunk, PolicyClock, fade, mean, slopes
from clp_ros.control.cubic import cubic
from clp_ros.control.reference import Reference
from clp_ros.control.safety import ROUNDING, Excess, Limits, bounded_velocities, brake, check, check_measured, excess
from clp_ros.errors import ClpError

Mode = Literal["replace", "ensemble", "rtc"]
# Where nothing is followed yet, controllers are given so long to come from their last command, which is not quite where
# the robot is: one that holds a load droops.
_START_NS = 200_000_000
# Share of start_distance by which a chunk may be off the one that is being taken over, however far off that still is;
# and by which a robot that has come to rest may have moved since, or else it begins anew.
_AGREES = 0.1
# So long after it has been told to rest, a robot does.
_SETTLED_NS = 300_000_000
MODES: tuple[Mode, ...] = ("replace", "ensemble", "rtc")


@dataclass(frozen=True)
class ScheduleSettings:
    """How chunks are joined.

    Attributes:
        mode: ``replace``: the newest chunk alone counts. ``ensemble``: the mean of all chunks that reach a time, the
            oldest weighing most (ACT, arXiv 2304.13705, temporal ensembling). ``rtc``: as ``replace``; the policy
            itself makes a chunk that continues the last one (real-time chunking, arXiv 2506.07339).
        blend_steps: Control steps within which a chunk takes over at the seam.
        lead_s: Least time from sending to the seam: how long a message may take to the controller.
        too_fast: A chunk beyond the velocity or acceleration limits is slowed down (``scale``) or refused.
        max_scale: Most that it is slowed down.
        start_distance: How far the arm may be from where the reference says it is, rad or m, when a chunk is taken.
        ensemble_decay: Weight of the i-th oldest chunk is ``exp(-ensemble_decay i)``, i from 0.
    """

    mode: Mode = "replace"
    blend_steps: int = 10
    lead_s: float = 0.02
    too_fast: Literal["scale", "refuse"] = "scale"
    max_scale: float = 5.0
    start_distance: float = 0.3
    ensemble_decay: float = 0.01


class Late(ClpError):  # noqa: N818 - nothing is broken
    """All of a chunk's steps have passed by the time it could be sent."""


@dataclass(frozen=True)
class Joined:
    """What became of a chunk.

    Attributes:
        reference: What the controllers are to follow from now on: knots still ahead of the old one, then the new.
        seam_ns: When the new chunk takes over.
        skipped: Steps of the chunk that had passed by then.
        scale: How many times slower than the policy meant it is; 1 where it was inside the limits.
        position_gap, velocity_gap: (joints,) how far the chunk was from the reference at the seam, before blending.
    """

    reference: Reference
    seam_ns: int
    skipped: int
    scale: float
    position_gap: np.ndarray
    velocity_gap: np.ndarray


@dataclass(frozen=True)
class _Takeover:
    """What the reference is off the chunks, from a time on, until nothing is left of it.

    Attributes:
        since_ns: When its first row is.
        offsets: (control steps, joints): reference less chunks at each, zero after the last.
    """

    since_ns: int
    offsets: np.ndarray

    def rows(self, first: int, count: int) -> np.ndarray:
        """(count, joints): what is left, that many control steps from the ``first`` one after its beginning on."""
        left = self.offsets[first : first + count]
        return np.concatenate([left, np.zeros((count - len(left), self.offsets.shape[1]))])


@dataclass(frozen=True)
class _Seam:
    """Where a chunk takes over: when, on the robot's and the policy's clock, and what is followed there."""

    time_ns: int
    policy_ns: int
    position: np.ndarray
    velocity: np.ndarray
    takeover: _Takeover | None


@dataclass(frozen=True)
class _Way:
    """One way on from a seam: ``reference`` is on ``chunks`` but for ``takeover``, and brakes from ``end_ns`` on."""

    reference: Reference
    chunks: list[Chunk]
    scale: float
    takeover: _Takeover
    end_ns: int
    position_gap: np.ndarray
    velocity_gap: np.ndarray


class ChunkSchedule:
    """The reference of one robot. Not thread-safe.

    Args:
        limits: Of the robot's joints, in the order of its action.
        period_ns: One control step.
        settings: How chunks are joined.
    """

    def __init__(self, limits: Limits, period_ns: int, settings: ScheduleSettings) -> None:
        self.limits = limits
        self.settings = settings
        self._period_ns = period_ns
        self._reference: Reference | None = None
        # Where the robot was when it had come to rest at the end of a reference.
        self._rested: tuple[Reference, np.ndarray] | None = None
        self._chunks: list[Chunk] = []
        self._clock = PolicyClock()
        self._takeover: _Takeover | None = None
        self._started_ns = 0
        self._braking = False

    @property
    def reference(self) -> Reference | None:
        """What the controllers follow at present, from its first knot on; None before the first chunk."""
        return self._reference

    def observe(self, measured: np.ndarray, now_ns: int) -> None:
        """Takes note of where the robot is, (joints,): often, so that it is known where it came to rest.

        That need not be where it was told to: an arm droops, and a gripper closes on what it holds.
        """
        reference = self._reference
        if reference is None or now_ns < reference.end_ns + _SETTLED_NS:
            return
        if self._rested is None or self._rested[0] is not reference:
            self._rested = reference, np.array(measured, dtype=np.float64)

    def reset(self) -> None:
        """Forgets all, as when the clock has jumped or others have moved the robot."""
        self._reference = None
        self._started_ns = 0
        self._forget_chunks(braking=False)

    def shift(self, offset_ns: int) -> None:
        """Moves all times, as when the clock has jumped by so much."""
        if self._reference is not None:
            old = self._reference
            self._reference = Reference(old.times_ns + offset_ns, old.positions, old.velocities)
            self._started_ns += offset_ns
        self._forget_chunks(braking=False)

    def _forget_chunks(self, braking: bool) -> None:
        self._chunks = []
        self._clock.reset()
        self._takeover = None
        self._braking = braking

    def add(self, positions: np.ndarray, observed_ns: int, now_ns: int, measured: np.ndarray) -> Joined:
        """Takes a chunk in.

        Args:
            positions: (steps, joints), rad or m; those outside the position limits are moved to them.
            observed_ns: When the observation it was made of was.
            now_ns: The time.
            measured: (joints,), where the robot is.

        Raises:
            Late: Nothing of it lies ahead.
            ClpError: It must not be sent; the reference stays as it is, unless the robot was moved while it rested.
        """
        limits = self.limits
        positions = np.asarray(positions, dtype=np.float64)
        if positions.ndim != 2 or not len(positions) or positions.shape[1] != len(limits.names):
            raise ClpError(f"a chunk of shape {positions.shape} for a robot of {len(limits.names)} joints")
        if not np.isfinite(positions).all():
            raise ClpError("the chunk is not finite")
        positions = np.clip(positions, limits.lower, limits.upper)
        old = self._followed(now_ns, measured)
        chunk = Chunk(positions, self._clock.at(observed_ns), self._period_ns, limits)
        is_start = len(old.times_ns) == 1
        seam_ns = self._seam_ns(old, now_ns)
        if is_start:
            self._started_ns = seam_ns + _START_NS
        seam = _Seam(seam_ns, self._clock.at(seam_ns), *old.sample(seam_ns), self._takeover)
        if chunk.last_ns <= seam.policy_ns:
            late = (seam.policy_ns - chunk.last_ns) / 1e9
            raise Late(f"a chunk came {late:.2f} s after the time its last step was for")
        chunks = [*self._chunks, chunk] if self.settings.mode == "ensemble" else [chunk]
        way = self._joined([one for one in chunks if one.last_ns > seam.policy_ns], seam)
        check(way.reference, limits)
        self._reference = old.since(now_ns).then(way.reference)
        self._chunks, self._takeover, self._braking = way.chunks, way.takeover, False
        self._clock.slow(seam_ns, way.scale, observed_ns)
        self._clock.slow(way.end_ns, 1.0, observed_ns)
        # Neither the robot's own place nor what follows soon is a point to send: it is a step from the last command.
        ahead = self._reference.from_time(max(now_ns, min(self._started_ns, self._reference.end_ns) - 1))
        return Joined(
            ahead, seam_ns, chunk.skipped(seam.policy_ns), way.scale, np.abs(way.position_gap), np.abs(way.velocity_gap)
        )

    def hold(self, now_ns: int) -> Reference | None:
        """Brakes to rest, as soon as the controllers can be told to.

        Returns:
            What to send; None where the robot brakes or rests already, or was never moved.
        """
        old, braking = self._reference, self._braking
        self._forget_chunks(braking=True)
        if old is None or braking or now_ns >= old.end_ns:
            return None
        seam_ns = self._seam_ns(old, now_ns)
        if seam_ns < old.end_ns:
            self._reference = old.then(brake(*old.sample(seam_ns), seam_ns, self._period_ns, self.limits))
        first_ns = min(self._started_ns, old.end_ns)  # there is no point to send before, see add()
        if self._reference.end_ns < first_ns:
            self._reference = self._reference.resting(first_ns - self._reference.end_ns)
        return self._reference.from_time(max(now_ns, first_ns - 1))

    def policy_ns(self, time_ns: int) -> int:
        """The policy's time at one of the robot's: it passes more slowly while a chunk is followed more slowly."""
        return self._clock.at(time_ns)

    def _followed(self, now_ns: int, measured: np.ndarray) -> Reference:
        """The reference that the arm follows; a fresh one, at rest where the arm is, before the first chunk.

        Raises:
            ClpError: The arm is not where the reference says it is, or outside its limits.
        """
        limits, old = self.limits, self._reference
        measured = np.asarray(measured, dtype=np.float64)
        check_measured(measured, limits)
        if old is not None:
            distance, allowed = np.abs(old.sample(now_ns)[0] - measured), self.settings.start_distance
            rested = self._rested[1] if self._rested and self._rested[0] is old else measured
            was_moved = (np.abs(rested - measured) > _AGREES * allowed).any()
            if (distance <= allowed).all() and not was_moved:
                return old
            if now_ns < old.end_ns:
                joint = int(np.argmax(distance))
                raise ClpError(
                    f"the arm is {distance[joint]:.3f} from where it was sent, start_distance is "
                    f"{self.settings.start_distance:g}",
                    where=limits.names[joint],
                    fix="see what holds it, or whether its controller runs",
                )
            # It has come to rest, and somebody else has moved it since: its controllers may have been given another
            # command, from which they need time.
            self.reset()
        resting = np.clip(measured, limits.lower, limits.upper)
        return Reference(np.array([now_ns], dtype=np.int64), resting[None], np.zeros((1, len(resting))))

    def _seam_ns(self, old: Reference, now_ns: int) -> int:
        """The first time on the reference's grid that a message sent now comes in time for."""
        lead = now_ns + round(self.settings.lead_s * 1e9) - int(old.times_ns[0])
        return int(old.times_ns[0]) + max(0, math.ceil(lead / self._period_ns)) * self._period_ns

    def _joined(self, chunks: list[Chunk], seam: _Seam) -> _Way:
        """The best way from the seam on that is inside the limits."""
        # A chunk that goes on as the one that is being taken over is not refused for what is left to take over.
        distance = self.settings.start_distance
        left = 0.0 if seam.takeover is None else np.abs(seam.takeover.rows(self._row(seam), 1)[0])
        allowed = np.maximum(distance, left + _AGREES * distance)
        scale = 1.0
        while True:
            least = Excess(math.inf, "")
            for way in self._ways(chunks, seam, scale):
                far = np.abs(way.position_gap) > allowed
                if far.any() and len(way.chunks) == len(chunks):
                    joint = int(np.argmax(far))
                    gap = abs(way.position_gap[joint])
                    raise ClpError(
                        f"the chunk begins {gap:.3f} from where the arm is, start_distance is {distance:g}",
                        where=self.limits.names[joint],
                        fix="bring the arm to where the demonstrations begin",
                    )
                beyond = excess(way.reference, self.limits)
                if beyond.factor <= 1 + ROUNDING and not far.any():
                    return way
                least = min(least, beyond, key=lambda one: one.factor)
            if self.settings.too_fast == "refuse" or scale >= self.settings.max_scale:
                raise ClpError(
                    f"the chunk is {least.factor:.2f} times too fast ({least.what})"
                    + (f", slowed down {scale:.1f} times as it is" if scale > 1 else ""),
                    fix="raise the limit, or max_scale, if the robot can do it",
                )
            scale = min(self.settings.max_scale, scale * max(1.05, least.factor))

    def _ways(self, chunks: list[Chunk], seam: _Seam, scale: float) -> Iterator[_Way]:
        """Ways to follow chunks ``scale`` times more slowly, the best first.

        What is left of the last takeover goes on as it was and what is new fades as fast as it may; else all begins
        anew, as fast as it may; else by way of rest. Where a mean of chunks never fits the limits, the newest alone.
        """
        for some in [chunks, chunks[-1:]][: len(chunks)]:
            blends = [self.settings.blend_steps]
            while blends[-1] < (max(one.last_ns for one in some) - seam.policy_ns) // self._period_ns:
                blends.append(2 * blends[-1])
            for left in [seam.takeover, None] if seam.takeover else [None]:
                for steps in blends:
                    yield self._way(some, seam, scale, steps, left)
            yield self._way(some, seam, scale, blends[0], None, by_rest=True)

    def _row(self, seam: _Seam) -> int:
        """Where in the rows of its takeover a seam is."""
        return (seam.time_ns - seam.takeover.since_ns) // self._period_ns

    def _way(
        self,
        chunks: list[Chunk],
        seam: _Seam,
        scale: float,
        blend_steps: int,
        left: _Takeover | None,
        by_rest: bool = False,
    ) -> _Way:
        """The way from the seam on, ``scale`` times slower than the chunks.

        Args:
            chunks: Those that count.
            seam: Where it begins.
            scale: How many times slower.
            blend_steps: Within how many of the chunks' steps it is on them.
            left: The last takeover, which goes on.
            by_rest: On the way to rest first, else by what the gaps are fading.
        """
        period, limits = self._period_ns, self.limits
        second = period / 1e9
        last_ns = max(one.last_ns for one in chunks)
        count = max(1, math.floor((last_ns - seam.policy_ns) * scale / period))
        # From the step before the seam on, which the slope there needs.
        steps = np.arange(-1, count + 1)
        times = seam.policy_ns + np.round(steps * (period / scale)).astype(np.int64)
        wanted = mean(chunks, times, blend_steps, self.settings.ensemble_decay)
        speed = (wanted[2] - wanted[0]) / (2 * second)
        width = min(count, math.ceil(blend_steps * scale))
        share = np.clip(steps / width, 0.0, 1.0)[:, None]
        if by_rest:
            # From coming to rest to the chunk: both are inside the limits, so all between them is. Braking gently
            # leaves acceleration for the change from the one to the other.
            resting = brake(seam.position, seam.velocity, seam.time_ns, period, limits, share=0.5).positions
            offsets = fade(share) * (resting[np.clip(steps, 0, len(resting) - 1)] - wanted)
        else:
            offsets = np.zeros((len(steps), len(seam.position)))
            if left is not None:
                first = self._row(seam) - 1
                offsets = left.rows(first, max(len(steps), len(left.offsets) - first))
            position_gap = seam.position - wanted[1] - offsets[1]
            velocity_gap = seam.velocity - speed - (offsets[2] - offsets[0]) / (2 * second)
            # Quintics with neither slope nor curvature at the end, and no curvature at the seam: from 1 without slope,
            # and from 0 with slope 1.
            slope = share - 6 * share**3 + 8 * share**4 - 3 * share**5
            offsets[: len(steps)] += fade(share) * position_gap + slope * width * second * velocity_gap
        positions = np.clip(wanted[1:] + offsets[1 : len(steps)], limits.lower, limits.upper)
        positions[0] = seam.position
        velocities = slopes(positions) / second
        velocities[0] = seam.velocity
        # What the last knot may have is what braking has room for.
        room = np.stack([limits.lower, limits.upper]) - positions[-1]
        velocities[-1] = np.clip(velocities[-1], *(3 * room / second))
        times = seam.time_ns + steps[1:] * period
        velocities[1:] = bounded_velocities(times, positions, velocities, limits)[1:]
        stop = brake(positions[-1], velocities[-1], int(times[-1]), period, limits)
        reference = Reference(times, positions, velocities).then(stop).without(seam.time_ns, self._started_ns)
        # The first moments are one cubic from the seam on.
        first_s = np.arange(1, min(count, (self._started_ns - seam.time_ns - 1) // period) + 1) * second
        if len(first_s):
            bounded = bounded_velocities(reference.times_ns, reference.positions, reference.velocities, limits)
            reference.velocities[1:] = bounded[1:]
            span_s = float(reference.seconds[1])
            first, _ = cubic(first_s[:, None] / span_s, span_s, reference.positions[:2], reference.velocities[:2])
            offsets[2 : 2 + len(first_s)] = first - wanted[2 : 2 + len(first_s)]
        # The next seam, if it is this one again, needs the slope there.
        offsets[0] = offsets[2] - 2 * second * (seam.velocity - speed)
        takeover = _Takeover(seam.time_ns - period, offsets)
        return _Way(
            reference, chunks, scale, takeover, int(times[-1]), seam.position - wanted[1], seam.velocity - speed
        )
