# SPDX-License-Identifier: Apache-2.0
"""Qualities of service that the nodes share."""

from rclpy.qos import DurabilityPolicy, HistoryPolicy, QoSProfile, ReliabilityPolicy

from clp_ros.robots.topics import CAMERA_TYPES

LATCHED = QoSProfile(
    reliability=ReliabilityPolicy.RELIABLE,
    durability=DurabilityPolicy.TRANSIENT_LOCAL,
    history=HistoryPolicy.KEEP_LAST,
    depth=1,
)
"""For results: who subscribes later gets the last message, as long as its publisher lives."""

# What came in while a node was held up, by the garbage collector or a library that keeps the interpreter: 100 ms of ten
# publishers at 100 Hz, or of one at 1 kHz.
_JOINT_STATES = 100


def sensor_input(kind: str, images: int = 1) -> QoSProfile:
    """For a robot's inputs: hears best-effort publishers (camera drivers) as well as reliable ones.

    A reliable subscription hears only those. Of images, the newest serves. Of JointStates and commands, every message
    is taken: a history keeps its newest messages whoever published them, so that of two that come at once a history of
    one would lose that of the arm or that of its gripper.

    Args:
        kind: ROS type name of the topic.
        images: Number of images that are kept until they are taken.
    """
    depth = images if kind in CAMERA_TYPES else _JOINT_STATES
    return QoSProfile(
        reliability=ReliabilityPolicy.BEST_EFFORT,
        durability=DurabilityPolicy.VOLATILE,
        history=HistoryPolicy.KEEP_LAST,
        depth=depth,
    )
