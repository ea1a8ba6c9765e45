# SPDX-License-Identifier: Apache-2.0
"""One spelling of topics and message types, whoever wrote them."""


def absolute_topic(name: str) -> str:
    """A topic with its leading slash: some writers, and people, leave it out."""
    return name if name.startswith("/") else f"/{name}"


def full_type(name: str) -> str:
    """A message type in three parts: "sensor_msgs/Image", ROS 1's and old tools' way, is "sensor_msgs/msg/Image"."""
    package, slash, rest = name.partition("/")
    return f"{package}/msg/{rest}" if slash and "/" not in rest else name
