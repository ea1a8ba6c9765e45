# SPDX-License-Identifier: Apache-2.0
"""Tracking of targets by uniform cubic B-splines inside a robot's limits: one small quadratic program a joint.

A spline has a knot each control step ``h``, and two coefficients ``c`` more than knots. At knot ``k`` its position is
``(c[k] + 4 c[k+1] + c[k+2]) / 6``, its velocity ``(c[k+2] - c[k]) / (2 h)``, and its acceleration
``(c[k] - 2 c[k+1] + c[k+2]) / h^2``. Between knots the acceleration is linear, the velocity lies in the hull of
``(c[k+1] - c[k]) / h``, and the position in the hull of ``c`` (de Boor, A Practical Guide to Splines): limits on these
hold at every moment. A joint_trajectory_controller joins knots with positions and velocities by cubics: the same curve.

All lengths here are in rad or m, and all rates per control step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import daqp
import numpy as np
from scipy.linalg.lapack import dpbtrf, dpbtrs, dtbtrs

from clp_ros.control.safety import Limits
from clp_ros.core.errors import ClpError

# Motion of a chunk that is faster than this is taken for noise. Demonstrated motion of arms is below 2 Hz.
_CUT_OFF_HZ = 4.5
# Bounds of the penalty. Below, the program is badly conditioned; above, a chunk is smoothed over all of its length.
_LEAST_PENALTY, _LARGEST_PENALTY = 0.1, 1e4
# After the last target the change of acceleration counts by this share, and the squared velocity so much that it fades
# with about twice this time constant, but not within a few control steps. Else the spline would swing back rather than
# change its acceleration.
_TAIL_SHARE, _SLOWING_S, _FASTEST_SLOWING = 0.001, 0.033, 0.6
# Share of the velocity and acceleration limits that the programs use; what is left is for rounding.
INNER = 1 - 1e-4
# Tolerance of the solver, and of adding a bound that was left out: far below what INNER leaves.
_TOLERANCE = 1e-9
# Coefficients of a spline that determine one of its pieces, and at whose end it rests if they are equal.
ORDER = 3
# Off-diagonals of the program's matrix: three of the penalty's, and two more where a spline begins with one long cubic.
_BANDS = 5


@dataclass(frozen=True)
class Targets:
    """Where a spline is to be, at one moment between each two knots, by one or more sources.

    Attributes:
        shares: (sources,) in [0, 1): when a source's moments are, as a share of the control step after a knot.
        weights: (intervals, sources); 0 where a source has no target.
        positions: (intervals, sources, joints), rad or m.
    """

    shares: np.ndarray
    weights: np.ndarray
    positions: np.ndarray


def basis(shares: np.ndarray) -> np.ndarray:
    """(moments, 4): weights of the four coefficients that determine a position at a share of a control step."""
    s = np.asarray(shares, dtype=np.float64)
    return np.stack([(1 - s) ** 3, 3 * s**3 - 6 * s**2 + 4, -3 * s**3 + 3 * s**2 + 3 * s + 1, s**3], axis=-1) / 6


def positions_at(coefficients: np.ndarray, share: float, count: int) -> np.ndarray:
    """(count, joints): a spline's positions a share of a control step after each of its first knots."""
    return sum(weight * coefficients[k : k + count] for k, weight in enumerate(basis(np.float64(share))))


def penalty(period_s: float) -> float:
    """Weight of the squared change of acceleration a control step, against that of a squared distance to a target.

    With it, a spline follows a long chunk as a low-pass filter without phase shift, of gain 1/2 at the cut-off.
    """
    return float(np.clip((2 * math.pi * _CUT_OFF_HZ * period_s) ** -6, _LEAST_PENALTY, _LARGEST_PENALTY))


def extended(coefficients: np.ndarray, count: int) -> np.ndarray:
    """The coefficients of a spline that rests at its end, repeated up to a number of them."""
    missing = count - len(coefficients)
    return (
        np.concatenate([coefficients, np.repeat(coefficients[-1:], missing, axis=0)]) if missing > 0 else coefficients
    )


