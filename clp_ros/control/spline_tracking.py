# SPDX-License-Identifier: Apache-2.0
"""Tracking of targets by uniform cubic B-splines inside a robot's limits: one small quadratic program per joint.

A spline has a knot at each control step ``h``, and two more coefficients ``c`` than knots. At knot ``k`` its position
is ``(c[k] + 4 c[k+1] + c[k+2]) / 6``, its velocity ``(c[k+2] - c[k]) / (2 h)``, and its acceleration
``(c[k] - 2 c[k+1] + c[k+2]) / h^2``. Between knots, the acceleration is linear, the velocity lies in the convex hull of
``(c[k+1] - c[k]) / h``, and the position in the convex hull of ``c`` (de Boor, A Practical Guide to Splines). So limits
on these quantities hold at every time. A joint_trajectory_controller joins knots with positions and velocities by
cubics, which gives the same curve.

All lengths in this module are in rad or m, and all rates are per control step.
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

# Motion of a chunk above this frequency counts as noise. The demonstrated motion of arms is below 2 Hz.
_CUT_OFF_HZ = 4.5
# Bounds of the penalty. A smaller one makes the program badly conditioned, a larger one smooths the whole chunk.
_LEAST_PENALTY, _LARGEST_PENALTY = 0.1, 1e4
# After the last target, the penalty of the change of acceleration is multiplied by this share, and the squared velocity
# is penalised so that it decays with about twice this time constant. The third number bounds the decay per control
# step. Without both, the spline would swing back rather than change its acceleration.
_TAIL_SHARE, _SLOWING_S, _FASTEST_SLOWING = 0.001, 0.033, 0.6
# Share of the velocity and acceleration limits that the programs use. The remainder is for rounding.
INNER = 1 - 1e-4
# Tolerance of the solver, and of the check which bounds are violated. It is far below the margin of INNER.
_TOLERANCE = 1e-9
# Number of consecutive coefficients that determine a knot. The spline is at rest there if they are equal.
ORDER = 3
# Off-diagonals of the program's matrix: three of the penalty, and two more for a spline that begins with a long cubic.
_BANDS = 5


@dataclass(frozen=True)
class Targets:
    """Target positions of a spline. Each source has one target time in each interval between two knots.

    Attributes:
        shares: (sources,) in [0, 1): target time of each source, as a share of the control step after the knot.
        weights: (intervals, sources): weight of each target; 0 where a source has no target.
        positions: (intervals, sources, joints): target positions, rad or m.
    """

    shares: np.ndarray
    weights: np.ndarray
    positions: np.ndarray


def basis(shares: np.ndarray) -> np.ndarray:
    """Returns the weights of the four coefficients that determine a position between two knots.

    Args:
        shares: (times,) times, as a share of the control step after a knot.

    Returns:
        (times, 4) float64.
    """
    s = np.asarray(shares, dtype=np.float64)
    return np.stack([(1 - s) ** 3, 3 * s**3 - 6 * s**2 + 4, -3 * s**3 + 3 * s**2 + 3 * s + 1, s**3], axis=-1) / 6


def positions_at(coefficients: np.ndarray, share: float, count: int) -> np.ndarray:
    """Returns a spline's positions at a share of a control step after each of its first ``count`` knots.

    Args:
        coefficients: (coefficients, joints).
        share: The time, as a share of the control step after a knot.
        count: Number of knots.

    Returns:
        (count, joints) float64.
    """
    # Added up in this order, so that the result is the same bit for bit as a sum over the four terms.
    first, second, third, fourth = (
        weight * coefficients[k : k + count] for k, weight in enumerate(basis(np.array(share)))
    )
    return first + second + third + fourth


def penalty(period_s: float) -> float:
    """Returns the weight of the squared change of acceleration, relative to that of a squared distance to a target.

    With this weight, a spline follows a long chunk like a low-pass filter without phase shift, with gain 1/2 at the
    cut-off frequency.

    Args:
        period_s: One control step.
    """
    return float(np.clip((2 * math.pi * _CUT_OFF_HZ * period_s) ** -6, _LEAST_PENALTY, _LARGEST_PENALTY))


def extended(coefficients: np.ndarray, count: int) -> np.ndarray:
    """Returns the coefficients of a spline that ends at rest, extended to ``count`` by repeating the last one."""
    missing = count - len(coefficients)
    return (
        np.concatenate([coefficients, np.repeat(coefficients[-1:], missing, axis=0)]) if missing > 0 else coefficients
    )


def knots(coefficients: np.ndarray, period_s: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns positions and velocities (per second) at a spline's knots, each (coefficients - 2, joints)."""
    left, middle, right = coefficients[:-2], coefficients[1:-1], coefficients[2:]
    return (left + 4 * middle + right) / 6, (right - left) / (2 * period_s)


