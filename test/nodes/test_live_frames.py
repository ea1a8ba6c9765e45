# SPDX-License-Identifier: Apache-2.0
"""A demonstration's topics, those of its commands among them, over real DDS into a reservoir."""

import time
from collections.abc import Iterator

import numpy as np
import pytest
import rclpy
from builtin_interfaces.msg import Duration
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from robot_tools import EYE, STATES, document, sync
from ros_tools import Peer, spinning, wait_for
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import Float64MultiArray
from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

from clp_ros.datasets.reservoir import FrameReservoir
from clp_ros.nodes.live_frames import LiveFrames
from clp_ros.nodes.topics import LATCHED
from clp_ros.robots.embodiment import Embodiment

ARM, GRIPPER = "/arm/joint_trajectory", "/gripper/commands"


@pytest.fixture
def node(ros_domain: int) -> Iterator[Node]:
    context = rclpy.Context()
    rclpy.init(args=[], context=context, domain_id=ros_domain)
    node = Node("listening", context=context)
    executor = SingleThreadedExecutor(context=context)
    executor.add_node(node)
    with spinning(executor):
        yield node
    node.destroy_node()
    rclpy.try_shutdown(context=context)


def test_commands_are_received_with_the_inputs(node: Node, ros_domain: int) -> None:
    receive = sync(stamp="receive")
    topics = {
        "arm": {
            "topic": ARM,
            "type": "trajectory_msgs/msg/JointTrajectory",
            "controllers": ["arm"],
            "sync": receive,
        },
        "gripper": {
            "topic": GRIPPER,
            "type": "std_msgs/msg/Float64MultiArray",
            "joints": ["finger"],
            "sync": receive,
        },
    }
    embodiment = Embodiment.model_validate(document(receive, receive) | {"actions": {"topics": topics}})
    reservoir = FrameReservoir(embodiment, 5, 3)
    live = LiveFrames(node, reservoir, idle_timeout=60)
    point = JointTrajectoryPoint(positions=[4.0, 3.0], time_from_start=Duration(sec=0, nanosec=0))
    messages = {
        STATES: JointState(name=["waist", "elbow", "finger"], position=[1.0, 2.0, 0.03]),
        EYE: Image(encoding="rgb8", height=1, width=1, step=3, data=bytes(3)),
        ARM: JointTrajectory(joint_names=["elbow", "waist"], points=[point]),
        GRIPPER: Float64MultiArray(data=[0.05]),
    }
    with Peer(ros_domain) as peer:
        publishers = {topic: peer.node.create_publisher(type(one), topic, 10) for topic, one in messages.items()}
        wait_for(lambda: all(one.get_subscription_count() for one in publishers.values()), "the subscriptions")

        def publish() -> bool:
            for topic, message in messages.items():
                publishers[topic].publish(message)
            return reservoir.held == 5

        wait_for(publish, "five frames")
    assert live.finish() == 5
    assert set(reservoir.messages) == set(messages)
    for frame in reservoir.frames():
        assert np.allclose(frame.observation.state, [0.25, 1.0, 2.0])
        assert np.allclose(frame.action, [0.75, 3.0, 4.0])
        assert set(frame.action_stamps) == {ARM, GRIPPER}


def test_a_gripper_whose_state_was_latched_before_is_received(node: Node, ros_domain: int) -> None:
    receive = sync(stamp="receive")
    description = document(receive, receive)
    description["joint_states"]["gripper"] = {"topic": "/gripper/states", "sync": receive}
    description["controllers"]["gripper"]["joint_states"] = "gripper"
    reservoir = FrameReservoir(Embodiment.model_validate(description), 5, 3)
    with Peer(ros_domain) as peer:
        latching = peer.node.create_publisher(JointState, "/gripper/states", LATCHED)
        latching.publish(JointState(name=["finger"], position=[0.05]))
        arm, eye = (peer.node.create_publisher(kind, topic, 10) for kind, topic in ((JointState, STATES), (Image, EYE)))
        live = LiveFrames(node, reservoir, idle_timeout=60)
        deadline = time.monotonic() + 20

        def publish() -> None:
            assert time.monotonic() < deadline, reservoir.unusable
            arm.publish(JointState(name=["waist", "elbow"], position=[1.0, 2.0]))
            eye.publish(Image(encoding="rgb8", height=1, width=1, step=3, data=bytes(3)))
            if reservoir.held == 5:
                live.finish()

        live.wait(publish)
    assert all(np.allclose(frame.observation.state, [0.75, 1.0, 2.0]) for frame in reservoir.frames())
