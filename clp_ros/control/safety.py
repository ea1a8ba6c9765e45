# SPDX-License-Identifier: Apache-2.0
"""What may be sent to a robot: limits, and the way to rest.

A joint_trajectory_controller checks neither positions, nor velocities, nor accelerations, nor that numbers are finite.
Everything that clp_ros sends passes :func:`check`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np

from clp_ros.control.reference import Reference
from clp_ros.errors import ClpError
from clp_ros.robots.embodiment import Embodiment

# Braking of a joint without an acceleration limit: from its velocity limit to rest in so many seconds.
BRAKING_S = 0.25
# Share of a limit that rounding may exceed.
ROUNDING = 1e-6


@dataclass(frozen=True)
class Limits:
    """Joint limits, each (joints,) float64 in rad or m, per second, per second squared.

    Attributes:
        names: Of the joints.
        lower, upper: Position.
        velocity: Largest speed.
        acceleration: Largest acceleration; infinite where none is configured.
        tolerance: How far beyond the position limits a joint may report to be; by default a twentieth of its range.
    """

    names: tuple[str, ...]
    lower: np.ndarray
    upper: np.ndarray
    velocity: np.ndarray
    acceleration: np.ndarray
    tolerance: np.ndarray | None = None

    @classmethod
    def of(cls, embodiment: Embodiment) -> Self:
        """An embodiment's limits, in the order of its action."""
        joints = embodiment.joints
        accelerations = [joint.acceleration for joint in joints]
        return cls(
            tuple(joint.name for joint in joints),
            np.array([joint.lower for joint in joints]),
            np.array([joint.upper for joint in joints]),
            np.array([joint.velocity for joint in joints]),
            np.array([np.inf if limit is None else limit for limit in accelerations]),
            np.array([joint.measured_tolerance for joint in joints]),
        )

    @property
    def braking(self) -> np.ndarray:
        """Deceleration to come to rest with."""
        return np.where(np.isfinite(self.acceleration), self.acceleration, self.velocity / BRAKING_S)


class Outside(ClpError):  # noqa: N818 - a state of affairs
    """A joint is outside its limits already."""


@dataclass(frozen=True)
class Excess:
    """By how much a reference exceeds limits.

    Attributes:
        factor: It would have to be so many times slower; at most 1 where it is inside.
        what: Which limit of which joint that is.
    """

    factor: float
    what: str


def bounded_velocities(
    times_ns: np.ndarray, positions: np.ndarray, velocities: np.ndarray, limits: Limits
) -> np.ndarray:
    """Knot velocities, reduced where a cubic through them would leave the position limits between knots.

    A cubic stays inside the hull of its Bezier control points, which for knots ``p0, p1`` a time ``h`` apart are
    ``p0, p0 + v0 h/3, p1 - v1 h/3, p1``: those are kept inside the limits.

    Args:
        times_ns: (knots,) int64.
        positions: (knots, joints), inside the limits.
        velocities: (knots, joints).
        limits: The limits.
    """
    thirds = (times_ns[1:] - times_ns[:-1])[:, None] / 3e9
    up, down = limits.upper - positions, limits.lower - positions
    bounded = velocities.copy()
    bounded[:-1] = np.minimum(np.maximum(bounded[:-1], down[:-1] / thirds), up[:-1] / thirds)
    bounded[1:] = np.minimum(np.maximum(bounded[1:], -up[1:] / thirds), -down[1:] / thirds)
    return bounded


def excess(reference: Reference, limits: Limits) -> Excess:
    """How far the fastest segment is beyond the velocity and acceleration limits."""
    spans = reference.spans_s
    if not len(spans):
        return Excess(0.0, "")
    start, end = reference.velocities[:-1], reference.velocities[1:]
    slope = (reference.positions[1:] - reference.positions[:-1]) / spans
    # In a segment, acceleration is linear in time and velocity quadratic: the largest are at the ends or the vertex.
    first, last = (6 * slope - 4 * start - 2 * end) / spans, (2 * start + 4 * end - 6 * slope) / spans
    change = last - first
    with np.errstate(divide="ignore", invalid="ignore"):
        vertex = np.where((first * last < 0), start - first**2 * spans / (2 * change), start)
    speed = np.maximum(np.maximum(np.abs(start), np.abs(end)), np.abs(vertex)) / limits.velocity
    force = np.sqrt(np.maximum(np.abs(first), np.abs(last)) / limits.acceleration)
    factors = np.array([speed.max(axis=0), force.max(axis=0)])
    kind, joint = np.unravel_index(int(factors.argmax()), factors.shape)
    return Excess(float(factors.max()), f"{('velocity', 'acceleration')[kind]} of {limits.names[joint]}")


