# SPDX-License-Identifier: Apache-2.0
"""Converts arrays and images to ROS messages. This uses no node, topic or clock."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np
from builtin_interfaces.msg import Time
from sensor_msgs.msg import CompressedImage, Image, JointState
from std_msgs.msg import Float64MultiArray, MultiArrayDimension, MultiArrayLayout
from trajectory_msgs.msg import JointTrajectory

NANOSECONDS = 1_000_000_000


def time_message(nanoseconds: int) -> Time:
    """Returns a time as a message."""
    return Time(sec=nanoseconds // NANOSECONDS, nanosec=nanoseconds % NANOSECONDS)


INPUT_TYPES: dict[str, type] = {
    "sensor_msgs/msg/Image": Image,
    "sensor_msgs/msg/CompressedImage": CompressedImage,
    "sensor_msgs/msg/JointState": JointState,
}
"""Message class of every type that an input topic of an embodiment can have (``Embodiment.topics``)."""

DEMONSTRATION_TYPES: dict[str, type] = INPUT_TYPES | {
    "std_msgs/msg/Float64MultiArray": Float64MultiArray,
    "trajectory_msgs/msg/JointTrajectory": JointTrajectory,
}
"""Message class of every type of an input or action topic (``Embodiment.demonstration_topics``)."""


def matrix_message(matrix: np.ndarray, labels: Sequence[str]) -> Float64MultiArray:
    """Converts an array to a message, row-major, with a label for each axis.

    Args:
        matrix: The array, with any number of axes. It is sent as float64.
        labels: One label per axis, such as ("layer", "layer").

    Raises:
        ValueError: The number of labels differs from the number of axes.
    """
    matrix = np.ascontiguousarray(matrix, dtype=np.float64)
    if len(labels) != matrix.ndim:
        raise ValueError(f"{len(labels)} labels for an array of shape {matrix.shape}")
    dimensions = [
        # std_msgs counts strides in elements, and that of an axis includes the axis itself.
        MultiArrayDimension(label=label, size=size, stride=int(np.prod(matrix.shape[axis:])))
        for axis, (label, size) in enumerate(zip(labels, matrix.shape, strict=True))
    ]
    return Float64MultiArray(layout=MultiArrayLayout(dim=dimensions, data_offset=0), data=array("d", matrix.tobytes()))


def matrix_from_message(message: Float64MultiArray) -> np.ndarray:
    """Returns the array of a message of :func:`matrix_message`: float64, with the shape of its dimensions."""
    return np.asarray(message.data, dtype=np.float64).reshape([dimension.size for dimension in message.layout.dim])


def image_message(image: np.ndarray, stamp: Time, frame_id: str) -> Image:
    """Converts an RGB image to an rgb8 message.

    Args:
        image: (height, width, 3) uint8.
        stamp: Time of the image.
        frame_id: The header's frame_id.

    Raises:
        ValueError: The image has another shape or dtype.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"a picture of shape {image.shape} and dtype {image.dtype}, not (height, width, 3) uint8")
    height, width, _ = image.shape
    message = Image(height=height, width=width, encoding="rgb8", is_bigendian=0, step=3 * width)
    message.header.stamp = stamp
    message.header.frame_id = frame_id
    # rclpy checks every other kind of sequence element by element, which takes 55 ms instead of 0.1 ms for 640x480.
    message.data = array("B", image.tobytes())
    return message
