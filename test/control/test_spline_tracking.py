# SPDX-License-Identifier: Apache-2.0
"""The splines that track chunks: against scipy's B-splines, and their programs against a general solver."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.interpolate import BSpline, CubicHermiteSpline
from scipy.optimize import LinearConstraint, minimize

from clp_ros.control.chunks import Chunk, targets
from clp_ros.control.safety import Limits
from clp_ros.control.spline_tracking import (
    INNER,
    Head,
    Targets,
    basis,
    extended,
    knots,
    penalty,
    positions_at,
    stop,
    track,
)
from clp_ros.core.errors import ClpError

PERIOD = 0.02
RNG = np.random.default_rng(0)


def limits(joints: int = 1, velocity: float = 1.0, acceleration: float = 5.0, reach: float = 1.5) -> Limits:
    ones = np.ones(joints)
    return Limits(tuple("abc"[:joints]), -reach * ones, reach * ones, velocity * ones, acceleration * ones)


def curve(coefficients: np.ndarray) -> BSpline:
    """The same spline by scipy, its first knot at 0."""
    return BSpline((np.arange(len(coefficients) + 4) - 3) * PERIOD, coefficients, 3)


def one(positions: np.ndarray, share: float = 0.3) -> Targets:
    """A single source."""
    return Targets(np.array([share]), np.ones((len(positions), 1)), positions[:, None])


def test_knots_and_basis_are_those_of_scipys_b_splines() -> None:
    coefficients = RNG.standard_normal((20, 3))
    its, at = curve(coefficients), np.arange(18) * PERIOD
    positions, velocities = knots(coefficients, PERIOD)
    np.testing.assert_allclose(positions, its(at), atol=1e-12)
    np.testing.assert_allclose(velocities, its(at, 1), atol=1e-9)
    for share in (0.0, 0.3, 0.99):
        np.testing.assert_allclose(positions_at(coefficients, share, 17), its(at[:-1] + share * PERIOD), atol=1e-12)
    # What a controller makes of the knots is the same curve everywhere.
    dense = np.linspace(0, at[-1], 1001)
    np.testing.assert_allclose(CubicHermiteSpline(at, positions, velocities)(dense), its(dense), atol=1e-12)


@settings(max_examples=6, deadline=None)
@given(
    seed=st.integers(0, 1000),
    noise=st.sampled_from([0.003, 0.03]),
    share=st.floats(0.0, 0.99),
    speed=st.floats(-0.5, 0.5),
)
def test_the_program_is_solved(seed: int, noise: float, share: float, speed: float) -> None:
    """As by scipy's trust-region solver, on the objective and the limits in their own words."""
    rng = np.random.default_rng(seed)
    bound = limits()
    steps = np.arange(1, 13)
    wanted = 0.2 * np.sin(0.5 * steps + seed)[:, None] + noise * rng.standard_normal((12, 1))
    head = np.array([[-speed], [0.0], [speed]]) * PERIOD
    feasible = stop(head, bound, PERIOD)
    found = track(Head.going_on(head), feasible, one(wanted, share), bound, PERIOD, tail=10)

    count = len(found)
    design = BSpline.design_matrix((np.arange(12) + share) * PERIOD, (np.arange(count + 4) - 3) * PERIOD, 3).toarray()
    third, second, first = (np.diff(np.eye(count), n=n, axis=0)[begin:] for n, begin in ((3, 0), (2, 14), (1, 14)))
    weight = penalty(PERIOD) * np.where(np.arange(count - 3) < 12, 1.0, 0.001)
    slow, damp = weight[-1] * 0.6**4, weight[-1] * 2 * 0.6**2  # after the last target

    def objective(c: np.ndarray) -> float:
        off, changes, forces, speeds = design @ c - wanted[:, 0], third @ c, second @ c, first @ c
        ends = slow * (speeds**2).sum() + damp * (forces**2).sum()
        return float((off**2).sum() + (weight * changes**2).sum() + ends)

    def gradient(c: np.ndarray) -> np.ndarray:
        off, changes, forces, speeds = design @ c - wanted[:, 0], third @ c, second @ c, first @ c
        ends = slow * first.T @ speeds + damp * second.T @ forces
        return 2 * (design.T @ off + third.T @ (weight * changes) + ends)

    eye = np.eye(count)
    fixed = LinearConstraint(
        np.concatenate([eye[:3], np.diff(eye[-3:], axis=0)]), [*head[:, 0], 0, 0], [*head[:, 0], 0, 0]
    )
    inside = [
        LinearConstraint(np.diff(eye, n=2, axis=0)[1:] / PERIOD**2, -INNER * 5.0, INNER * 5.0),
        LinearConstraint(np.diff(eye, axis=0)[2:] / PERIOD, -INNER, INNER),
    ]
    reference = minimize(
        objective,
        extended(feasible, count)[:, 0],
        jac=gradient,
        method="SLSQP",
        constraints=[fixed, *inside],
        options={"maxiter": 2000, "ftol": 1e-16},
    )
    assert objective(found[:, 0]) <= reference.fun * (1 + 1e-4) + 1e-10
    np.testing.assert_allclose(found[:3], head, atol=0)
    assert np.abs(np.diff(found, n=2, axis=0)).max() <= 5.0 * PERIOD**2
    assert np.abs(np.diff(found, axis=0)).max() <= 1.0 * PERIOD
    assert (found[-3:] == found[-1]).all()


