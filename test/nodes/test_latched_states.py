# SPDX-License-Identifier: Apache-2.0
"""A gripper whose driver published its state once, before the policy node started, over real DDS."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import yaml
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState
from rclpy.qos import QoSProfile, qos_profile_sensor_data
from ros_tools import NodeProcess, Peer, parameter_arguments, running, wait_for
from sensor_msgs.msg import CompressedImage, JointState

from clp_ros.nodes.topics import LATCHED
from clp_ros.robots.embodiment import load_embodiment

UR5 = load_embodiment("ur5")
ARM, GRIPPER = ([joint.name for joint in UR5.controllers[name].joints] for name in ("arm", "gripper"))
HELD = "/gripper/joint_states"
VOLATILE = QoSProfile(depth=1)
NODE = """
import sys
import numpy as np
from clp_ros.nodes.policy import PolicyNode
from clp_ros.nodes.spin import main

class Stay:
    chunk_size = 50
    def check_features(self, *_): pass
    def predict_chunk(self, images, state, task):
        assert abs(state[6] - 0.5) < 1e-6  # the gripper's position, of its range
        return np.repeat(state[None], self.chunk_size, axis=0)

sys.exit(main(lambda: PolicyNode(lambda folder, device: Stay()), threads=1))
"""


def joint_state(names: list[str], position: float, age_s: float = 0.0) -> JointState:
    message = JointState(name=names, position=[position] * len(names))
    message.header.stamp.sec, message.header.stamp.nanosec = divmod(time.time_ns() - round(age_s * 1e9), 10**9)
    return message


@pytest.fixture
def robot(peer: Peer) -> Iterator[None]:
    """The arm and the cameras, which publish at a rate."""
    arm = peer.node.create_publisher(JointState, "/joint_states", 10)
    cameras = [
        peer.node.create_publisher(CompressedImage, camera.topic, qos_profile_sensor_data)
        for camera in UR5.cameras.values()
    ]
    jpeg = cv2.imencode(".jpg", np.zeros((48, 64, 3), np.uint8))[1].tobytes()
    end = threading.Event()

    def publish() -> None:
        while not end.wait(1 / 30):
            message = joint_state(ARM, 0.1)
            arm.publish(message)
            picture = CompressedImage(header=message.header, format="jpeg")
            picture.data.frombytes(jpeg)
            for camera in cameras:
                camera.publish(picture)

    thread = threading.Thread(target=publish)
    thread.start()
    yield
    end.set()
    thread.join()


@pytest.fixture
def node(robot: None, peer: Peer, tmp_path: Path) -> Iterator[Callable[..., NodeProcess]]:
    """Starts the policy node, with the gripper's state on a topic and by a sync policy, and configures it."""
    contexts = []

    def start(topic: str, policy: dict[str, Any]) -> NodeProcess:
        document = UR5.model_dump()
        document["joint_states"]["gripper"] = {"topic": topic, "sync": policy}
        document["controllers"]["gripper"]["joint_states"] = "gripper"
        (tmp_path / "ur.yaml").write_text(yaml.safe_dump(document))
        given = {"checkpoint": tmp_path, "embodiment": tmp_path / "ur.yaml", "task": "serve_napkin", "replan_steps": 0}
        given |= {"robot_description_wait": 0.0, "controller_wait": 0.0, "activate_timeout": 1.5}
        given |= {"max_faults": 0}
        contexts.append(running(["-c", NODE, *parameter_arguments(given)], tmp_path / "log.txt"))
        process = contexts[-1].__enter__()
        assert change(peer, Transition.TRANSITION_CONFIGURE), process.log
        return process

    yield start
    for context in contexts:
        context.__exit__(None, None, None)


def change(peer: Peer, transition: int) -> bool:
    request = ChangeState.Request(transition=Transition(id=transition))
    return peer.call(ChangeState, "/policy/change_state", request).success


def test_a_state_that_was_latched_before_the_node_started_is_received(
    peer: Peer, node: Callable[..., NodeProcess]
) -> None:
    latching = peer.node.create_publisher(JointState, HELD, LATCHED)
    latching.publish(joint_state(GRIPPER, 0.4, age_s=20.0))
    statuses = peer.hear_diagnostics("policy")
    process = node(HELD, {"policy": "hold", "stamp": "header"})
    assert change(peer, Transition.TRANSITION_ACTIVATE), process.log
    wait_for(lambda: statuses and int(statuses[-1].values.get("chunks", "0")) > 10, "chunks")
    assert statuses[-1].values["policy errors"] == "0"
    # The subscription for what is latched is not kept.
    assert len(peer.node.get_subscriptions_info_by_topic(HELD)) == 1
    # What is published later comes by the other one.
    latching.publish(joint_state(GRIPPER, 0.0))
    wait_for(lambda: any(status.values.get("policy errors", "0") != "0" for status in statuses), "another state")
    assert "incompatible" not in process.log


@pytest.mark.parametrize(
    ("qos", "policy", "words"),
    [
        (VOLATILE, {"policy": "hold", "stamp": "header"}, ("no message yet", "published by /peer", "transient_local")),
        (LATCHED, {"policy": "asof", "tolerance_ms": 50, "stamp": "header"}, ("ms old", "with the sync policy hold")),
        (None, {"policy": "hold", "stamp": "header"}, ("no message yet", "nobody publishes it")),
    ],
    ids=["sent once", "latched, but too old", "never"],
)
def test_a_state_that_cannot_be_used_is_named_with_what_to_do(
    peer: Peer, node: Callable[..., NodeProcess], qos: Any, policy: dict[str, Any], words: tuple[str, ...]
) -> None:
    if qos is not None:
        peer.node.create_publisher(JointState, HELD, qos).publish(joint_state(GRIPPER, 0.4, age_s=20.0))
    process = node(HELD, policy)
    assert not change(peer, Transition.TRANSITION_ACTIVATE)
    line = next(line for line in process.log.splitlines() if "not activated" in line)
    assert all(word in line for word in (HELD, *words)), line
    assert "Traceback" not in process.log
