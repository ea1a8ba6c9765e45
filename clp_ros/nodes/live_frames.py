# SPDX-License-Identifier: Apache-2.0
"""Listens to an embodiment's topics until they fall silent, and draws frames from what it hears."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from rclpy.node import Node

from clp_ros.core.errors import ClpError
from clp_ros.datasets.reservoir import FrameReservoir
from clp_ros.nodes.messages import DEMONSTRATION_TYPES
from clp_ros.nodes.topics import sensor_input

_POLL_S = 0.1
# Images kept until they are taken: every tick may be drawn, not only the newest.
_IMAGES = 10


class LiveFrames:
    """Feeds a reservoir from subscriptions.

    Args:
        node: The node; its clock gives the receive stamps, so a bag played with ``--clock`` wants ``use_sim_time``.
        reservoir: Where the messages go. Nobody else touches it before :meth:`wait` has returned.
        idle_timeout: Seconds of silence, after the first message, that end the listening.
    """

    def __init__(self, node: Node, reservoir: FrameReservoir, idle_timeout: float) -> None:
        self._node = node
        self._reservoir = reservoir
        self._idle_timeout = idle_timeout
        self._lock = threading.Lock()
        self._heard: float | None = None
        self._ended = threading.Event()
        self._fault: ClpError | None = None
        self._subscriptions = [
            node.create_subscription(
                DEMONSTRATION_TYPES[kind], topic, partial(self._receive, topic), sensor_input(kind, _IMAGES)
            )
            for topic, kind in reservoir.embodiment.demonstration_topics.items()
        ]

    def wait(self, tell: Callable[[], None]) -> None:
        """Listens until the topics fall silent or :meth:`finish` is called.

        Args:
            tell: Called ten times a second; what it raises ends the listening.

        Raises:
            ClpError: A message cannot be used because of the robot's clocks.
        """
        try:
            while not self._ended.wait(_POLL_S):
                tell()
                heard = self._heard
                if heard is not None and time.monotonic() - heard > self._idle_timeout:
                    self._ended.set()
        finally:
            with self._lock:  # a callback that is under way ends first
                self._ended.set()
            for subscription in self._subscriptions:
                self._node.destroy_subscription(subscription)
        if self._fault is not None:
            raise self._fault

    def finish(self) -> int:
        """Ends the listening; returns the number of frames drawn.

        Raises:
            ClpError: No frame has been drawn yet, and the listening goes on; or it has ended already.
        """
        with self._lock:
            if self._ended.is_set():
                raise ClpError("not listening any more", fix="see /diagnostics for what is being done")
            if not self._reservoir.held:
                raise ClpError("no frame has been drawn yet", fix="move the robot, or play a bag")
            self._ended.set()
            self._reservoir.end_episode()  # which may draw one frame more
            return self._reservoir.held

    def _receive(self, topic: str, message: Any) -> None:
        with self._lock:
            now_ns = self._node.get_clock().now().nanoseconds
            if self._ended.is_set() or now_ns == 0:  # with use_sim_time: before the first /clock
                return
            self._heard = time.monotonic()
            try:
                self._reservoir.add(topic, message, now_ns)
            except ClpError as error:
                self._fault = error
                self._ended.set()