def stop(head: np.ndarray, limits: Limits, period_s: float) -> np.ndarray:
    """Returns the shortest spline to rest, with the deceleration of each joint.

    No spline inside the velocity and acceleration limits stops in a shorter distance. So this one stays inside the
    position limits if any does.

    Args:
        head: (3, joints): coefficients at the knot where the spline begins.
        limits: The limits. A joint without an acceleration limit brakes harder where it would leave its range.
        period_s: One control step.

    Returns:
        (coefficients, joints): ``head`` and the following coefficients. The last three are equal.
    """
    most = INNER * limits.braking * period_s**2
    out = list(head)
    while (out[-1] != out[-2]).any() or (out[-2] != out[-3]).any():
        speed = out[-1] - out[-2]
        out.append(np.clip(out[-1] + speed - np.clip(speed, -most, most), limits.lower, limits.upper))
    return np.array(out)


@dataclass(frozen=True)
class Head:
    """The first coefficients of a spline, which are affine functions of some unknowns.

    Attributes:
        fixed: (coefficients, joints): the coefficients where all unknowns are 0.
        free: (coefficients, unknowns): how the coefficients change with each unknown.
        rows: (rows, unknowns): how some further accelerations change with each unknown. These are bounded too.
        caused: (rows, joints): these accelerations where all unknowns are 0, per control step squared.
    """

    fixed: np.ndarray
    free: np.ndarray
    rows: np.ndarray
    caused: np.ndarray

    @classmethod
    def going_on(cls, coefficients: np.ndarray) -> Head:
        """Returns a beginning without unknowns: three coefficients of another spline, (3, joints)."""
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
        """Returns a beginning that is one cubic. Its unknowns are its acceleration and its change of acceleration.

        A controller may move to the end of this cubic along a cubic of its own, which begins earlier and at rest. The
        acceleration of that cubic is bounded too.

        Args:
            position: (joints,) position at the beginning.
            speed: (joints,) velocity at the beginning, per control step.
            steps: Number of control steps of the cubic.
            early: How many control steps earlier the controller's cubic begins; 0: there is none.
            beyond: (joints,) distance of the controller's beginning from ``position``.
        """
        at = np.arange(steps + ORDER)[:, None] - 1.0
        free = np.concatenate([at**2 / 2 - 1 / 6, (at**3 - at) / 6], axis=1)
        if not early:
            return cls(position + at * speed, free, np.zeros((0, 2)), np.zeros((0, len(position))))
        # Position and velocity at the end, by the unknowns.
        distance, speed_there = np.array([steps**2 / 2, steps**3 / 6]), np.array([steps, steps**2 / 2])
        span = steps + early
        rows = np.stack(
            [6 * distance / span**2 - 2 * speed_there / span, 4 * speed_there / span - 6 * distance / span**2]
        )
        caused = np.outer([-6 / span**2, 6 / span**2], np.broadcast_to(beyond, position.shape))
        return cls(position + at * speed, free, rows, caused)


def track(
    head: Head, feasible: np.ndarray, targets: Targets | None, limits: Limits, period_s: float, tail: int
) -> np.ndarray:
    """Returns the spline inside the limits that is closest to its targets, with small changes of acceleration.

    The objective is the sum of weighted squared distances plus :func:`penalty` times the sum of squared changes of
    acceleration. After the last target, squared velocities and accelerations are added. Without targets, the objective
    is the sum of squared velocities. The spline ends at rest.

    Args:
        head: The spline's beginning.
        feasible: (coefficients, joints): a spline with this beginning inside the limits. The result is at least as
            long, so there is always a solution. Where rounding has put ``feasible`` outside a limit, the result may be
            outside by as much.
        targets: The targets, from the first knot on; None: no targets.
        limits: The limits.
        period_s: One control step.
        tail: Least number of control steps from the last target to rest.

    Returns:
        (coefficients, joints) float64. The last three coefficients are equal.

    Raises:
        ClpError: There is no such spline. The error names the joint.
    """
    # Positions are relative to the beginning, which loses fewer digits: a robot that must not move stays exactly.
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
        raise ClpError("the quadratic program of a chunk cannot be solved")
    right = _folded((wanted - matrix @ begins).T, head).T
    unknown, _ = dpbtrs(factor, right, lower=1)
    found = begins + _unfolded(unknown, head, count)

    lower, upper = _bounds(limits, origin, period_s, count, len(head.rows))
    # The bounded quantities of the unconstrained solution, and those of the feasible spline.
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
    # In these coordinates, the objective is the distance from the unconstrained solution, for all joints alike.
    directions = dtbtrs(factor, np.asfortranarray(rows.T), uplo="L")[0].T
    for joint in np.flatnonzero(beyond.any(axis=0)):
        step = _least(directions, lower[:, joint] - values[:, joint], upper[:, joint] - values[:, joint])
        if step is None:
            raise ClpError("no trajectory leads from where the joint is to the chunk", where=limits.names[joint])
        change = dtbtrs(factor, step[:, None], uplo="L", trans="T")[0]
        found[:, joint] += _unfolded(change, head, count)[:, 0]
    return _begun(found + origin, head)


