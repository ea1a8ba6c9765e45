# SPDX-License-Identifier: Apache-2.0
"""Takes the messages of some topics in a thread of its own, at a small part of what rclpy's executors take for it."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

from rclpy.callback_groups import ReentrantCallbackGroup
from rclpy.event_handler import SubscriptionEventCallbacks
from rclpy.exceptions import InvalidHandle
from rclpy.node import Node
from rclpy.qos import QoSProfile

from clp_ros.nodes.compat import RCLError, WaitSet
from clp_ros.robots.topics import type_advice

# How long a close may take: the wait looks up that often.
_LOOK_NS = 50_000_000
_THROTTLE_S = 5.0


def published_otherwise(node: Node, topic: str, kinds: Mapping[str, str]) -> str:
    """What to add to "no message" where a topic is published with another type than ``kinds`` says; else nothing."""
    others = {info.topic_type for info in node.get_publishers_info_by_topic(topic)} - {kinds[topic]}
    if not others:
        return ""
    found = ", ".join(sorted(others))
    advice = type_advice(kinds[topic], found)
    return f" (it is published as {found}, not as {kinds[topic]}{': ' if advice else ''}{advice})"


class TakenHere(ReentrantCallbackGroup):
    """Leaves what is in it out of the node's executor."""

    def can_execute(self, entity: Any) -> bool:
        """Never."""
        return False


class Listener:
    """Subscriptions of a node, taken by one thread.

    An executor of rclpy makes its wait set anew, of every entity of the node, for each message or two. With three
    cameras and two arms that holds the interpreter for a third of the time, which then is not there for decoding and
    publishing (benchmarks/camera_load.py). Here the wait set has these subscriptions alone, and is made once.

    There are no event callbacks: an executor that waits for a subscription's events wakes with each of its messages.
    Best-effort subscriptions with rclpy's other defaults are compatible with all publishers; of another type tells
    :func:`published_otherwise`.

    Args:
        node: The node; the subscriptions are its own, and seen as such by the graph.
        topics: Message class by topic.
        qos: Of all of them, or by topic. All messages that its history holds are taken, the oldest first.
        receive: Called with the topic and each message, in this thread only. What it raises is logged.
    """

    def __init__(
        self,
        node: Node,
        topics: Mapping[str, type],
        qos: QoSProfile | Mapping[str, QoSProfile],
        receive: Callable[[str, Any], None],
    ) -> None:
        self._node = node
        self._receive = receive
        self._closing = threading.Event()
        group = TakenHere()
        # By the name it was asked for: a subscription's own may be a remapped one.
        self._subscriptions = {
            topic: node.create_subscription(
                kind,
                topic,
                lambda _: None,
                qos if isinstance(qos, QoSProfile) else qos[topic],
                callback_group=group,
                event_callbacks=SubscriptionEventCallbacks(use_default_callbacks=False),
            )
            for topic, kind in topics.items()
        }
        self._thread = threading.Thread(target=self._run, name="listener", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the subscriptions; ``receive`` is not called any more when this returns."""
        self._closing.set()
        self._thread.join()
        for subscription in self._subscriptions.values():
            self._node.destroy_subscription(subscription)
        self._subscriptions = {}

    def _run(self) -> None:
        context = self._node.context
        with ExitStack() as handles:
            try:
                handles.enter_context(context.handle)
                for subscription in self._subscriptions.values():
                    handles.enter_context(subscription.handle)
                topics = {subscription.handle.pointer: topic for topic, subscription in self._subscriptions.items()}
                wait_set = WaitSet(len(topics), 0, 0, 0, 0, 0, context.handle)
                while not self._closing.is_set() and context.ok():
                    wait_set.clear_entities()
                    for subscription in self._subscriptions.values():
                        wait_set.add_subscription(subscription.handle)
                    wait_set.wait(_LOOK_NS)
                    for pointer in wait_set.get_ready_entities("subscription"):
                        self._take_all(topics[pointer])
            except (RCLError, InvalidHandle):
                if context.ok() and not self._closing.is_set():
                    raise

    def _take_all(self, topic: str) -> None:
        """Takes what the topic's history holds: a wait for each message would cost as much again as the message.

        Not more than that, or a topic that is published faster than it is taken would keep the others waiting.
        """
        for _ in range(self._subscriptions[topic].qos_profile.depth):
            if self._closing.is_set() or not self._take(topic):
                return

    def _take(self, topic: str) -> bool:
        """Takes a message; returns whether there may be another."""
        subscription = self._subscriptions[topic]
        try:
            taken = subscription.handle.take_message(subscription.msg_type, subscription.raw)
            if taken is None:
                return False
            if not self._closing.is_set():
                self._receive(topic, taken[0])
        except Exception:  # noqa: BLE001 - one message must not end the listening to all, not even one that is no CDR
            if not self._node.context.ok():
                return False
            self._node.get_logger().error(
                f"a message of {topic} was lost\n{traceback.format_exc()}",
                throttle_duration_sec=_THROTTLE_S,
            )
        return True
