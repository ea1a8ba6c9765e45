# SPDX-License-Identifier: Apache-2.0
"""Receives joint states that were latched (transient local durability) before the node subscribed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rclpy.event_handler import SubscriptionEventCallbacks
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, HistoryPolicy, QoSProfile, ReliabilityPolicy
from rclpy.subscription import Subscription
from sensor_msgs.msg import JointState

from clp_ros.nodes.listener import TakenHere
from clp_ros.robots.embodiment import Embodiment
from clp_ros.robots.observation import NotReadyError

# Reliable, because latched messages are not sent to best-effort subscriptions. Deep enough for one driver per joint.
_LATCHED = QoSProfile(
    reliability=ReliabilityPolicy.RELIABLE,
    durability=DurabilityPolicy.TRANSIENT_LOCAL,
    history=HistoryPolicy.KEEP_LAST,
    depth=100,
)


class LatchedStates:
    """Receives the latched messages of JointState topics whose message is missing.

    A robot's topics have volatile subscriptions, because these are compatible with all publishers. But a volatile
    subscription does not receive latched messages. A transient local subscription would receive nothing from a volatile
    publisher, whose log would warn. So a second, transient local subscription is made only for a topic with a latching
    publisher, and only while its message is missing.

    Args:
        node: The node that owns the subscriptions.
        embodiment: The robot.
        receive: Called with the topic and each message, in the thread that calls :meth:`take`.
    """

    def __init__(
        self,
        node: Node,
        embodiment: Embodiment,
        receive: Callable[[str, Any], object],
    ) -> None:
        self._node = node
        self._embodiment = embodiment
        self._topics = {states.topic for states in embodiment.joint_states.values()}
        self._receive = receive
        self._subscriptions: dict[str, Subscription] = {}

    def close(self) -> None:
        """Ends the subscriptions."""
        for subscription in self._subscriptions.values():
            self._node.destroy_subscription(subscription)
        self._subscriptions = {}

    def take(self, topic: str) -> None:
        """Receives a topic's new messages. The first call subscribes, if a publisher latches.

        Args:
            topic: The topic. Topics without joint states are ignored.
        """
        if topic not in self._topics:
            return
        if topic not in self._subscriptions:
            if any(_latches(info.qos_profile) for info in self._node.get_publishers_info_by_topic(topic)):
                self._subscriptions[topic] = self._node.create_subscription(
                    JointState,
                    topic,
                    lambda _: None,
                    _LATCHED,
                    callback_group=TakenHere(),
                    event_callbacks=SubscriptionEventCallbacks(use_default_callbacks=False),
                )
            return
        subscription = self._subscriptions[topic]
        for _ in range(_LATCHED.depth):
            taken = subscription.handle.take_message(subscription.msg_type, subscription.raw)
            if taken is None:
                return
            self._receive(topic, taken[0])

    def advice(self, missing: NotReadyError) -> str:
        """Returns an addition to the reason why a topic's message is missing: its publishers and their settings."""
        publishers = self._node.get_publishers_info_by_topic(missing.topic)
        if not publishers:
            return " (nobody publishes it)"
        if missing.topic not in self._topics:
            return ""
        if any(_latches(info.qos_profile) for info in publishers):
            sync = self._embodiment.sync_of(missing.topic)
            if missing.kind.startswith("older than") and sync.policy != "hold":
                return (
                    " (a publisher latches it: a state that is published only when it changes needs a joint_states "
                    "entry with the sync policy hold)"
                )
            return ""
        if missing.kind not in ("no message yet", "a joint is in no JointState yet"):
            return ""
        names = ", ".join(sorted({f"{info.node_namespace.rstrip('/')}/{info.node_name}" for info in publishers}))
        return (
            f" (published by {names}; what was sent once, before this node subscribed, is lost: it must be sent at a "
            "rate, or latched with transient_local durability)"
        )


def _latches(qos: QoSProfile) -> bool:
    return qos.durability == DurabilityPolicy.TRANSIENT_LOCAL and qos.reliability == ReliabilityPolicy.RELIABLE
