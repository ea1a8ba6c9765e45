# SPDX-License-Identifier: Apache-2.0
"""The thread that takes a node's inputs, over real DDS."""

import threading
import time
from collections.abc import Iterator

import pytest
import rclpy
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import QoSProfile, qos_profile_sensor_data
from ros_tools import Peer, wait_for
from std_msgs.msg import Int64, String

from clp_ros.nodes.listener import Listener, published_otherwise

KINDS = {"/numbers": Int64, "/words": String}
NAMES = {"/numbers": "std_msgs/msg/Int64", "/words": "std_msgs/msg/String"}


@pytest.fixture
def peer(ros_domain: int) -> Iterator[Peer]:
    with Peer(ros_domain) as peer:
        yield peer


@pytest.fixture
def node(ros_domain: int) -> Iterator[Node]:
    context = rclpy.Context()
    rclpy.init(args=[], context=context, domain_id=ros_domain)
    node = Node("listening", context=context)
    yield node
    node.destroy_node()
    rclpy.try_shutdown(context=context)


def test_it_hears_all_topics_in_order_in_one_thread_and_a_fault_does_not_end_it(
    node: Node, peer: Peer, capfd: pytest.CaptureFixture[str]
) -> None:
    received: dict[str, list[object]] = {topic: [] for topic in KINDS}
    threads = set()

    def receive(topic: str, message: Int64 | String) -> None:
        threads.add(threading.get_ident())
        if message.data == 3:
            raise KeyError("a fault of the receiver's")
        received[topic].append(message.data)

    listener = Listener(node, KINDS, QoSProfile(depth=10), receive)
    publishers = {topic: peer.node.create_publisher(kind, topic, 10) for topic, kind in KINDS.items()}
    wait_for(lambda: all(one.get_subscription_count() for one in publishers.values()), "the subscriptions")
    for number in range(6):
        publishers["/numbers"].publish(Int64(data=number))
        publishers["/words"].publish(String(data=str(number)))
    wait_for(lambda: len(received["/numbers"]) == 5 and len(received["/words"]) == 6, "the messages")
    assert received == {"/numbers": [0, 1, 2, 4, 5], "/words": list("012345")}
    assert len(threads) == 1
    assert threads != {threading.get_ident()}
    said = capfd.readouterr().err
    assert "a message of /numbers was lost" in said
    assert "a fault of the receiver's" in said

    listener.close()
    assert not peer.node.get_subscriptions_info_by_topic("/numbers") or wait_for(
        lambda: not peer.node.get_subscriptions_info_by_topic("/numbers"), "the subscription's end"
    )
    publishers["/numbers"].publish(Int64(data=6))
    time.sleep(0.2)
    assert received["/numbers"][-1] == 5


def test_the_executor_leaves_its_messages_alone(node: Node, peer: Peer) -> None:
    received: list[int] = []
    listener = Listener(node, {"/numbers": Int64}, qos_profile_sensor_data, lambda _, message: received.append(message))
    executor = SingleThreadedExecutor(context=node.context)
    executor.add_node(node)
    waited: list[bool] = []  # whether the executor found nothing to do
    publisher = peer.node.create_publisher(Int64, "/numbers", qos_profile_sensor_data)
    wait_for(publisher.get_subscription_count, "the subscription")
    executor.spin_once(timeout_sec=0.2)  # what is left of starting
    deadline = time.monotonic() + 20.0
    while time.monotonic() < deadline and len(received) < 50:
        publisher.publish(Int64(data=len(waited)))
        began = time.monotonic()
        executor.spin_once(timeout_sec=0.01)
        waited.append(time.monotonic() - began >= 0.009)
    assert len(received) == 50
    assert sum(waited) >= 0.8 * len(waited)
    listener.close()


def test_a_topic_of_another_type_is_reported(node: Node, peer: Peer) -> None:
    assert published_otherwise(node, "/numbers", NAMES) == ""
    publisher = peer.node.create_publisher(String, "/numbers", 10)
    wait_for(lambda: node.get_publishers_info_by_topic("/numbers"), "the publisher")
    said = " (it is published as std_msgs/msg/String, not as std_msgs/msg/Int64)"
    assert published_otherwise(node, "/numbers", NAMES) == said
    peer.node.destroy_publisher(publisher)


def test_a_remapped_topic_keeps_the_name_it_was_asked_for(ros_domain: int, peer: Peer) -> None:
    context = rclpy.Context()
    rclpy.init(args=["--ros-args", "-r", "/numbers:=/camera_3/numbers"], context=context, domain_id=ros_domain)
    node, received = Node("listening", context=context), []
    listener = Listener(node, {"/numbers": Int64}, QoSProfile(depth=10), lambda topic, _: received.append(topic))
    publisher = peer.node.create_publisher(Int64, "/camera_3/numbers", 10)
    wait_for(publisher.get_subscription_count, "the subscription")
    publisher.publish(Int64())
    wait_for(lambda: received == ["/numbers"], "the message")
    listener.close()
    node.destroy_node()
    rclpy.shutdown(context=context)


def test_it_ends_with_ros(node: Node) -> None:
    listener = Listener(node, KINDS, qos_profile_sensor_data, lambda *_: None)
    rclpy.shutdown(context=node.context)
    listener.close()
    assert "listener" not in [thread.name for thread in threading.enumerate()]
