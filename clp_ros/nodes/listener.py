# SPDX-License-Identifier: Apache-2.0
"""Receives messages in a thread of its own, with a small part of the processor time of rclpy's executors."""

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

# Timeout of the wait for messages, which bounds the time of close().
_LOOK_NS = 50_000_000
_THROTTLE_S = 5.0


def published_otherwise(node: Node, topic: str, kinds: Mapping[str, str]) -> str:
    """Returns an addition to "no message" for a topic that is published with another type; else an empty text.

    Args:
        node: The node.
        topic: The topic.
        kinds: The expected type by topic.
    """
    others = {info.topic_type for info in node.get_publishers_info_by_topic(topic)} - {kinds[topic]}
    if not others:
        return ""
    found = ", ".join(sorted(others))
    advice = type_advice(kinds[topic], found)
    return f" (it is published as {found}, not as {kinds[topic]}{': ' if advice else ''}{advice})"


class TakenHere(ReentrantCallbackGroup):
    """A callback group whose entities the node's executor never serves."""

    def can_execute(self, entity: Any) -> bool:
        """Returns False for every entity."""
        return False


class Listener:
    """Subscriptions of a node that one thread serves.

    rclpy's executors rebuild their wait set, with every entity of the node, for every one or two messages. With three
    cameras and two arms, this holds the interpreter for a third of the time, which delays decoding and publishing
    (benchmarks/camera_load.py). Here the wait set contains only these subscriptions, and is built once.

    The subscriptions have no event callbacks, because an executor that waits for a subscription's events wakes up with
    each of its messages. So incompatible publishers are not reported. Best-effort subscriptions are compatible with all
    publishers of the same type; :func:`published_otherwise` reports those of another type.

    Args:
        node: The node that owns the subscriptions.
        topics: Message class by topic.
        qos: Quality of service, of all topics or by topic. All messages in its history are received, the oldest first.
        receive: Called with the topic and each message, in the listener's thread. Its exceptions are logged.
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
        # By the requested name: a subscription's own name may be remapped.
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
        """Ends the subscriptions. ``receive`` is not called after this returns."""
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
        """Receives all messages in a topic's history, because a wait for each one would double the cost.

        No more messages are received at once. Otherwise a very fast topic would block the others.
        """
        for _ in range(self._subscriptions[topic].qos_profile.depth):
            if self._closing.is_set() or not self._take(topic):
                return

    def _take(self, topic: str) -> bool:
        """Receives a message. Returns whether there may be another."""
        subscription = self._subscriptions[topic]
        try:
            taken = subscription.handle.take_message(subscription.msg_type, subscription.raw)
            if taken is None:
                return False
            if not self._closing.is_set():
                self._receive(topic, taken[0])
        except Exception:  # noqa: BLE001 - no message may end the thread, not even one that is no CDR
            if not self._node.context.ok():
                return False
            self._node.get_logger().error(
                f"a message of {topic} was lost\n{traceback.format_exc()}",
                throttle_duration_sec=_THROTTLE_S,
            )
        return True