def _begun(coefficients: np.ndarray, head: Head) -> np.ndarray:
    """Returns the coefficients with a beginning without unknowns restored bit for bit."""
    if not head.free.shape[1]:
        coefficients[: len(head.fixed)] = head.fixed
    return coefficients


def _objective(
    targets: Targets | None, origin: np.ndarray, count: int, period_s: float
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the normal equations of the objective: (coefficients, coefficients) and (coefficients, joints)."""
    if targets is None:
        # A small penalty of the change of acceleration makes the solution unique.
        return _gram(count, 1) + 1e-3 * _gram(count, 3), np.zeros((count, len(origin)))
    change = penalty(period_s)
    matrix, wanted = change * _gram(count, 3), np.zeros((count, len(origin)))
    last = len(targets.weights)
    matrix[last:, last:] -= (1 - _TAIL_SHARE) * change * _gram(count - last, 3)
    last += ORDER - 1
    # With this weight of the squared acceleration, the velocity is critically damped: it decays without changing sign.
    rate = min(period_s / _SLOWING_S, _FASTEST_SLOWING)
    slowing = rate**4 * _gram(count - last, 1) + 2 * rate**2 * _gram(count - last, 2)
    matrix[last:, last:] += _TAIL_SHARE * change * slowing
    weights, shares = targets.weights, basis(targets.shares)
    # (intervals, 4, joints): the weighted target positions, by the coefficient on which they act.
    pulls = (weights[:, None, :] * shares.T) @ (targets.positions - origin)
    at = np.arange(len(weights))
    for one in range(4):
        wanted[one : one + len(weights)] += pulls[:, one]
        for other in range(4):
            matrix[at + one, at + other] += weights @ (shares[:, one] * shares[:, other])
    return matrix, wanted


@lru_cache(maxsize=16)
def _gram(count: int, order: int) -> np.ndarray:
    """Returns the quadratic form of the sum of squared differences of an order: (coefficients, coefficients)."""
    differences = np.diff(np.eye(count), n=order, axis=0)
    return differences.T @ differences


@lru_cache(maxsize=16)
def _rows(count: int) -> np.ndarray:
    """Returns the matrix of :func:`_bounded`: (rows, coefficients)."""
    return _bounded(np.eye(count))


def _bounded(coefficients: np.ndarray) -> np.ndarray:
    """Returns the bounded quantities, (rows, joints): accelerations, velocities and positions."""
    speeds = np.diff(coefficients, axis=0)
    return np.concatenate([np.diff(speeds, axis=0), speeds, coefficients])


def _bounds(
    limits: Limits, origin: np.ndarray, period_s: float, count: int, more: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns lower and upper bounds of :func:`_bounded` and of ``more`` further accelerations, each (rows, joints)."""
    numbers = [count - 2, count - 1, count, more]
    force = np.minimum(INNER * limits.acceleration * period_s**2, 1e20)
    speed = INNER * limits.velocity * period_s
    return (
        np.repeat([-force, -speed, limits.lower - origin, -force], numbers, axis=0),
        np.repeat([force, speed, limits.upper - origin, force], numbers, axis=0),
    )


def _folded(matrix: np.ndarray, head: Head) -> np.ndarray:
    """Returns a matrix with one column per unknown, from a matrix with one column per coefficient."""
    first = len(head.fixed)
    return np.concatenate(
        [matrix[:, :first] @ head.free, matrix[:, first:-ORDER], matrix[:, -ORDER:].sum(axis=1, keepdims=True)], axis=1
    )


def _unfolded(unknown: np.ndarray, head: Head, count: int) -> np.ndarray:
    """Returns the coefficients, (coefficients, joints), of the unknowns, (unknowns, joints)."""
    first, of_head = head.free.shape
    out = np.empty((count, unknown.shape[1]))
    out[:first] = head.free @ unknown[:of_head]
    out[first:-ORDER] = unknown[of_head:-1]
    out[-ORDER:] = unknown[-1]
    return out


def _least(directions: np.ndarray, lower: np.ndarray, upper: np.ndarray) -> np.ndarray | None:
    """Returns the shortest vector whose products with directions are within bounds; None if there is none.

    Only a few bounds are active. So each round solves a program with the bounds that were violated in earlier rounds.

    Args:
        directions: (rows, size).
        lower: (rows,) lower bounds.
        upper: (rows,) upper bounds.
    """
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