def knots(coefficients: np.ndarray, period_s: float) -> tuple[np.ndarray, np.ndarray]:
    """Positions and velocities, each (coefficients - 2, joints), at a spline's knots; per second."""
    left, middle, right = coefficients[:-2], coefficients[1:-1], coefficients[2:]
    return (left + 4 * middle + right) / 6, (right - left) / (2 * period_s)


def stop(head: np.ndarray, limits: Limits, period_s: float) -> np.ndarray:
    """The shortest way to rest, at each joint's own deceleration.

    No way inside the limits goes less far: where one stays inside the position limits, so does this one.

    Args:
        head: (3, joints), the coefficients at the knot where it begins.
        limits: The limits. A joint without an acceleration limit brakes harder where it would leave its range.
        period_s: One control step.

    Returns:
        (coefficients, joints): ``head``, and more, the last three equal.
    """
    most = INNER * limits.braking * period_s**2
    out = list(head)
    while (out[-1] != out[-2]).any() or (out[-2] != out[-3]).any():
        speed = out[-1] - out[-2]
        out.append(np.clip(out[-1] + speed - np.clip(speed, -most, most), limits.lower, limits.upper))
    return np.array(out)


@dataclass(frozen=True)
class Head:
    """How a spline begins.

    Attributes:
        fixed: (coefficients, joints): what the first ones are where :attr:`free` is zero.
        free: (coefficients, unknowns): what each unknown adds to them.
        rows: (rows, unknowns): accelerations that the unknowns cause somewhere else, a control step squared.
        caused: (rows, joints): those that are there anyway.
    """

    fixed: np.ndarray
    free: np.ndarray
    rows: np.ndarray
    caused: np.ndarray

    @classmethod
    def going_on(cls, coefficients: np.ndarray) -> Head:
        """It goes on from a spline's three coefficients, (3, joints), with the same acceleration too."""
        return cls(coefficients, np.zeros((ORDER, 0)), np.zeros((0, 0)), np.zeros((0, coefficients.shape[1])))

    @classmethod
    def one_cubic(
        cls,
        position: np.ndarray,
        speed: np.ndarray,
        steps: int,
        early: float = 0.0,
        beyond: np.ndarray | float = 0.0,
    ) -> Head:
        """It begins with one cubic of some steps, whose unknowns are its acceleration and the change of that.

        Args:
            position: (joints,), where it begins.
            speed: (joints,), a control step.
            steps: Number of control steps.
            early: A controller that begins so many steps earlier with a cubic to the same end, at rest, must not
                accelerate beyond the limits either.
            beyond: (joints,), how far from ``position`` such a controller begins.
        """
        at = np.arange(steps + ORDER)[:, None] - 1.0
        free = np.concatenate([at**2 / 2 - 1 / 6, (at**3 - at) / 6], axis=1)
        if not early:
            return cls(position + at * speed, free, np.zeros((0, 2)), np.zeros((0, len(position))))
        way, end = np.array([steps**2 / 2, steps**3 / 6]), np.array([steps, steps**2 / 2])
        span = steps + early
        rows = np.stack([6 * way / span**2 - 2 * end / span, 4 * end / span - 6 * way / span**2])
        caused = np.outer([-6 / span**2, 6 / span**2], np.broadcast_to(beyond, position.shape))
        return cls(position + at * speed, free, rows, caused)


