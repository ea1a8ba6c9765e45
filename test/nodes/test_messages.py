# SPDX-License-Identifier: Apache-2.0
"""Messages are judged after a trip through CDR, as a subscriber gets them."""

from typing import Any

import numpy as np
import pytest
from builtin_interfaces.msg import Time
from rclpy.serialization import deserialize_message, serialize_message

from clp_ros.bags.images import decode_image
from clp_ros.nodes.messages import (
    image_message,
    joint_trajectory_message,
    matrix_from_message,
    matrix_message,
)
from clp_ros.robots.embodiment import load_embodiment
from clp_ros.robots.trajectory import Trajectory, split_trajectory

STAMP = Time(sec=12, nanosec=345_678_901)


def received(message: Any) -> Any:
    return deserialize_message(serialize_message(message), type(message))


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
    got = received(joint_trajectory_message(sent, STAMP))
    assert got.joint_names == ["waist", "elbow"]
    assert (got.header.stamp.sec, got.header.stamp.nanosec) == (12, 345_678_901)
    assert np.array_equal([point.positions for point in got.points], sent.positions)
    for point in got.points:
        assert not any(len(getattr(point, name)) for name in ("velocities", "accelerations", "effort"))
    moving = trajectory(velocities=np.array([[1.0, 2.0], [3.0, 4.0], [0.0, 0.0]]))
    got = received(joint_trajectory_message(moving, STAMP))
    assert np.array_equal([point.velocities for point in got.points], moving.velocities)


@pytest.mark.parametrize("rate", [50.0, 30.0, 3.0, 500.0, 59.94])
def test_times_are_exact_to_the_nanosecond_and_increase(rate: float) -> None:
    times = np.arange(1, 401) / rate
    sent = trajectory(times=times, positions=np.zeros((400, 2)))
    got = received(joint_trajectory_message(sent, STAMP))
    starts = [point.time_from_start for point in got.points]
    assert all(0 <= start.nanosec < 10**9 for start in starts)
    nanoseconds = np.array([start.sec * 10**9 + start.nanosec for start in starts])
    exact = np.array([round(step * 10**9 / rate) for step in range(1, 401)])
    assert np.abs(nanoseconds - exact).max() <= 1  # the division itself rounds once
    assert (np.diff(nanoseconds) > 0).all()
    if rate in (50.0, 500.0):
        assert (nanoseconds == np.arange(1, 401) * (10**9 // int(rate))).all()


def test_points_used_again_hold_nothing_of_the_message_before() -> None:
    spare: list[Any] = []
    for points, speeds in ((3, True), (5, True), (2, False), (4, True)):
        values = np.random.default_rng(points).uniform(-1, 1, (2, points, 2))
        values[1, -1] = 0
        sent = trajectory(
            times=np.arange(1, points + 1) * 0.7, positions=values[0], velocities=values[1] if speeds else None
        )
        assert received(joint_trajectory_message(sent, STAMP, spare)) == received(joint_trajectory_message(sent, STAMP))
    assert len(spare) == 5


def test_a_chunk_becomes_messages_for_every_controller() -> None:
    embodiment = load_embodiment("aloha_bimanual")
    positions = np.random.default_rng(0).uniform(0.1, 0.9, (50, embodiment.action_size))
    trajectories = split_trajectory(np.arange(1, 51) / 50, positions, embodiment)
    messages = [joint_trajectory_message(each, STAMP) for each in trajectories]
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
        joint_trajectory_message(trajectory(**changes), STAMP)


@pytest.mark.parametrize("shape", [(5, 5), (3, 7), (4,), (2, 3, 4)])
def test_an_array_arrives_with_its_axes(shape: tuple[int, ...]) -> None:
    matrix = np.random.default_rng(1).standard_normal(shape)
    labels = [f"axis {axis}" for axis in range(len(shape))]
    message = matrix_message(matrix, labels)
    got = received(message)
    assert [dimension.label for dimension in got.layout.dim] == labels
    assert got.layout.data_offset == 0
    strides = [dimension.stride for dimension in got.layout.dim]
    # As std_msgs/MultiArrayLayout has it: the first stride is the whole size, the others are used in turn.
    assert strides[0] == matrix.size
    for index in np.ndindex(*shape):
        place = sum(stride * i for stride, i in zip([*strides[1:], 1], index, strict=True))
        assert got.data[place] == matrix[index]
    assert np.array_equal(matrix_from_message(message), matrix)


def test_an_array_that_is_not_contiguous_keeps_its_order() -> None:
    matrix = np.arange(12, dtype=np.float32).reshape(3, 4).T
    assert np.array_equal(matrix_from_message(matrix_message(matrix, ("a", "b"))), matrix)


def test_every_axis_needs_its_label() -> None:
    with pytest.raises(ValueError, match="1 labels"):
        matrix_message(np.zeros((2, 2)), ["layer"])


@pytest.mark.parametrize("picture", ["contiguous", "mirrored"])
def test_a_picture_arrives_as_it_was(picture: str) -> None:
    pixels = np.random.default_rng(2).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    pixels = pixels[:, ::-1] if picture == "mirrored" else pixels
    got = received(image_message(pixels, STAMP, "cam"))
    assert (got.encoding, got.height, got.width, got.step, got.is_bigendian) == ("rgb8", 48, 64, 192, 0)
    assert (got.header.frame_id, got.header.stamp.sec) == ("cam", 12)
    assert np.array_equal(decode_image(got), pixels)


@pytest.mark.parametrize("pixels", [np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3))])
def test_other_pictures_are_refused(pixels: np.ndarray) -> None:
    with pytest.raises(ValueError, match="not \\(height, width, 3\\) uint8"):
        image_message(pixels, STAMP, "cam")
