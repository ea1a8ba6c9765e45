# SPDX-License-Identifier: Apache-2.0
"""Action chunks to trajectories: units, limits, times, and what may never be sent."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from robot_tools import robot, states

from clp_ros.core.errors import ClpError
from clp_ros.robots.embodiment import Embodiment, load_embodiment
from clp_ros.robots.observation import joint_selector
from clp_ros.robots.trajectory import Trajectory, chunk_positions, split_trajectory

ALOHA = load_embodiment("aloha_bimanual")
LOWER = np.array([joint.lower for joint in ALOHA.joints])
UPPER = np.array([joint.upper for joint in ALOHA.joints])


def to_policy(positions: np.ndarray) -> np.ndarray:
    """By the definition in the YAML file, without the code under test."""
    return np.array(
        [
            (value - joint.lower) / (joint.upper - joint.lower) if joint.unit == "normalised" else value
            for value, joint in zip(positions, ALOHA.joints, strict=True)
        ]
    )


def chunk_to_trajectories(chunk: np.ndarray, embodiment: Embodiment) -> tuple[list[Trajectory], int]:
    positions, limited = chunk_positions(chunk, embodiment)
    times = np.arange(1, len(chunk) + 1) / embodiment.control_rate_hz
    return split_trajectory(times, positions, embodiment), limited


def test_one_trajectory_a_controller_in_order() -> None:
    chunk = np.stack([to_policy((LOWER + UPPER) / 2 + 0.001 * step) for step in range(7)])
    trajectories, limited = chunk_to_trajectories(chunk, ALOHA)
    assert limited == 0
    assert [t.controller for t in trajectories] == list(ALOHA.controllers)
    assert [t.topic for t in trajectories] == [c.topic for c in ALOHA.controllers.values()]
    assert [n for t in trajectories for n in t.joint_names] == [joint.name for joint in ALOHA.joints]
    for trajectory in trajectories:
        assert trajectory.positions.shape == (7, len(trajectory.joint_names))
        assert trajectory.positions.dtype == trajectory.times.dtype == np.float64
        assert np.allclose(trajectory.times, [0.02, 0.04, 0.06, 0.08, 0.1, 0.12, 0.14], rtol=0, atol=1e-12)
    expected = np.stack([(LOWER + UPPER) / 2 + 0.001 * step for step in range(7)])
    assert np.allclose(np.hstack([t.positions for t in trajectories]), expected, rtol=0, atol=1e-12)


@given(arrays(float, (3, 14), elements=st.floats(0, 1)), st.sampled_from([np.float32, np.float64]))
def test_state_to_policy_to_controller_is_the_identity(part: np.ndarray, dtype: type) -> None:
    positions = np.clip(LOWER + part * (UPPER - LOWER), LOWER, UPPER)
    chunk = np.empty_like(positions)
    for source in ALOHA.joint_states:
        selector, indices = joint_selector(ALOHA, source), ALOHA.joint_indices(source)
        order = np.random.default_rng(0).permutation(len(selector.joints))
        for step, row in enumerate(positions):
            names = tuple(selector.joints[i] for i in order)
            place, values = selector.select(states(0, names, row[indices][order]))
            assert place == tuple(range(7))
            chunk[step, indices] = values
    trajectories, limited = chunk_to_trajectories(chunk.astype(dtype), ALOHA)
    back = np.hstack([t.positions for t in trajectories])
    assert np.allclose(back, positions, rtol=0, atol=1e-6 if dtype is np.float32 else 1e-12)
    assert (back >= LOWER).all()
    assert (back <= UPPER).all()
    assert limited == 0


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_limit_itself_is_no_limit_hit(dtype: type) -> None:
    chunk = np.stack([to_policy(LOWER), to_policy(UPPER)]).astype(dtype)
    trajectories, limited = chunk_to_trajectories(chunk, ALOHA)
    positions = np.hstack([t.positions for t in trajectories])
    assert limited == 0
    assert (positions >= LOWER).all()
    assert (positions <= UPPER).all()


@given(arrays(float, (4, 3), elements=st.floats(-1e6, 1e6)))
def test_positions_outside_are_moved_to_the_limit_and_counted(chunk: np.ndarray) -> None:
    small = robot()
    trajectories, limited = chunk_to_trajectories(chunk, small)
    gripper, arm = trajectories
    wanted = np.hstack([0.02 + chunk[:, :1] * (0.06 - 0.02), chunk[:, 1:]])
    expected = np.clip(wanted, [0.02, -1000, -1000], [0.06, 1000, 1000])
    assert np.allclose(np.hstack([gripper.positions, arm.positions]), expected, rtol=1e-12, atol=1e-12)
    assert limited == (np.abs(wanted - expected) > 1e-6).sum()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused_by_joint(bad: float) -> None:
    chunk = np.full((5, 14), 0.1)
    chunk[3, 8] = bad
    with pytest.raises(ClpError, match="not finite at step 3, joint 'shoulder'"):
        chunk_to_trajectories(chunk, ALOHA)


@pytest.mark.parametrize("shape", [(0, 14), (14,), (5, 13), (5, 15), (1, 5, 14), (), (0,)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ClpError, match="shape"):
        chunk_to_trajectories(np.zeros(shape), ALOHA)


def test_velocities_and_the_start_go_to_every_controller() -> None:
    rng = np.random.default_rng(0)
    positions, velocities = rng.standard_normal((2, 5, 14))
    parts = split_trajectory(np.arange(1, 6) / 50, positions, ALOHA, velocities, 12)
    np.testing.assert_array_equal(np.hstack([part.velocities for part in parts]), velocities)
    assert {part.start_ns for part in parts} == {12}


def test_the_chunk_given_is_not_changed() -> None:
    chunk = np.full((2, 3), 1e9)
    chunk_to_trajectories(chunk, robot())
    assert (chunk == 1e9).all()