def track(
    head: Head, feasible: np.ndarray, targets: Targets | None, limits: Limits, period_s: float, tail: int
) -> np.ndarray:
    """The spline that is closest to its targets while its acceleration changes little, inside the limits.

    It minimises the sum of weighted squared distances plus :func:`penalty` times that of squared changes of
    acceleration; after the last target also the sums of squared velocities and accelerations, without targets that of
    squared velocities. It rests at its end.

    Args:
        head: How it begins.
        feasible: (coefficients, joints): a spline that begins so and is inside the limits. The result is at least as
            long, so that there is a solution; where rounding has put it beyond a limit, that much is allowed again.
        targets: From the first knot on; None: none.
        limits: The limits.
        period_s: One control step.
        tail: Least number of control steps from the last target to rest.

    Returns:
        (coefficients, joints), of which the last three are equal.

    Raises:
        ClpError: There is no such spline; it names the joint.
    """
    # From where it begins on, which costs fewer digits: a robot that is to stay where it is does so exactly.
    origin = head.fixed[-1]
    intervals = 0 if targets is None else len(targets.weights)
    count = max(len(feasible), len(head.fixed) + ORDER, ORDER + intervals + tail)
    matrix, wanted = _objective(targets, origin, count, period_s)
    begins = np.zeros((count, len(origin)))
    begins[: len(head.fixed)] = head.fixed - origin
    folded = _folded(_folded(matrix, head).T, head)
    band = np.zeros((_BANDS + 1, len(folded)))
    for off in range(min(_BANDS + 1, len(folded))):
        band[off, : len(folded) - off] = np.diagonal(folded, off)
    factor, info = dpbtrf(band, lower=1)
    if info:
        raise ClpError("the program of a chunk cannot be solved")
    right = _folded((wanted - matrix @ begins).T, head).T
    unknown, _ = dpbtrs(factor, right, lower=1)
    found = begins + _unfolded(unknown, head, count)

    lower, upper = _bounds(limits, origin, period_s, count, len(head.rows))
    # The solution so far, as what is bounded; and what is known to be possible.
    values, possible = (
        np.concatenate([_bounded(one), extra])
        for one, extra in (
            (found, head.caused + head.rows @ unknown[: head.rows.shape[1]]),
            (extended(feasible, count) - origin, head.caused),
        )
    )
    lower, upper = np.minimum(lower, possible), np.maximum(upper, possible)
    beyond = (values < lower - _TOLERANCE) | (values > upper + _TOLERANCE)
    if not beyond.any():
        return _begun(found + origin, head)
    rows = _folded(_rows(count), head)
    rows = np.concatenate([rows, np.pad(head.rows, ((0, 0), (0, rows.shape[1] - head.rows.shape[1])))])
    # In coordinates in which the objective is the distance from the solution so far, it is the same for all joints.
    directions = dtbtrs(factor, np.asfortranarray(rows.T), uplo="L")[0].T
    for joint in np.flatnonzero(beyond.any(axis=0)):
        step = _least(directions, lower[:, joint] - values[:, joint], upper[:, joint] - values[:, joint])
        if step is None:
            raise ClpError("no trajectory leads from where the joint is to the chunk", where=limits.names[joint])
        change = dtbtrs(factor, step[:, None], uplo="L", trans="T")[0]
        found[:, joint] += _unfolded(change, head, count)[:, 0]
    return _begun(found + origin, head)


def _begun(coefficients: np.ndarray, head: Head) -> np.ndarray:
    """With those of a spline that goes on bit for bit as they were."""
    if not head.free.shape[1]:
        coefficients[: len(head.fixed)] = head.fixed
    return coefficients


