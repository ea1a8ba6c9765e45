# SPDX-License-Identifier: Apache-2.0
"""Normalises the names of topics and message types."""


def absolute_topic(name: str) -> str:
    """Returns the topic with a leading slash, which some writers leave out."""
    return name if name.startswith("/") else f"/{name}"


def full_type(name: str) -> str:
    """Returns a message type in three parts: "sensor_msgs/Image", as ROS 1 writes it, becomes
    "sensor_msgs/msg/Image"."""
    package, slash, rest = name.partition("/")
    return f"{package}/msg/{rest}" if slash and "/" not in rest else name
