# SPDX-License-Identifier: Apache-2.0
"""A robot's limits, and the checks of what is sent to it.

A joint_trajectory_controller does not check positions, velocities or accelerations, nor whether numbers are finite.
So every trajectory that clp_ros sends passes :func:`check`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np

from clp_ros.control.reference import Reference
from clp_ros.core.errors import ClpError
from clp_ros.core.renamed import renamed
from clp_ros.robots.embodiment import Embodiment

# A joint without an acceleration limit brakes from its velocity limit to rest in this time, in seconds.
BRAKING_S = 0.25
# Lower bound of the allowed deviation, by the joint's unit.
LEAST_DEVIATION = {"rad": 0.3, "m": 0.03}
# Share by which rounding may exceed a limit.
ROUNDING = 1e-6


@dataclass(frozen=True)
class Limits:
    """The limits of a robot's joints. All arrays are (joints,) float64.

    Attributes:
        names: Names of the joints.
        lower: Lowest position, rad or m.
        upper: Highest position, rad or m.
        velocity: Largest velocity, per second.
        acceleration: Largest acceleration, per second squared; infinite where none is configured.
        tolerance: How far outside the position limits a measured position may be, rad or m; None: a twentieth of the
            range.
        units: Unit of each joint in the embodiment: ``rad``, ``m`` or ``normalised``. Empty: all ``rad``.
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
        """Returns the limits of an embodiment, in the order of its action."""
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
        """Deceleration of a safe stop: (joints,) float64, per second squared."""
        return np.where(np.isfinite(self.acceleration), self.acceleration, self.velocity / BRAKING_S)

    def deviation(self, share: float) -> np.ndarray:
        """Returns the allowed deviation: a share of each joint's range, at least :data:`LEAST_DEVIATION`.

        Joints of unit ``normalised`` are grippers, and may be anywhere in their range. The reason is that policies open
        and close them in one step, and that an object stops them before they reach the commanded position.

        Args:
            share: Share of the range.

        Returns:
            (joints,) float64, rad or m.
        """
        span = self.upper - self.lower
        units = self.units or ("rad",) * len(span)
        least = [LEAST_DEVIATION.get(unit, float(whole)) for unit, whole in zip(units, span, strict=True)]
        return np.maximum(share * span, least)


class OutsideError(ClpError):
    """A joint reports a position outside its limits."""


@dataclass(frozen=True)
class Excess:
    """How much a reference exceeds the velocity and acceleration limits.

    Attributes:
        factor: The factor by which the reference would have to be slowed down; at most 1 inside the limits.
        what: The limit and the joint with the largest factor.
    """

    factor: float
    what: str


def excess(reference: Reference, limits: Limits) -> Excess:
    """Returns how much the fastest segment of a reference exceeds the velocity and acceleration limits."""
    spans = reference.spans_s
    if not len(spans):
        return Excess(0.0, "")
    start, end = reference.velocities[:-1], reference.velocities[1:]
    slope = (reference.positions[1:] - reference.positions[:-1]) / spans
    # In a segment, the acceleration is linear in time and the velocity is quadratic. So the largest acceleration is at
    # an end, and the largest velocity is at an end or at the vertex.
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
    """Checks that a reference may be sent.

    Args:
        reference: The reference.
        limits: The limits.

    Raises:
        ClpError: The reference is not finite, does not end at rest, or exceeds a limit. The error names the joint.
    """
    for what in (reference.positions, reference.velocities):
        if what.shape[1] != len(limits.names):
            raise ClpError(f"the trajectory has {what.shape[1]} joints, but the robot has {len(limits.names)}")
        if not np.isfinite(what).all():
            name = limits.names[int(np.argwhere(~np.isfinite(what))[0][1])]
            raise ClpError("the trajectory is not finite", where=name)
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
    """Checks that a robot's measured positions are inside its limits.

    Args:
        measured: (joints,) measured positions, rad or m.
        limits: The limits.

    Raises:
        OutsideError: A position is not finite, or outside the limits by more than the tolerance. The error names the
            joint.
    """
    slack = 0.05 * (limits.upper - limits.lower) if limits.tolerance is None else limits.tolerance
    outside = ~((measured >= limits.lower - slack) & (measured <= limits.upper + slack))
    if outside.any():
        joint = int(np.argmax(outside))
        raise OutsideError(
            f"the robot reports {measured[joint]:.3f}, outside [{limits.lower[joint]:g}, {limits.upper[joint]:g}] "
            f"by more than {slack[joint]:g}",
            where=limits.names[joint],
            hint="bring the joint back, or check the embodiment's limits, units and tolerance",
        )


__getattr__ = renamed(__name__, {"Outside": "control.safety:OutsideError"})
