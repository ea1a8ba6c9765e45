# SPDX-License-Identifier: Apache-2.0
"""From our types to ROS messages. Pure conversions: no node, no topic, no clock."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np
from builtin_interfaces.msg import Time
from sensor_msgs.msg import CompressedImage, Image, JointState
from std_msgs.msg import Float64MultiArray, MultiArrayDimension, MultiArrayLayout
from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

from clp_ros.robots.trajectory import Trajectory

NANOSECONDS = 1_000_000_000

INPUT_TYPES: dict[str, type] = {
    "sensor_msgs/msg/Image": Image,
    "sensor_msgs/msg/CompressedImage": CompressedImage,
    "sensor_msgs/msg/JointState": JointState,
}
"""Message class of every type that an embodiment's input topic can have (``Embodiment.topics``)."""


def joint_trajectory_message(
    trajectory: Trajectory, stamp: Time, spare: list[JointTrajectoryPoint] | None = None
) -> JointTrajectory:
    """A trajectory as a joint_trajectory_controller takes it: positions, and velocities where it has them.

    Args:
        trajectory: What to send.
        stamp: When it starts; a zero stamp means "now" to the controller.
        spare: Points of an earlier message, already published, that are used again; the list grows as needed. Making
            a message of them takes a third of the time: rclpy's constructors are slow.

    Raises:
        ValueError: A controller would drop it, or worse, follow it: no points, shapes that do not fit, a position
            or velocity that is not finite, a velocity at the end, or times that are not positive and strictly
            increasing in whole nanoseconds.
    """
    positions = np.asarray(trajectory.positions, dtype=np.float64)
    times = np.asarray(trajectory.times, dtype=np.float64)
    shape = (len(times), len(trajectory.joint_names))
    if times.ndim != 1 or positions.shape != shape or 0 in shape:
        raise ValueError(f"a trajectory of shape {positions.shape}, where times and joints say {shape}")
    velocities = positions[:, :0] if trajectory.velocities is None else np.asarray(trajectory.velocities, dtype=float)
    if trajectory.velocities is not None and velocities.shape != shape:
        raise ValueError(f"velocities of shape {velocities.shape}, where times and joints say {shape}")
    if not all(np.isfinite(values).all() for values in (positions, velocities, times)):
        raise ValueError("a trajectory that is not finite")
    nanoseconds = np.rint(times * NANOSECONDS).astype(np.int64)
    if (np.diff(nanoseconds, prepend=0) <= 0).any():
        raise ValueError("a trajectory whose times are not positive and strictly increasing")
    if velocities[-1].any():
        raise ValueError("a trajectory that does not end at rest")
    spare = [] if spare is None else spare
    spare.extend(JointTrajectoryPoint() for _ in range(len(times) - len(spare)))
    points = spare[: len(times)]
    # Slices of one array: a conversion a point takes three times as long.
    rows, speeds = array("d", positions.tobytes()), array("d", velocities.tobytes())
    joints, moving = positions.shape[1], velocities.shape[1]
    for index, (point, nanosecond) in enumerate(zip(points, nanoseconds.tolist(), strict=True)):
        point.positions = rows[index * joints : (index + 1) * joints]
        point.velocities = speeds[index * moving : (index + 1) * moving]
        start = point.time_from_start
        start.sec, start.nanosec = divmod(nanosecond, NANOSECONDS)
    message = JointTrajectory(joint_names=list(trajectory.joint_names), points=points)
    message.header.stamp = stamp
    return message


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
