# SPDX-License-Identifier: Apache-2.0
"""A UR's driver, its gripper's and a mobile base's on one /joint_states, over real DDS: no chunk is lost by it.

CLP_ROS_SHARED_TOPIC_SECONDS says how long the robot is driven, 4 s if it is not set; the figure of record is of 60 s.
"""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState
from ros_tools import NodeProcess, Peer, parameter_arguments, running, wait_for

SECONDS = float(os.environ.get("CLP_ROS_SHARED_TOPIC_SECONDS", "4"))
CAMERA_HZ = 30
# The drivers send one after the other, at their own rate; each has a publisher of its own, as processes have.
ROBOT = """
import sys, time
import cv2, numpy as np, rclpy
from rclpy.qos import qos_profile_sensor_data
from sensor_msgs.msg import CompressedImage, JointState
from clp_ros.robots.embodiment import load_embodiment

rate_hz, camera_hz = map(float, sys.argv[1:])
embodiment = load_embodiment("ur5")
names = [joint.name for joint in embodiment.joints]
wheels = ["front_left_wheel", "front_right_wheel"]
jpeg = cv2.imencode(".jpg", np.zeros((48, 64, 3), np.uint8))[1].tobytes()
rclpy.init()
node = rclpy.create_node("robot")
parts = [(part, node.create_publisher(JointState, "/joint_states", 10)) for part in (names[:6], names[6:], wheels)]
cameras = [
    node.create_publisher(CompressedImage, camera.topic, qos_profile_sensor_data)
    for camera in embodiment.cameras.values()
]
began, frames = time.monotonic(), 0
for count in range(10**9):
    stamp = divmod(time.time_ns(), 10**9)
    if (time.monotonic() - began) * camera_hz >= frames:
        frames += 1
        for camera in cameras:
            picture = CompressedImage(format="jpeg")
            picture.header.stamp.sec, picture.header.stamp.nanosec = stamp
            picture.data.frombytes(jpeg)
            camera.publish(picture)
    for part, publisher in parts:
        message = JointState(name=part, position=[0.1] * len(part))
        if part is not wheels:  # whose driver stamps nothing
            message.header.stamp.sec, message.header.stamp.nanosec = stamp
        publisher.publish(message)
    time.sleep(max(0.0, began + (count + 1) / rate_hz - time.monotonic()))
"""
NODE = """
import sys
import numpy as np
from clp_ros.nodes.policy import PolicyNode
from clp_ros.nodes.spin import main

class Stay:
    chunk_size = 50
    def check_features(self, *_): pass
    def predict_chunk(self, images, state, task):
        return np.repeat(state[None], self.chunk_size, axis=0)

sys.exit(main(lambda: PolicyNode(lambda folder, device: Stay()), threads=1))
"""
LOST = ("safe stops", "late", "dropped stale", "refused", "faults", "/joint_states dropped")


@pytest.fixture(params=[50, 500])
def robot(request: pytest.FixtureRequest, ros_domain: int, tmp_path: Path) -> Iterator[int]:
    arguments = ["-c", ROBOT, str(request.param), str(CAMERA_HZ)]
    with running(arguments, tmp_path / "robot.txt"):
        yield request.param


@pytest.fixture
def node(robot: int, tmp_path: Path) -> Iterator[NodeProcess]:
    given = {"checkpoint": tmp_path, "embodiment": "ur5", "task": "serve_napkin", "replan_steps": 0}
    given |= {"robot_description_wait": 0.0}
    with running(["-c", NODE, *parameter_arguments(given)], tmp_path / "log.txt") as process:
        yield process


def test_no_chunk_is_lost_where_the_arm_and_its_gripper_share_a_topic(
    robot: int, node: NodeProcess, peer: Peer, record_property: Callable[[str, object], None]
) -> None:
    statuses = peer.hear_diagnostics("policy")
    for transition in (Transition.TRANSITION_CONFIGURE, Transition.TRANSITION_ACTIVATE):
        request = ChangeState.Request(transition=Transition(id=transition))
        assert peer.call(ChangeState, "/policy/change_state", request).success, node.log
    wait_for(lambda: statuses and int(statuses[-1].values.get("chunks", "0")) > 0, "chunks")
    first, began = statuses[-1].values, time.monotonic()
    time.sleep(SECONDS)
    count = len(statuses)
    wait_for(lambda: len(statuses) > count, "the next status")
    last, seconds = statuses[-1].values, time.monotonic() - began
    assert {name: int(last.get(name, "0")) for name in LOST} == dict.fromkeys(LOST, 0), node.log
    chunks = int(last["chunks"]) - int(first["chunks"])
    # Every set of frames becomes one; a busy machine may put off some.
    assert chunks >= 0.8 * CAMERA_HZ * (seconds - 1.5)
    record_property("chunks", f"{chunks} in {seconds:.0f} s at {robot} Hz")
    assert float(last["/joint_states rate (Hz)"]) == pytest.approx(3 * robot, rel=0.1)
    assert float(last["age /joint_states p99 (ms)"]) < 1.5e3 / robot + 15
