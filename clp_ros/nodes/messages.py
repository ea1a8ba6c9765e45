# SPDX-License-Identifier: Apache-2.0
"""From our types to ROS messages. Pure conversions: no node, no topic, no clock."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np
from builtin_interfaces.msg import Time
from sensor_msgs.msg import CompressedImage, Image, JointState
from std_msgs.msg import Float64MultiArray, MultiArrayDimension, MultiArrayLayout
from trajectory_msgs.msg import JointTrajectory

NANOSECONDS = 1_000_000_000

INPUT_TYPES: dict[str, type] = {
    "sensor_msgs/msg/Image": Image,
    "sensor_msgs/msg/CompressedImage": CompressedImage,
    "sensor_msgs/msg/JointState": JointState,
}
"""Message class of every type that an embodiment's input topic can have (``Embodiment.topics``)."""

DEMONSTRATION_TYPES: dict[str, type] = INPUT_TYPES | {
    "std_msgs/msg/Float64MultiArray": Float64MultiArray,
    "trajectory_msgs/msg/JointTrajectory": JointTrajectory,
}
"""The same, of the topics with actions too (``Embodiment.demonstration_topics``)."""


def matrix_message(matrix: np.ndarray, labels: Sequence[str]) -> Float64MultiArray:
    """An array with a name for each of its axes, row-major.

    Args:
        matrix: Any number of axes; sent as float64.
        labels: One an axis, such as ("layer", "layer").

    Raises:
        ValueError: Not one label an axis.
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
    """The array that `matrix_message` sent: float64, of the shape its dimensions give."""
    return np.asarray(message.data, dtype=np.float64).reshape([dimension.size for dimension in message.layout.dim])


def image_message(image: np.ndarray, stamp: Time, frame_id: str) -> Image:
    """A picture as rgb8.

    Args:
        image: (height, width, 3) uint8, RGB.
        stamp: When it was taken or drawn.
        frame_id: The frame it belongs to.

    Raises:
        ValueError: Another shape or dtype.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"a picture of shape {image.shape} and dtype {image.dtype}, not (height, width, 3) uint8")
    height, width, _ = image.shape
    message = Image(height=height, width=width, encoding="rgb8", is_bigendian=0, step=3 * width)
    message.header.stamp = stamp
    message.header.frame_id = frame_id
    # rclpy checks any other sequence element by element: 55 ms for 640x480 instead of 0.1 ms.
    message.data = array("B", image.tobytes())
    return message