def test_noise_becomes_less_and_a_smooth_chunk_stays() -> None:
    """The figures of doc/reference/measurements: 1 and 5 mrad of noise, in the middle of a chunk of 50 steps."""
    bound = limits(acceleration=20.0)
    at = (np.arange(50) + 0.3) * PERIOD
    smooth = 0.3 * (1 - np.cos(2 * at))[:, None]
    head = np.zeros((3, 1))
    rests = np.zeros((3, 1))

    def tracked(wanted: np.ndarray) -> np.ndarray:
        return positions_at(track(Head.going_on(head), rests, one(wanted), bound, PERIOD, 25), 0.3, 50)

    right = tracked(smooth)
    assert np.sqrt(np.mean((right - smooth) ** 2)) < 2e-4
    for sigma, least, most in ((0.001, 0.00030, 0.00053), (0.005, 0.0015, 0.0023)):
        rng = np.random.default_rng(1)
        off = [tracked(smooth + sigma * rng.standard_normal((50, 1))) - right for _ in range(30)]
        assert least < np.sqrt(np.mean(np.square(off))) < most


def test_what_goes_on_as_it_was_changes_nothing_at_each_step() -> None:
    """The rest of the best way is the best way of the rest, limits active or not."""
    bound = limits(acceleration=3.0)
    wanted = np.where(np.arange(60) < 25, 0.0, 0.4)[:, None] + 0.01 * RNG.standard_normal((60, 1))
    way = track(Head.going_on(np.zeros((3, 1))), np.zeros((3, 1)), one(wanted), bound, PERIOD, 25)
    assert np.abs(np.diff(way, n=2, axis=0)).max() > INNER * 3.0 * PERIOD**2 - 1e-9  # at the limit somewhere
    rest = way
    for step in range(1, 50):
        rest = rest[1:]
        rest = track(Head.going_on(rest[:3]), rest, one(wanted[step:]), bound, PERIOD, 25)
        np.testing.assert_allclose(rest, way[step:], atol=1e-7)


@settings(max_examples=25, deadline=None)
@given(
    data=st.data(),
    acceleration=st.sampled_from([np.inf, 20.0, 3.0]),
    splices=st.lists(st.integers(1, 30), min_size=1, max_size=5),
)
def test_there_is_always_a_solution_inside_the_limits(
    data: st.DataObject, acceleration: float, splices: list[int]
) -> None:
    """Whatever was tracked before, and wherever it is left; and the shortest stop is one, too."""
    bound = limits(2, acceleration=acceleration, reach=0.5)
    way = np.zeros((3, 2))
    for after in splices:
        seed = data.draw(st.integers(0, 10**6))
        wanted = np.random.default_rng(seed).uniform(-0.5, 0.5, (data.draw(st.integers(1, 40)), 2))
        rest = extended(way[min(after, len(way) - 1) :], 3)
        for its in (
            way := track(Head.going_on(rest[:3]), rest, one(wanted), bound, PERIOD, 25),
            stop(rest[:3], bound, PERIOD),
        ):
            at = np.linspace(0, (len(its) - 3) * PERIOD, 50 * len(its))
            positions, velocities, accelerations = (curve(extended(its, len(its) + 1))(at, nu) for nu in range(3))
            assert np.abs(positions).max() <= 0.5 + 1e-9
            assert np.abs(velocities).max() <= 1.0
            assert np.abs(accelerations).max() <= acceleration
            assert (its[-3:] == its[-1]).all()
            np.testing.assert_array_equal(its[:3], rest[:3])


def test_a_stop_is_as_short_as_the_deceleration_allows() -> None:
    bound = limits(acceleration=5.0)
    speed = 0.8
    braked = stop(np.array([[-1.0], [0.0], [1.0]]) * speed * PERIOD, bound, PERIOD)
    seconds = (len(braked) - 3) * PERIOD
    assert speed / 5.0 <= seconds <= speed / 5.0 + 3 * PERIOD
    assert (np.diff(braked, n=2, axis=0) <= 1e-15).all()  # it only ever brakes