def _objective(
    targets: Targets | None, origin: np.ndarray, count: int, period_s: float
) -> tuple[np.ndarray, np.ndarray]:
    """Matrix (coefficients, coefficients) and right side (coefficients, joints) of the least squares."""
    if targets is None:
        # Little of the change of acceleration: else the speed would not be unique where it is all zero.
        return _gram(count, 1) + 1e-3 * _gram(count, 3), np.zeros((count, len(origin)))
    change = penalty(period_s)
    matrix, wanted = change * _gram(count, 3), np.zeros((count, len(origin)))
    last = len(targets.weights)
    matrix[last:, last:] -= (1 - _TAIL_SHARE) * change * _gram(count - last, 3)
    last += ORDER - 1
    # The squared acceleration counts so much that the velocity is critically damped: it fades without changing sign.
    rate = min(period_s / _SLOWING_S, _FASTEST_SLOWING)
    slowing = rate**4 * _gram(count - last, 1) + 2 * rate**2 * _gram(count - last, 2)
    matrix[last:, last:] += _TAIL_SHARE * change * slowing
    weights, shares = targets.weights, basis(targets.shares)
    # (intervals, 4, joints): the sources' weighted positions, by the coefficient they act on.
    pulls = (weights[:, None, :] * shares.T) @ (targets.positions - origin)
    at = np.arange(len(weights))
    for one in range(4):
        wanted[one : one + len(weights)] += pulls[:, one]
        for other in range(4):
            matrix[at + one, at + other] += weights @ (shares[:, one] * shares[:, other])
    return matrix, wanted


@lru_cache(maxsize=16)
def _gram(count: int, order: int) -> np.ndarray:
    """(coefficients, coefficients): the sum of squared differences of an order, as a quadratic form."""
    differences = np.diff(np.eye(count), n=order, axis=0)
    return differences.T @ differences


@lru_cache(maxsize=16)
def _rows(count: int) -> np.ndarray:
    """(rows, coefficients): all that is bounded, by the coefficients. See :func:`_bounded`."""
    return _bounded(np.eye(count))


def _bounded(coefficients: np.ndarray) -> np.ndarray:
    """(rows, joints): accelerations, velocities and positions."""
    speeds = np.diff(coefficients, axis=0)
    return np.concatenate([np.diff(speeds, axis=0), speeds, coefficients])


def _bounds(
    limits: Limits, origin: np.ndarray, period_s: float, count: int, more: int
) -> tuple[np.ndarray, np.ndarray]:
    """Least and largest of what :func:`_bounded` returns, and of some more accelerations: each (rows, joints)."""
    numbers = [count - 2, count - 1, count, more]
    force = np.minimum(INNER * limits.acceleration * period_s**2, 1e20)
    speed = INNER * limits.velocity * period_s
    return (
        np.repeat([-force, -speed, limits.lower - origin, -force], numbers, axis=0),
        np.repeat([force, speed, limits.upper - origin, force], numbers, axis=0),
    )


def _folded(matrix: np.ndarray, head: Head) -> np.ndarray:
    """What a matrix with a column a coefficient is for the unknowns."""
    first = len(head.fixed)
    return np.concatenate(
        [matrix[:, :first] @ head.free, matrix[:, first:-ORDER], matrix[:, -ORDER:].sum(axis=1, keepdims=True)], axis=1
    )


def _unfolded(unknown: np.ndarray, head: Head, count: int) -> np.ndarray:
    """(coefficients, joints) of the unknowns, (unknowns, joints)."""
    first, of_head = head.free.shape
    out = np.empty((count, unknown.shape[1]))
    out[:first] = head.free @ unknown[:of_head]
    out[first:-ORDER] = unknown[of_head:-1]
    out[-ORDER:] = unknown[-1]
    return out


def _least(directions: np.ndarray, lower: np.ndarray, upper: np.ndarray) -> np.ndarray | None:
    """The shortest vector whose products with (rows, size) directions are within bounds; None: there is none.

    Few bounds are active: the program has those alone that the solution of the last round violates.
    """
    # The ones that are constant are met, or nothing would be.
    some = np.zeros(len(directions), dtype=bool)
    step = np.zeros(directions.shape[1])
    while True:
        values = directions @ step
        beyond = ((values < lower - _TOLERANCE) | (values > upper + _TOLERANCE)) & ~some
        if not beyond.any():
            return step
        some |= beyond
        rows = np.ascontiguousarray(directions[some])
        step, _, flag, _ = daqp.solve(None, None, rows, upper[some], lower[some], primal_tol=_TOLERANCE)
        if flag != 1:
            return None
