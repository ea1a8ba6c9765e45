# SPDX-License-Identifier: Apache-2.0
"""From action chunks, which come late and overlap, to one reference that is continuous in position and velocity.

A chunk's step ``i`` is for the time ``i + 1`` control steps after its observation was made, so that what has passed by
the time the chunk is there is left out. The new chunk takes over at a knot of the reference that is being followed, the
*seam*: it begins with that knot's position and velocity, and what these are off the chunk's own fades within some
control steps. A chunk that goes on as the last one did changes nothing. After its last step the reference brakes to
rest: if no further chunk comes, the robot stops smoothly.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.interpolate import CubicHermiteSpline

from clp_ros.control.reference import Reference
from clp_ros.control.safety import ROUNDING, Excess, Limits, bounded_velocities, brake, check, excess
from clp_ros.errors import ClpError

Mode = Literal["replace", "ensemble", "rtc"]
# Share of a control step over which a chunk's speed at the seam is taken.
_MOMENT = 1e-3
# Share of its range that a joint may report to be beyond its limits: calibration is never perfect.
_BEYOND = 0.05
# Where nothing is followed yet, controllers are given so long to come from their last command, which is not quite where
# the robot is: one that holds a load droops.
_START_NS = 200_000_000
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
class _Chunk:
    observed_ns: int
    positions: np.ndarray

    def curve(self, steps: np.ndarray, limits: Limits) -> np.ndarray:
        """Positions between the steps, (times, joints): a cubic whose slope at a step is that between its neighbours.

        Not straight lines: their corners would be as sharp however slowly they are followed. It stays in the limits.
        """
        if len(self.positions) == 1:
            return np.repeat(self.positions, len(steps), axis=0)
        knots = np.arange(len(self.positions), dtype=np.int64)
        slopes = bounded_velocities(knots * 10**9, self.positions, _slopes(self.positions), limits)
        return CubicHermiteSpline(knots, self.positions, slopes)(steps)

    def times_ns(self, period_ns: int) -> np.ndarray:
        return self.observed_ns + np.arange(1, len(self.positions) + 1, dtype=np.int64) * period_ns


def _slopes(positions: np.ndarray) -> np.ndarray:
    """By how much positions change a step; of second order at the ends too, where the acceleration would double."""
    return np.gradient(positions, axis=0, edge_order=min(2, len(positions) - 1))


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
        self._chunks: deque[_Chunk] = deque()
        self._braking = False

    @property
    def reference(self) -> Reference | None:
        """What the controllers follow at present, from its first knot on; None before the first chunk."""
        return self._reference

    def reset(self) -> None:
        """Forgets all, as when the clock has jumped or others have moved the robot."""
        self._reference = None
        self._braking = False
        self._chunks.clear()

    def shift(self, offset_ns: int) -> None:
        """Moves all times, as when the clock has jumped by so much."""
        if self._reference is not None:
            old = self._reference
            self._reference = Reference(old.times_ns + offset_ns, old.positions, old.velocities)
        self._braking = False
        self._chunks.clear()

    def add(self, positions: np.ndarray, observed_ns: int, now_ns: int, measured: np.ndarray) -> Joined:
        """Takes a chunk in.

        Args:
            positions: (steps, joints), rad or m; those outside the position limits are moved to them.
            observed_ns: When the observation it was made of was.
            now_ns: The time.
            measured: (joints,), where the robot is.

        Raises:
            Late: Nothing of it lies ahead.
            ClpError: It must not be sent; the reference stays as it is.
        """
        limits = self.limits
        positions = np.asarray(positions, dtype=np.float64)
        if positions.ndim != 2 or not len(positions) or positions.shape[1] != len(limits.names):
            raise ClpError(f"a chunk of shape {positions.shape} for a robot of {len(limits.names)} joints")
        if not np.isfinite(positions).all():
            raise ClpError("the chunk is not finite")
        chunk = _Chunk(observed_ns, np.clip(positions, limits.lower, limits.upper))
        old = self._followed(now_ns, measured)
        is_start = len(old.times_ns) == 1
        seam_ns = self._seam_ns(old, now_ns)
        position, velocity = old.sample(seam_ns)
        chunks = [*self._chunks, chunk] if self.settings.mode == "ensemble" else [chunk]
        chunks = [one for one in chunks if one.times_ns(self._period_ns)[-1] > seam_ns]
        if chunk not in chunks:
            late = (seam_ns - int(chunk.times_ns(self._period_ns)[-1])) / 1e9
            raise Late(f"a chunk came {late:.2f} s after the time its last step was for")
        new, scale, gaps = self._joined(chunks, seam_ns, position, velocity)
        if is_start:
            new = new.without(seam_ns, seam_ns + _START_NS)
        check(new, limits)
        reference = old.since(now_ns).then(new)
        self._reference = reference
        self._chunks = deque(chunks)
        self._braking = False
        skipped = int((chunk.times_ns(self._period_ns) <= seam_ns).sum())
        # The robot's own place is no point to send either: it would be a step from the last command.
        ahead = reference.from_time(seam_ns if is_start else now_ns)
        return Joined(ahead, seam_ns, skipped, scale, *gaps)

    def hold(self, now_ns: int) -> Reference | None:
        """Brakes to rest, as soon as the controllers can be told to.

        Returns:
            What to send; None where the robot brakes or rests already, or was never moved.
        """
        old, braking, self._chunks, self._braking = self._reference, self._braking, deque(), True
        if old is None or braking or now_ns >= old.end_ns:
            return None
        seam_ns = self._seam_ns(old, now_ns)
        if seam_ns >= old.end_ns:
            return old.from_time(now_ns)
        stop = brake(*old.sample(seam_ns), seam_ns, self._period_ns, self.limits)
        self._reference = old.then(stop)
        return self._reference.from_time(now_ns)

    def _followed(self, now_ns: int, measured: np.ndarray) -> Reference:
        """The reference that the arm follows; a fresh one, at rest where the arm is, before the first chunk.

        Raises:
            ClpError: The arm is not where the reference says it is, or outside its limits.
        """
        limits, old = self.limits, self._reference
        measured = np.asarray(measured, dtype=np.float64)
        slack = _BEYOND * (limits.upper - limits.lower)
        outside = ~((measured >= limits.lower - slack) & (measured <= limits.upper + slack))
        if outside.any():
            joint = int(np.argmax(outside))
            raise ClpError(
                f"the robot reports {measured[joint]:.3f}, outside [{limits.lower[joint]:g}, {limits.upper[joint]:g}]",
                where=limits.names[joint],
                fix="bring the joint back, or see whether limits and units are this robot's",
            )
        if old is not None:
            distance = np.abs(old.sample(now_ns)[0] - measured)
            if (distance <= self.settings.start_distance).all():
                return old
            if now_ns < old.end_ns:
                joint = int(np.argmax(distance))
                raise ClpError(
                    f"the arm is {distance[joint]:.3f} from where it was sent, start_distance is "
                    f"{self.settings.start_distance:g}",
                    where=limits.names[joint],
                    fix="see what holds it, or whether its controller runs",
                )
            # It has come to rest, and somebody else has moved it since.
            self.reset()
        resting = np.clip(measured, limits.lower, limits.upper)
        return Reference(np.array([now_ns], dtype=np.int64), resting[None], np.zeros((1, len(resting))))

    def _seam_ns(self, old: Reference, now_ns: int) -> int:
        """The first time on the reference's grid that a message sent now comes in time for."""
        lead = now_ns + round(self.settings.lead_s * 1e9) - int(old.times_ns[0])
        return int(old.times_ns[0]) + max(0, math.ceil(lead / self._period_ns)) * self._period_ns

    def _joined(
        self, chunks: list[_Chunk], seam_ns: int, position: np.ndarray, velocity: np.ndarray
    ) -> tuple[Reference, float, tuple[np.ndarray, np.ndarray]]:
        period = self._period_ns
        # Where the chunk is at the seam, and how fast it goes there.
        around = self._target(chunks, seam_ns, np.array([0.0, _MOMENT]) * period)
        gap, speed = position - around[0], (around[1] - around[0]) / (_MOMENT * period / 1e9)
        last_ns = max(int(one.times_ns(period)[-1]) for one in chunks)
        if (np.abs(gap) > self.settings.start_distance).any():
            joint = int(np.argmax(np.abs(gap)))
            raise ClpError(
                f"the chunk begins {abs(gap[joint]):.3f} from where the arm is, start_distance is "
                f"{self.settings.start_distance:g}",
                where=self.limits.names[joint],
                fix="bring the arm to where the demonstrations begin",
            )
        # The gap is closed as fast as it may be; where that never fits the limits, by way of rest.
        blends = [self.settings.blend_steps]
        while blends[-1] < (last_ns - seam_ns) // period:
            blends.append(2 * blends[-1])
        scale = 1.0
        while True:
            least = Excess(math.inf, "")
            for steps, resting in [*((steps, False) for steps in blends), (blends[0], True)]:
                away = velocity - speed / scale
                reference = self._scaled(
                    chunks, seam_ns, last_ns, (position, velocity), (gap, away), scale, steps, resting
                )
                beyond = excess(reference, self.limits)
                if beyond.factor <= 1 + ROUNDING:
                    return reference, scale, (np.abs(gap), np.abs(away))
                least = min(least, beyond, key=lambda one: one.factor)
            beyond = least
            if self.settings.too_fast == "refuse" or scale >= self.settings.max_scale:
                raise ClpError(
                    f"the chunk is {beyond.factor:.2f} times too fast ({beyond.what})"
                    + (f", slowed down {scale:.1f} times as it is" if scale > 1 else ""),
                    fix="raise the limit, or max_scale, if the robot can do it",
                )
            scale = min(self.settings.max_scale, scale * max(1.05, beyond.factor))

    def _scaled(
        self,
        chunks: list[_Chunk],
        seam_ns: int,
        last_ns: int,
        state: tuple[np.ndarray, np.ndarray],
        gaps: tuple[np.ndarray, np.ndarray],
        scale: float,
        blend_steps: int,
        by_rest: bool,
    ) -> Reference:
        """The reference from the seam on, ``scale`` times slower than the chunks.

        Args:
            chunks: Those that count.
            seam_ns: When it begins.
            last_ns: When the last chunk ends.
            state: Position and velocity at the seam.
            gaps: By how much they are off the chunks' own.
            scale: How many times slower.
            blend_steps: Within how many of the chunks' steps it is on them.
            by_rest: On the way to rest first, else by what the gaps are fading.
        """
        period, limits = self._period_ns, self.limits
        count = max(1, math.floor((last_ns - seam_ns) * scale / period))
        steps = np.arange(count + 1)
        wanted = self._target(chunks, seam_ns, steps * (period / scale))
        position, velocity = state
        share = np.minimum(steps / min(count, math.ceil(blend_steps * scale)), 1.0)[:, None]
        # Quintics with neither slope nor curvature at the end, and no curvature at the seam: from 1 without slope, and
        # from 0 with slope 1.
        fade = 1 - 10 * share**3 + 15 * share**4 - 6 * share**5
        if by_rest:
            # From coming to rest to the chunk: both are inside the limits, so all between them is. Braking gently
            # leaves acceleration for the change from the one to the other.
            resting = brake(position, velocity, seam_ns, period, limits, share=0.5).positions
            positions = fade * resting[np.minimum(steps, len(resting) - 1)] + (1 - fade) * wanted
        else:
            slope = share - 6 * share**3 + 8 * share**4 - 3 * share**5
            seconds = min(count, math.ceil(blend_steps * scale)) * period / 1e9
            positions = wanted + fade * gaps[0] + slope * seconds * gaps[1]
        positions = np.clip(positions, limits.lower, limits.upper)
        positions[0] = position
        velocities = _slopes(positions) / (period / 1e9)
        velocities[0] = velocity
        # What the last knot may have is what braking has room for.
        room = np.stack([limits.lower, limits.upper]) - positions[-1]
        velocities[-1] = np.clip(velocities[-1], *(3 * room / (period / 1e9)))
        times = seam_ns + steps * period
        velocities[1:] = bounded_velocities(times, positions, velocities, limits)[1:]
        stop = brake(positions[-1], velocities[-1], int(times[-1]), period, limits)
        return Reference(times, positions, velocities).then(stop)

    def _target(self, chunks: list[_Chunk], seam_ns: int, after_ns: np.ndarray) -> np.ndarray:
        """Where the chunks want the robot, (times, joints), so many nanoseconds after the seam.

        The weighted mean of those that reach a time. A chunk fades out over its last steps: the mean of a reference
        that is sent ahead must not jump where one ends.
        """
        total, weights = 0.0, 0.0
        longest = max(chunks, key=lambda one: one.times_ns(self._period_ns)[-1])
        for rank, chunk in enumerate(chunks):
            first = int(chunk.times_ns(self._period_ns)[0])
            last = len(chunk.positions) - 1
            at = np.clip((after_ns + (seam_ns - first)) / self._period_ns, 0.0, last)
            values = chunk.curve(at, self.limits)
            left = np.ones(len(at)) if chunk is longest else np.minimum((last - at) / self.settings.blend_steps, 1.0)
            weight = (math.exp(-self.settings.ensemble_decay * rank) * left)[:, None]
            total, weights = total + weight * values, weights + weight
        return total / weights