def test_it_comes_to_rest_where_its_last_target_is() -> None:
    """Also after a hard braking at the end, as of a gripper that is commanded to close."""
    bound = limits(acceleration=np.inf, reach=0.8)
    head = np.zeros((3, 1))
    way = track(Head.going_on(head), head, one(np.full((45, 1), 0.8)), bound, PERIOD, 25)[:, 0]
    assert way[47] > 0.77
    assert way[47:].min() > 0.73
    assert np.abs(np.diff(way[60:])).max() < 0.05 * PERIOD
    # And from a motion it goes on little.
    at = np.arange(50) * PERIOD
    way = track(Head.going_on(head), head, one(0.5 * (1 - np.cos(2 * at))[:, None]), bound, PERIOD, 25)[:, 0]
    assert -0.01 < way[-1] - way[52] < 0.05


@pytest.mark.parametrize("wanted", [lambda at: 0.2 * at, lambda at: 0.1 * at**2, lambda at: at - 0.45 * at**2])
def test_from_a_motion_it_comes_to_rest_without_turning_back(wanted: Callable[[np.ndarray], np.ndarray]) -> None:
    """A chunk that ends at a constant speed, speeding up, or slowing down, as a gripper that is still opening."""
    bound = limits(acceleration=20.0, reach=2.0)
    head = np.zeros((3, 1))
    way = track(Head.going_on(head), head, one(wanted(np.arange(50) * PERIOD)[:, None]), bound, PERIOD, 25)
    positions, speeds = (values[:, 0] for values in knots(way, PERIOD))
    assert speeds[48] > 0.05
    assert speeds[48:].min() > -1e-4 * speeds[48]
    assert positions[-1] - wanted(49 * PERIOD) < 0.1 * speeds[48]  # it goes on for little


def test_a_program_without_solution_names_the_joint() -> None:
    bound = limits(2)
    head = np.tile(np.array([[1.4], [1.45], [1.5]]), (1, 2))
    head[:, 0] = 0.0
    with pytest.raises(ClpError, match="no trajectory") as caught:
        track(Head.going_on(head), np.zeros((3, 2)) + head[-1], one(np.zeros((5, 2))), bound, PERIOD, 5)
    assert caught.value.where == "b"


def test_one_cubic_is_one_cubic() -> None:
    """As a controller makes it from where the robot is, until the first point that is sent."""
    bound = limits(acceleration=4.0)
    wanted = np.full((40, 1), 0.5)
    head = Head.one_cubic(np.array([0.1]), np.zeros(1), steps=10, early=2.0)
    way = track(head, np.full((3, 1), 0.1), one(wanted), bound, PERIOD, 25)
    positions, velocities = knots(way, PERIOD)
    ends = CubicHermiteSpline([0.0, 10 * PERIOD], positions[[0, 10], 0], velocities[[0, 10], 0])
    np.testing.assert_allclose(ends(np.arange(11) * PERIOD), positions[:11, 0], atol=1e-9)
    assert abs(positions[0, 0] - 0.1) < 1e-12
    assert abs(velocities[0, 0]) < 1e-12
    for early in (0.0, 1.0, 2.0):
        ends = CubicHermiteSpline([-early * PERIOD, 10 * PERIOD], positions[[0, 10], 0], velocities[[0, 10], 0])
        assert np.abs(ends([-early * PERIOD, 10 * PERIOD], 2)).max() <= 4.0 + 1e-6
    assert positions[10, 0] > 0.12


def test_targets_lie_where_their_steps_are() -> None:
    period = 20_000_000
    chunks = [Chunk(RNG.standard_normal((steps, 2)), observed, period) for steps, observed in ((9, 0), (7, 33_000_000))]
    splice = 60_000_000
    its = targets(chunks, splice, decay=0.5)
    for rank, chunk in enumerate(chunks):
        said = its.weights[:, rank] > 0
        times = splice + (np.flatnonzero(said) + its.shares[rank]) * period
        steps = np.round((times - chunk.observed_ns) / period - 1).astype(int)
        np.testing.assert_allclose(chunk.observed_ns + (steps + 1) * period, times)
        np.testing.assert_array_equal(its.positions[said, rank], chunk.positions[steps])
    np.testing.assert_allclose(its.weights.sum(axis=1), 1.0)
    np.testing.assert_allclose(basis(its.shares).sum(axis=1), 1.0)
