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
"""For results: a later subscriber also receives the last message, while the publisher exists."""

# History depth of joint states: 100 ms of ten publishers at 100 Hz, or of one at 1 kHz. The node may be delayed so long
# by the garbage collector, or by a library that holds the interpreter.
_JOINT_STATES = 100


def sensor_input(kind: str, images: int = 1) -> QoSProfile:
    """Returns the quality of service for a robot's input topic.

    It is best effort, which receives from best-effort publishers (camera drivers) and from reliable ones. A reliable
    subscription would receive only from reliable ones. Of images, only the newest is needed. Of joint states and
    commands, every message is needed, because an arm and its gripper may publish on the same topic at the same time.

    Args:
        kind: ROS type name of the topic.
        images: Number of images that are kept until they are received.
    """
    depth = images if kind in CAMERA_TYPES else _JOINT_STATES
    return QoSProfile(
        reliability=ReliabilityPolicy.BEST_EFFORT,
        durability=DurabilityPolicy.VOLATILE,
        history=HistoryPolicy.KEEP_LAST,
        depth=depth,
    )
