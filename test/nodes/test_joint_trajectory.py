# SPDX-License-Identifier: Apache-2.0
"""Trajectories are judged after a trip through CDR, as a controller gets them, and against rclpy's own bytes."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from builtin_interfaces.msg import Duration, Time
from hypothesis import given
from hypothesis import strategies as st
from rclpy.serialization import deserialize_message
from rosbags.typesys import Stores, get_typestore
from std_msgs.msg import Header
from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

from clp_ros.nodes.joint_trajectory import serialized_joint_trajectory
from clp_ros.robots.embodiment import load_embodiment
from clp_ros.robots.trajectory import Trajectory, split_trajectory

STAMP = Time(sec=12, nanosec=345_678_901)


def received(message: bytes) -> JointTrajectory:
    return deserialize_message(message, JointTrajectory)


def trajectory(**changes: Any) -> Trajectory:
    fields = {
        "controller": "arm",
        "topic": "/arm/joint_trajectory",
        "joint_names": ("waist", "elbow"),
        "positions": np.array([[0.1, -0.2], [0.3, 0.4], [0.5, 0.6]]),
        "times": np.array([0.02, 0.04, 0.06]),
    }
    return Trajectory(**(fields | changes))


def test_a_trajectory_arrives_as_it_was() -> None:
    sent = trajectory()
    got = received(serialized_joint_trajectory(sent, STAMP))
    assert got.joint_names == ["waist", "elbow"]
    assert (got.header.stamp.sec, got.header.stamp.nanosec) == (12, 345_678_901)
    assert np.array_equal([point.positions for point in got.points], sent.positions)
    for point in got.points:
        assert not any(len(getattr(point, name)) for name in ("velocities", "accelerations", "effort"))
    moving = trajectory(velocities=np.array([[1.0, 2.0], [3.0, 4.0], [0.0, 0.0]]))
    got = received(serialized_joint_trajectory(moving, STAMP))
    assert np.array_equal([point.velocities for point in got.points], moving.velocities)


@pytest.mark.parametrize("rate", [50.0, 30.0, 3.0, 500.0, 59.94])
def test_times_are_exact_to_the_nanosecond_and_increase(rate: float) -> None:
    times = np.arange(1, 401) / rate
    sent = trajectory(times=times, positions=np.zeros((400, 2)))
    got = received(serialized_joint_trajectory(sent, STAMP))
    starts = [point.time_from_start for point in got.points]
    assert all(0 <= start.nanosec < 10**9 for start in starts)
    nanoseconds = np.array([start.sec * 10**9 + start.nanosec for start in starts])
    exact = np.array([round(step * 10**9 / rate) for step in range(1, 401)])
    assert np.abs(nanoseconds - exact).max() <= 1  # the division itself rounds once
    assert (np.diff(nanoseconds) > 0).all()
    if rate in (50.0, 500.0):
        assert (nanoseconds == np.arange(1, 401) * (10**9 // int(rate))).all()


@given(st.integers(0, 2**32 - 1), st.integers(1, 7), st.integers(1, 60), st.booleans(), st.text("ab_", max_size=9))
def test_the_bytes_are_those_of_the_message(seed: int, joints: int, points: int, moving: bool, frame_id: str) -> None:
    rng = np.random.default_rng(seed)
    positions, velocities = rng.normal(size=(2, points, joints))
    velocities[-1] = 0
    names = tuple("j" * rng.integers(1, 9) + str(joint) for joint in range(joints))
    sent = Trajectory("arm", "/arm", names, positions, rng.uniform(0.01, 2.0, points).cumsum(), velocities)
    sent = sent if moving else replace(sent, velocities=None)
    message = JointTrajectory(joint_names=list(names), header=Header(stamp=STAMP, frame_id=frame_id))
    for index in range(points):
        nanoseconds = round(float(sent.times[index]) * 10**9)
        start = Duration(sec=nanoseconds // 10**9, nanosec=nanoseconds % 10**9)
        point = JointTrajectoryPoint(positions=positions[index].tolist(), time_from_start=start)
        point.velocities = velocities[index].tolist() if moving else []
        message.points.append(point)
    got = serialized_joint_trajectory(sent, STAMP, frame_id)
    assert deserialize_message(got, JointTrajectory) == message
    # Not a byte too many, and zeros between values where they are aligned: rclpy leaves anything there.
    name, store = "trajectory_msgs/msg/JointTrajectory", get_typestore(Stores.ROS2_JAZZY)
    assert bytes(store.serialize_cdr(store.deserialize_cdr(got, name), name)) == got


def test_a_chunk_becomes_messages_for_every_controller() -> None:
    embodiment = load_embodiment("aloha_bimanual")
    positions = np.random.default_rng(0).uniform(0.1, 0.9, (50, embodiment.action_size))
    trajectories = split_trajectory(np.arange(1, 51) / 50, positions, embodiment)
    messages = [received(serialized_joint_trajectory(each, STAMP)) for each in trajectories]
    assert [len(message.joint_names) for message in messages] == [6, 1, 6, 1]
    assert {message.points[0].time_from_start.nanosec for message in messages} == {20_000_000}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"positions": np.array([[0.1, np.nan], [0, 0], [0, 0]])}, "finite"),
        ({"positions": np.array([[0.1, np.inf], [0, 0], [0, 0]])}, "finite"),
        ({"times": np.array([0.02, np.nan, 0.06])}, "finite"),
        ({"velocities": np.full((3, 2), np.nan)}, "finite"),
        ({"velocities": np.zeros((2, 2))}, "shape"),
        ({"velocities": np.ones((3, 2))}, "at rest"),
        ({"times": np.array([0.0, 0.02, 0.04])}, "strictly increasing"),
        ({"times": np.array([0.02, 0.02, 0.04])}, "strictly increasing"),
        ({"times": np.array([0.02, 0.0200000000001, 0.04])}, "strictly increasing"),
        ({"positions": np.zeros((0, 2)), "times": np.zeros(0)}, "shape"),
        ({"joint_names": ()}, "shape"),
        ({"positions": np.zeros((3, 3))}, "shape"),
        ({"times": np.array([0.02, 0.04])}, "shape"),
    ],
)
def test_what_a_controller_would_drop_or_follow_blindly_is_never_made(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        serialized_joint_trajectory(trajectory(**changes), STAMP)
