# SPDX-License-Identifier: Apache-2.0
"""Messages are judged after a trip through CDR, as a subscriber gets them."""

from typing import Any

import numpy as np
import pytest
from builtin_interfaces.msg import Time
from rclpy.serialization import deserialize_message, serialize_message

from clp_ros.messages.images import decode_image
from clp_ros.nodes.messages import (
    image_message,
    matrix_from_message,
    matrix_message,
)

STAMP = Time(sec=12, nanosec=345_678_901)


def received(message: Any) -> Any:
    return deserialize_message(serialize_message(message), type(message))


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
