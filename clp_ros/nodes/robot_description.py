# SPDX-License-Identifier: Apache-2.0
"""Receives the robot's description (URDF) and narrows the embodiment's limits to those of the description."""

from __future__ import annotations

import threading
import time
from functools import partial
from typing import Any, Self

from rclpy.node import Node
from std_msgs.msg import String

from clp_ros.core.errors import ClpError
from clp_ros.nodes.topics import LATCHED
from clp_ros.robots.embodiment import Embodiment
from clp_ros.robots.urdf_limits import narrow

# Time between two checks for a signal while waiting for a description, in seconds.
_POLL_S = 0.1


class RobotDescriptions:
    """Subscribes to the robot descriptions of an embodiment. This is a context manager that ends the subscriptions.

    Each entry of ``joint_states`` has its own description topic: two arms that are two robots have two. The node's
    executor must spin in another thread. The node's parameter ``robot_description_wait`` bounds the wait, in seconds
    from the construction of this object. With 0, there are no subscriptions.

    Args:
        node: The node, which has the parameter.
        embodiment: The robot, with the limits of its YAML file.

    Raises:
        ClpError: The parameter is negative or not finite.
    """

    def __init__(self, node: Node, embodiment: Embodiment) -> None:
        self._node = node
        self._embodiment = embodiment
        self._wait = node.get_parameter("robot_description_wait").value
        if not 0 <= self._wait < float("inf"):
            raise ClpError(
                f"the parameter robot_description_wait is {self._wait}", where=node.get_name(), hint="give 0 or seconds"
            )
        self._deadline = time.monotonic() + self._wait
        self._topics = {name: states.description_topic for name, states in embodiment.joint_states.items()}
        self._received: dict[str, str] = {}
        self._new = threading.Event()
        self._subscriptions: list[Any] = []

    def __enter__(self) -> Self:
        if self._wait:
            for topic in set(self._topics.values()):
                receive = partial(self._receive, topic)
                self._subscriptions.append(self._node.create_subscription(String, topic, receive, LATCHED))
        return self

    def __exit__(self, *_: object) -> None:
        for subscription in self._subscriptions:
            self._node.destroy_subscription(subscription)

    def narrow(self) -> Embodiment:
        """Returns the embodiment with the narrower of its own and the described limits, and logs the differences.

        Without a description in time, the embodiment's limits are kept, and a warning is logged.

        Raises:
            ClpError: A description does not match the robot. See :func:`clp_ros.robots.urdf_limits.narrow`.
        """
        if not self._wait:
            return self._embodiment
        wanted = sorted(set(self._topics.values()))
        while (
            not all(topic in self._received for topic in wanted)
            and time.monotonic() < self._deadline
            and self._node.context.ok()
        ):
            self._new.wait(_POLL_S)
            self._new.clear()
        documents = {name: self._received[topic] for name, topic in self._topics.items() if topic in self._received}
        embodiment, lines = narrow(self._embodiment, documents, self._topics)
        logger = self._node.get_logger()
        if not self._node.context.ok():
            return embodiment
        for topic in wanted:
            if topic in self._received:
                logger.info(f"limits are narrowed to those of {topic}")
            else:
                logger.warning(f"no description on {topic} within {self._wait:g} s: the embodiment's limits hold alone")
        for line in lines:
            logger.info(f"narrower: {line}")
        return embodiment

    def _receive(self, topic: str, message: String) -> None:
        self._received[topic] = message.data
        self._new.set()
