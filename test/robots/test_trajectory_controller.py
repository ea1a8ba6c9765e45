# SPDX-License-Identifier: Apache-2.0
"""The simulated controller against the rules of the real one (Jazzy, read in its source and tried)."""

import numpy as np
import pytest
from scipy.interpolate import BPoly, CubicHermiteSpline

from clp_ros.robots.trajectory_controller import Command, Point, RejectedError, TrajectoryController

JOINTS = ("a", "b")
NOW = 1_000 * 10**9
MS = 10**6


def controller(**options: bool) -> TrajectoryController:
    return TrajectoryController(JOINTS, [0.0, 0.0], **options)


def command(*points: Point, names: tuple[str, ...] = JOINTS, stamp_ns: int = 0) -> Command:
    return Command(names, points, stamp_ns)


def sampled(one: TrajectoryController, times_ns: np.ndarray) -> np.ndarray:
    return np.array([one.sample(int(time)) for time in times_ns])


GOOD = Point(100 * MS, [1.0, 2.0])


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (command(Point(100 * MS, [1.0]), names=("a",)), "names 1 joints"),
        (command(Point(100 * MS, [1.0] * 3), names=("a", "b", "a")), "names 3 joints"),
        (command(GOOD, names=("a", "c")), "no joint 'c'"),
        (command(GOOD, names=()), "names no joints"),
        (command(), "no points"),
        (command(Point(100 * MS, [])), "0 positions"),
        (command(Point(100 * MS, [1.0])), "1 positions"),
        (command(Point(100 * MS, [1.0, 2.0], [0.0])), "1 velocities"),
        (command(Point(100 * MS, [1.0, 2.0], [0.0, 0.0], [0.0] * 3)), "3 accelerations"),
        (command(GOOD, Point(100 * MS, [1.0, 2.0])), "not after"),
        (command(GOOD, Point(50 * MS, [1.0, 2.0])), "not after"),
        (command(Point(100 * MS, [1.0, 2.0], [0.0, 0.1])), "end at rest"),
        (command(GOOD, stamp_ns=NOW - 101 * MS), "ended"),
        (command(Point(100 * MS, [1.0, 2.0], effort=[0.0, 0.0])), "effort"),
    ],
)
def test_what_it_drops_changes_nothing(bad: Command, why: str) -> None:
    one = controller()
    one.receive(command(Point(200 * MS, [0.4, 0.4])), NOW)
    one.sample(NOW)
    with pytest.raises(RejectedError, match=why):
        one.receive(bad, NOW)
    np.testing.assert_allclose(one.sample(NOW + 100 * MS), 0.2)


def test_partial_goals_and_moving_ends_where_they_are_allowed() -> None:
    one = controller(allow_partial_joints_goal=True, allow_nonzero_velocity_at_trajectory_end=True)
    one.receive(command(Point(100 * MS, [1.0], [0.5]), names=("b",)), NOW)
    one.sample(NOW)
    np.testing.assert_array_equal(one.sample(NOW + 100 * MS), [0.0, 1.0])


def test_names_in_another_order_are_sorted_and_duplicates_send_the_missing_joint_to_zero() -> None:
    one = TrajectoryController(JOINTS, [0.5, 0.5])
    one.receive(command(Point(100 * MS, [2.0, 1.0]), names=("b", "a")), NOW)
    one.sample(NOW)
    np.testing.assert_array_equal(one.sample(NOW + 100 * MS), [1.0, 2.0])
    one.receive(command(Point(100 * MS, [3.0, 4.0]), names=("a", "a")), NOW + 100 * MS)
    one.sample(NOW + 100 * MS)
    np.testing.assert_array_equal(one.sample(NOW + 300 * MS), [4.0, 0.0])


def test_a_joint_whose_command_is_no_number_stays_and_the_rest_move() -> None:
    one = controller()
    one.receive(command(Point(100 * MS, [np.nan, 1.0])), NOW)
    one.sample(NOW)
    np.testing.assert_array_equal(one.sample(NOW + 200 * MS), [0.0, 1.0])
    one.receive(command(Point(0, [np.inf, 9.0])), NOW + 200 * MS)  # nor are limits its business
    np.testing.assert_array_equal(one.sample(NOW + 202 * MS), [np.inf, 9.0])


def test_a_first_point_at_no_time_is_a_step() -> None:
    one = controller()
    one.receive(command(Point(0, [3.0, 3.0])), NOW)
    np.testing.assert_array_equal(one.sample(NOW), 3.0)