def check(reference: Reference, limits: Limits) -> None:
    """Refuses a reference that must not be sent.

    Raises:
        ClpError: It is not finite, does not end at rest, or is outside a joint's limits; it names the joint.
    """
    for what in (reference.positions, reference.velocities):
        if what.shape[1] != len(limits.names):
            raise ClpError(f"a trajectory of {what.shape[1]} joints for a robot of {len(limits.names)}")
        if not np.isfinite(what).all():
            joint = limits.names[int(np.argwhere(~np.isfinite(what))[0][1])]
            raise ClpError("the trajectory is not finite", where=joint)
    thirds = reference.spans_s / 3
    controls = [
        reference.positions,
        reference.positions[:-1] + reference.velocities[:-1] * thirds,
        reference.positions[1:] - reference.velocities[1:] * thirds,
    ]
    slack = ROUNDING * (limits.upper - limits.lower)
    for points in controls:
        outside = (points < limits.lower - slack) | (points > limits.upper + slack)
        if outside.any():
            joint = int(np.argwhere(outside)[0][1])
            raise ClpError(
                f"the trajectory leaves [{limits.lower[joint]:g}, {limits.upper[joint]:g}]", where=limits.names[joint]
            )
    if np.any(reference.velocities[-1]):
        joint = int(np.argmax(np.abs(reference.velocities[-1])))
        raise ClpError("the trajectory does not end at rest", where=limits.names[joint])
    beyond = excess(reference, limits)
    if beyond.factor > 1 + ROUNDING:
        raise ClpError(f"the trajectory is {beyond.factor:.2f} times too fast ({beyond.what})")


def check_measured(measured: np.ndarray, limits: Limits) -> None:
    """Refuses to drive a robot that reports to be outside its limits.

    Args:
        measured: (joints,), where the robot is.
        limits: The limits.

    Raises:
        Outside: A joint is, by more than its tolerance, or not finite; it names the joint.
    """
    slack = 0.05 * (limits.upper - limits.lower) if limits.tolerance is None else limits.tolerance
    outside = ~((measured >= limits.lower - slack) & (measured <= limits.upper + slack))
    if outside.any():
        joint = int(np.argmax(outside))
        raise Outside(
            f"the robot reports {measured[joint]:.3f}, outside [{limits.lower[joint]:g}, {limits.upper[joint]:g}] "
            f"by more than {slack[joint]:g}",
            where=limits.names[joint],
            fix="bring the joint back, or see whether limits, units and tolerance are this robot's",
        )


def brake(
    position: np.ndarray, velocity: np.ndarray, time_ns: int, period_ns: int, limits: Limits, share: float = 1.0
) -> Reference:
    """The way to rest from a state, at each joint's own deceleration, or harder where it would leave its limits.

    Args:
        position: (joints,), inside the limits.
        velocity: (joints,).
        time_ns: When.
        period_ns: Time between knots.
        limits: The limits.
        share: Share of the deceleration.

    Returns:
        A reference that begins in that state and ends at rest, at the earliest one period later.
    """
    period = period_ns / 1e9
    room = np.where(velocity > 0, limits.upper - position, position - limits.lower)
    speed = np.abs(velocity)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        # Whole periods: a cubic over a part of one would brake harder than the limit.
        wanted = np.ceil(speed / (share * limits.braking) / period - ROUNDING) * period
        duration = np.where(speed > 0, np.minimum(wanted, 2 * room / speed), 0.0)
    count = max(1, int(np.ceil(duration.max() / period - ROUNDING)))
    seconds = np.arange(count + 1)[:, None] * period
    with np.errstate(divide="ignore", invalid="ignore"):
        done = np.where(duration > 0, np.minimum(seconds / duration, 1.0), 1.0)
    positions = position + velocity * duration * (done - done**2 / 2)
    velocities = velocity * (1 - done)
    velocities[0] = velocity
    velocities[-1] = 0.0
    times = time_ns + np.arange(count + 1, dtype=np.int64) * period_ns
    positions = np.clip(positions, limits.lower, limits.upper)
    velocities[1:] = bounded_velocities(times, positions, velocities, limits)[1:]
    return Reference(times, positions, velocities)
