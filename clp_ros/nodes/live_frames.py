# SPDX-License-Identifier: Apache-2.0
"""Receives an embodiment's topics until they fall silent, and draws frames from the messages."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from rclpy.node import Node

from clp_ros.core.errors import ClpError
from clp_ros.datasets.reservoir import FrameReservoir
from clp_ros.nodes.latched import LatchedStates
from clp_ros.nodes.messages import DEMONSTRATION_TYPES
from clp_ros.nodes.topics import sensor_input

_POLL_S = 0.1
# History depth of images: any tick may be drawn, so more than the newest image is kept.
_IMAGES = 10


class LiveFrames:
    """Fills a reservoir from subscriptions.

    Args:
        node: The node. Its clock gives the receive stamps, so a bag played with ``--clock`` needs ``use_sim_time``.
        reservoir: Receives the messages. No other thread may use it before :meth:`wait` has returned.
        idle_timeout: Time without messages, after the first one, that ends the reception, in seconds.
    """

    def __init__(self, node: Node, reservoir: FrameReservoir, idle_timeout: float) -> None:
        self._node = node
        self._reservoir = reservoir
        self._idle_timeout = idle_timeout
        self._lock = threading.Lock()
        # When the last message was received, on time.monotonic.
        self._received_s: float | None = None
        self._ended = threading.Event()
        self._fault: ClpError | None = None
        self._subscriptions = [
            node.create_subscription(
                DEMONSTRATION_TYPES[kind], topic, partial(self._receive, topic), sensor_input(kind, _IMAGES)
            )
            for topic, kind in reservoir.embodiment.demonstration_topics.items()
        ]

    def wait(self, on_poll: Callable[[], None]) -> None:
        """Waits until the topics fall silent or :meth:`finish` is called.

        Joint states that were latched before the subscriptions began are received too, once another message has come.

        Args:
            on_poll: Called ten times per second. Its exceptions end the wait.

        Raises:
            ClpError: A message cannot be used because of the robot's clocks.
        """
        latched = LatchedStates(self._node, self._reservoir.embodiment, self._add)
        try:
            while not self._ended.wait(_POLL_S):
                on_poll()
                for topic in self._reservoir.embodiment.topics if self._received_s else ():
                    if not self._reservoir.messages[topic]:
                        latched.take(topic)
                received_s = self._received_s
                if received_s is not None and time.monotonic() - received_s > self._idle_timeout:
                    self._ended.set()
        finally:
            with self._lock:  # wait for a callback in progress
                self._ended.set()
            latched.close()
            for subscription in self._subscriptions:
                self._node.destroy_subscription(subscription)
        if self._fault is not None:
            raise self._fault

    def finish(self) -> int:
        """Ends the reception.

        Returns:
            The number of frames drawn.

        Raises:
            ClpError: No frame has been drawn yet, and the reception continues; or it has ended already.
        """
        with self._lock:
            if self._ended.is_set():
                raise ClpError(
                    "the node does not listen any more", where="finish", hint="read the current step in /diagnostics"
                )
            if not self._reservoir.held:
                raise ClpError("no frame has been drawn yet", where="finish", hint="move the robot, or play a bag")
            self._ended.set()
            self._reservoir.end_episode()  # this may draw one more frame
            return self._reservoir.held

    def _receive(self, topic: str, message: Any) -> None:
        if self._add(topic, message):
            self._received_s = time.monotonic()

    def _add(self, topic: str, message: Any) -> bool:
        """Adds a message. Returns whether the node listens and has a clock."""
        with self._lock:
            now_ns = self._node.get_clock().now().nanoseconds
            if self._ended.is_set() or now_ns == 0:  # with use_sim_time: before the first /clock
                return False
            try:
                self._reservoir.add(topic, message, now_ns)
            except ClpError as error:
                self._fault = error
                self._ended.set()
            return True