def test_what_is_past_of_a_stamped_trajectory_is_skipped() -> None:
    one = controller()
    points = [Point(step * 100 * MS, [step, -step]) for step in range(1, 11)]
    one.receive(command(*points, stamp_ns=NOW - 450 * MS), NOW)
    np.testing.assert_allclose(one.sample(NOW), [4.5, -4.5])
    np.testing.assert_array_equal(one.sample(NOW + 10**9), [10, -10])


def test_the_newest_replaces_at_once_from_the_last_command_even_with_a_future_stamp() -> None:
    one = controller()
    one.receive(command(Point(1000 * MS, [1.0, 1.0])), NOW)
    sampled(one, NOW + np.arange(501) * MS)
    one.receive(command(Point(100 * MS, [0.0, 0.0]), stamp_ns=NOW + 900 * MS), NOW + 500 * MS)
    np.testing.assert_allclose(one.sample(NOW + 750 * MS), 0.25)  # on the line from 0.5 at 500 ms to 0 at 1000 ms
    one.receive(command(Point(100 * MS, [2.0, 2.0])), NOW + 750 * MS)
    one.receive(command(Point(100 * MS, [1.25, 1.25])), NOW + 750 * MS)
    one.sample(NOW + 750 * MS)
    np.testing.assert_allclose(one.sample(NOW + 800 * MS), 0.75)


def test_without_a_desired_state_it_begins_from_where_the_joints_are() -> None:
    one = controller(interpolate_from_desired_state=False)
    one.receive(command(Point(100 * MS, [1.0, 1.0])), NOW)
    with pytest.raises(ValueError, match="measured"):
        one.sample(NOW)
    one.sample(NOW, [0.5, -1.0])
    np.testing.assert_allclose(one.sample(NOW + 50 * MS, [9.0, 9.0]), [0.75, 0.0], atol=1e-12)


@pytest.mark.parametrize("derivatives", [0, 1, 2])
def test_interpolation_is_scipys(derivatives: int) -> None:
    rng = np.random.default_rng(derivatives)
    times = np.cumsum(rng.integers(20, 200, 6))
    knots = rng.normal(size=(7, 3, 2))  # the first is the state before: at rest at 0
    knots[0] = 0
    knots[-1, 1:] = 0
    points = [Point(int(time) * MS, *knot[: derivatives + 1]) for time, knot in zip(times, knots[1:], strict=True)]
    one = controller()
    one.sample(NOW)
    one.receive(command(*points), NOW)
    grid = np.arange(times[-1] + 1)
    seconds = np.array([0, *times]) / 1e3
    found, speeds, forces = [], [], []
    for ms in grid:
        found.append(one.sample(NOW + int(ms) * MS).copy())
        speeds.append(one.commanded.velocities)
        forces.append(one.commanded.accelerations)
    if derivatives == 0:
        expected = np.stack([np.interp(grid / 1e3, seconds, knots[:, 0, joint]) for joint in range(2)], axis=1)
        np.testing.assert_allclose(found, expected, atol=1e-9)
        return
    spline = (
        CubicHermiteSpline(seconds, knots[:, 0], knots[:, 1])
        if derivatives == 1
        else BPoly.from_derivatives(seconds, knots)
    )
    np.testing.assert_allclose(found, spline(grid / 1e3), atol=1e-9)
    np.testing.assert_allclose(speeds, spline(grid / 1e3, 1), atol=1e-7)
    inside = ~np.isin(grid, [0, *times])
    np.testing.assert_allclose(np.array(forces)[inside], spline(grid / 1e3, 2)[inside], atol=1e-5)


def test_a_chunk_sent_again_from_any_moment_leaves_the_motion_as_it_was() -> None:
    """What streaming rests on: the rest of a trajectory with velocities, sent again, is the same motion."""
    rng = np.random.default_rng(0)
    positions, speeds = rng.normal(size=(2, 20, 2))
    speeds[-1] = 0
    points = [Point((step + 1) * 20 * MS, p, v) for step, (p, v) in enumerate(zip(positions, speeds, strict=True))]
    alone, again = controller(), controller()
    for one in (alone, again):
        one.sample(NOW)
        one.receive(command(*points, stamp_ns=NOW), NOW)
    for ms in range(1, 400):
        now = NOW + ms * MS
        left = [Point(point.time_ns - ms * MS, point.positions, point.velocities) for point in points]
        left = [point for point in left if point.time_ns > 0]
        if ms % 20 == 7:  # between knots: those that pass unseen between two updates are gone
            again.receive(command(*left, stamp_ns=now), now)
        np.testing.assert_allclose(again.sample(now), alone.sample(now), atol=1e-9)
