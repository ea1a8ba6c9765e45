# SPDX-License-Identifier: Apache-2.0
"""Publishes trajectories to the robot's controllers, or to a preview topic."""

from __future__ import annotations

from contextlib import ExitStack, suppress
from typing import Any

from rclpy.duration import Duration
from rclpy.exceptions import InvalidHandle
from rclpy.lifecycle import LifecycleNode
from rclpy.qos import QoSProfile
from rclpy.time import Time
from trajectory_msgs.msg import JointTrajectory

from clp_ros.nodes.joint_trajectory import serialized_joint_trajectory
from clp_ros.robots.embodiment import Embodiment
from clp_ros.robots.trajectory import Trajectory

# How long to wait for the controllers to acknowledge the last message, in seconds.
_ACKNOWLEDGED_S = 0.2


class TrajectoryPublishers:
    """One lifecycle publisher per controller.

    Args:
        node: The node. It publishes only while it is active.
        embodiment: The robot.
        dry_run: Whether all trajectories go to ``~/preview``. The ``frame_id`` then names the controller.
    """

    def __init__(self, node: LifecycleNode, embodiment: Embodiment, dry_run: bool) -> None:
        self._node = node
        self._dry_run = dry_run
        topics = [controller.topic for controller in embodiment.controllers.values()]
        if dry_run:
            # One topic for all controllers, so its history must hold the messages of a whole chunk.
            preview = node.create_lifecycle_publisher(JointTrajectory, "~/preview", QoSProfile(depth=len(topics)))
            self._publishers: dict[str, Any] = dict.fromkeys(topics, preview)
        else:
            self._publishers = {
                topic: node.create_lifecycle_publisher(JointTrajectory, topic, QoSProfile(depth=1)) for topic in topics
            }

    def serialise(self, trajectories: list[Trajectory]) -> list[tuple[str, bytes]]:
        """Returns the topic and the message of each trajectory.

        The stamp is the time for which the trajectory was made. So a message that arrives later still matches the
        trajectory that the controller follows, because its first points lie on that.
        """
        return [
            (
                one.topic,
                serialized_joint_trajectory(
                    one, Time(nanoseconds=one.start_ns).to_msg(), one.controller if self._dry_run else ""
                ),
            )
            for one in trajectories
        ]

    def send(self, messages: list[tuple[str, bytes]]) -> None:
        """Publishes what :meth:`serialise` returned. After the end of ROS, it publishes nothing."""
        if not self._node.context.ok():
            return  # a signal has ended ROS while the chunk was being made
        for topic, message in messages:
            self._publishers[topic].publish(message)

    def wait_until_acknowledged(self) -> None:
        """Waits until the controllers have received the last message, at most 0.2 s per controller."""
        for publisher in set(self._publishers.values()):
            with suppress(InvalidHandle):  # another thread may close it meanwhile
                publisher.wait_for_all_acked(Duration(seconds=_ACKNOWLEDGED_S))

    def close(self) -> None:
        """Destroys the publishers."""
        with ExitStack() as stack:  # each one, even if another fails
            for publisher in set(self._publishers.values()):
                stack.callback(self._node.destroy_lifecycle_publisher, publisher)
