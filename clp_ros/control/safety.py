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
from clp_ros.core.errors import ClpError
from clp_ros.robots.embodiment import Embodiment

# Braking of a joint without an acceleration limit: from its velocity limit to rest in so many seconds.
BRAKING_S = 0.25
# Least distance, in a joint's own unit, that counts as far from where it was sent or from a chunk.
LEAST_DEVIATION = {"rad": 0.3, "m": 0.03}
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
        units: ``rad``, ``m`` or ``normalised``, as the embodiment has it; empty: all rad.
    """

    names: tuple[str, ...]
    lower: np.ndarray
    upper: np.ndarray
    velocity: np.ndarray
    acceleration: np.ndarray
    tolerance: np.ndarray | None = None
    units: tuple[str, ...] = ()

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
            tuple(joint.unit for joint in joints),
        )

    @property
    def braking(self) -> np.ndarray:
        """Deceleration to come to rest with."""
        return np.where(np.isfinite(self.acceleration), self.acceleration, self.velocity / BRAKING_S)

    def deviation(self, share: float) -> np.ndarray:
        """(joints,): a share of each joint's range, at least :data:`LEAST_DEVIATION`.

        Joints of unit ``normalised`` are grippers. They may be anywhere in their range: policies open and close them in
        one step, and what they hold keeps them from where they are sent.
        """
        span = self.upper - self.lower
        units = self.units or ("rad",) * len(span)
        least = [LEAST_DEVIATION.get(unit, float(way)) for unit, way in zip(units, span, strict=True)]
        return np.maximum(share * span, least)


class OutsideError(ClpError):
    """A joint is outside its limits already."""


Outside = OutsideError
"""Old name of :class:`OutsideError`; it goes with the next release."""


@dataclass(frozen=True)
class Excess:
    """By how much a reference exceeds limits.

    Attributes:
        factor: It would have to be so many times slower; at most 1 where it is inside.
        what: Which limit of which joint that is.
    """

    factor: float
    what: str


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
        OutsideError: A joint is, by more than its tolerance, or not finite; it names the joint.
    """
    slack = 0.05 * (limits.upper - limits.lower) if limits.tolerance is None else limits.tolerance
    outside = ~((measured >= limits.lower - slack) & (measured <= limits.upper + slack))
    if outside.any():
        joint = int(np.argmax(outside))
        raise OutsideError(
            f"the robot reports {measured[joint]:.3f}, outside [{limits.lower[joint]:g}, {limits.upper[joint]:g}] "
            f"by more than {slack[joint]:g}",
            where=limits.names[joint],
            fix="bring the joint back, or see whether limits, units and tolerance are this robot's",
        )
