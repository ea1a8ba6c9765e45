# SPDX-License-Identifier: Apache-2.0
"""A UR5 with a gripper, a prefix, topics elsewhere and a live robot_description, driven over real DDS."""

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import rclpy
from diagnostic_msgs.msg import DiagnosticStatus
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState
from rclpy.qos import qos_profile_sensor_data
from ros_tools import NodeProcess, Peer, parameter_arguments, running, wait_for
from sensor_msgs.msg import CompressedImage, JointState
from std_msgs.msg import Float64, String
from trajectory_msgs.msg import JointTrajectory

from clp_ros.nodes.topics import LATCHED
from clp_ros.robots.embodiment import load_embodiment

# A policy that begins where the robot is, and moves the lift and the gripper beyond what the description allows.
NODE = """
import sys
import numpy as np
from clp_ros.nodes.policy import PolicyNode
from clp_ros.nodes.spin import main
from clp_ros.policies.registry import family_named
from clp_ros.policies.normalisation import Normalisation
from clp_ros.policies.lerobot_policy import LeRobotPolicy

class Beyond(LeRobotPolicy):
    chunk_size = 50
    image_features = ("observation.images.cam_front", "observation.images.cam_wrist")
    normalisation = Normalisation({}, {"observation.state": 7, "action": 7}, (), {}, None, frozenset())
    class checkpoint: path, family = "the checkpoint", family_named("smolvla")
    def __init__(self): pass
    def predict_chunk(self, images, state, task):
        chunk = np.repeat(state[None], self.chunk_size, axis=0)
        chunk[:, [1, 6]] += np.linspace(0, 1, self.chunk_size)[:, None] ** 2 * [0.06, 0.05]
        return chunk

sys.exit(main(lambda: PolicyNode(lambda folder, device: Beyond()), threads=1))
"""
PREFIX = "left_"
CAMERA = "/wrist/image/compressed"
EMBODIMENT = load_embodiment("ur5", PREFIX, {"cameras.cam_wrist": CAMERA, "joint_states.ur": "/left/joint_states"})
ARM, GRIPPER = (controller.topic for controller in EMBODIMENT.controllers.values())
NAMES = [joint.name for joint in EMBODIMENT.joints]
GRIPPER_URDF = (
    '<joint name="robotiq_85_left_knuckle_joint" type="revolute">'
    '<limit effort="1" lower="0.0" upper="0.12" velocity="0.5"/></joint></robot>'
)


def description(shared_data: Path) -> str:
    """The UR5e's own URDF, prefixed, with a gripper and a narrower lift."""
    text = (shared_data / "urdf" / "ur5e.urdf").read_text()
    text = text.replace("</robot>", GRIPPER_URDF).replace('joint name="', f'joint name="{PREFIX}')
    lift = text.index(f'joint name="{PREFIX}shoulder_lift_joint"')
    return text[:lift] + text[lift:].replace('upper="6.283185307179586"', 'upper="0.15"', 1)


@pytest.fixture
def robot(peer: Peer) -> Iterator[None]:
    """Publishes the robot's cameras and joints."""
    jpeg = cv2.imencode(".jpg", np.zeros((48, 64, 3), np.uint8))[1].tobytes()
    publishers = {
        topic: peer.node.create_publisher(
            JointState if kind.endswith("JointState") else CompressedImage, topic, qos_profile_sensor_data
        )
        for topic, kind in EMBODIMENT.topics.items()
    }
    speed = peer.node.create_publisher(Float64, EMBODIMENT.speed_scaling.topic, 10)
    end = threading.Event()

    def publish() -> None:
        while not end.wait(1 / 30):
            speed.publish(Float64(data=50.0))  # percent, as the driver has it
            for topic, publisher in publishers.items():
                message = JointState() if topic.endswith("joint_states") else CompressedImage(format="jpeg")
                message.header.stamp.sec, message.header.stamp.nanosec = divmod(time.time_ns(), 10**9)
                if isinstance(message, JointState):
                    # Alphabetical, as joint_state_broadcaster has them.
                    message.name, message.position = sorted(NAMES), [0.1] * len(NAMES)
                else:
                    message.data.frombytes(jpeg)
                publisher.publish(message)

    thread = threading.Thread(target=publish)
    thread.start()
    yield
    end.set()
    thread.join()


RIGHT = {
    "embodiment": "ur5",
    "task": "serve_napkin",
    "tf_prefix": PREFIX,
    "topics": [f"cameras.cam_wrist:={CAMERA}", "joint_states.ur:=/left/joint_states"],
    "robot_description_wait": 20.0,
}


class Node:
    """The policy node as a process, and what it says and sends."""

    def __init__(self, peer: Peer, tmp_path: Path, **parameters: Any) -> None:
        given = {"checkpoint": tmp_path, **RIGHT, "topics": json.dumps(RIGHT["topics"]), **parameters}
        self._command = ["-c", NODE, *parameter_arguments(given)]
        self._peer, self._log_path = peer, tmp_path / "log.txt"
        self.sent = {topic: peer.hear(JointTrajectory, topic) for topic in (ARM, GRIPPER)}
        self.statuses = peer.hear_diagnostics("policy")

    def run(self) -> Any:
        return running(self._command, self._log_path)

    def change(self, transition: int) -> bool:
        request = ChangeState.Request(transition=Transition(id=transition))
        return self._peer.call(ChangeState, "/policy/change_state", request).success

    def refusal(self, process: NodeProcess) -> str:
        """Configures it; the line in which it refuses that, which is its status too."""
        before, heard = process.log, len(self.statuses)
        assert not self.change(Transition.TRANSITION_CONFIGURE)
        (line,) = [line for line in process.log.removeprefix(before).splitlines() if "not configured" in line]

        def told() -> bool:  # its state first, "configuring" or "unconfigured"
            new = [status for status in self.statuses[heard:] if status.level == DiagnosticStatus.ERROR]
            return any(status.message.partition(": ")[2] in line for status in new)

        wait_for(told, "the fault on /diagnostics")
        assert "Traceback" not in process.log
        return line


@pytest.fixture
def publish_description(peer: Peer) -> Any:
    def publish(text: str, topic: str = "/left/robot_description") -> None:
        peer.node.create_publisher(String, topic, LATCHED).publish(String(data=text))

    return publish


def test_a_ur5_with_a_prefix_is_driven_within_its_description(
    peer: Peer, robot: None, publish_description: Any, shared_data: Path, tmp_path: Path
) -> None:
    publish_description(description(shared_data))
    node = Node(peer, tmp_path, controller_wait=20.0)
    controllers = {}
    for name in (topic.split("/")[1] for topic in (ARM, GRIPPER)):
        controller = controllers[name] = rclpy.node.Node(name, context=peer.node.context)
        controller.declare_parameter("joints", [name.removeprefix(PREFIX) for name in NAMES[:6]])
        controller.declare_parameter("interpolate_from_desired_state", False)
        peer.node.executor.add_node(controller)
    with node.run() as process:
        assert node.change(Transition.TRANSITION_CONFIGURE)
        assert "limits are narrowed to those of /left/robot_description" in process.log
        assert "arm, left_shoulder_lift_joint: upper 6.28318 -> 0.15" in process.log
        assert "gripper, left_robotiq_85_left_knuckle_joint: upper 0.8 -> 0.12" in process.log
        # The controllers' own parameters are compared with the embodiment when activating.
        assert not node.change(Transition.TRANSITION_ACTIVATE)
        assert "the controller has no joint 'left_elbow_joint'" in process.log
        for controller, names in zip(controllers.values(), (NAMES[5::-1], NAMES[6:]), strict=True):
            controller.set_parameters([rclpy.Parameter("joints", value=names)])
        assert node.change(Transition.TRANSITION_ACTIVATE)
        assert process.log.count("add `interpolate_from_desired_state: true`") == len(controllers)
        wait_for(lambda: all(node.sent.values()), "trajectories for the arm and for the gripper")
        arm, gripper = (node.sent[topic][0] for topic in (ARM, GRIPPER))
        assert (list(arm.joint_names), list(gripper.joint_names)) == (NAMES[:6], NAMES[6:])
        for message, joint, limit in ((arm, 1, 0.15), (gripper, 0, 0.12)):
            positions = [point.positions[joint] for point in message.points]
            assert 0.1 < max(positions) <= limit + 1e-9
        assert min(min(point.positions) for point in (*arm.points, *gripper.points)) == pytest.approx(0.1, abs=1e-3)
        values = wait_for(lambda: [s.values for s in node.statuses if len(s.values) > 3], "its diagnostics")[-1]
        assert f"{CAMERA} rate (Hz)" in values
        assert values["speed scaling"] == "0.5"
        assert process.stop() == 0


def test_without_a_description_the_embodiment_holds_alone(peer: Peer, tmp_path: Path) -> None:
    node = Node(peer, tmp_path, robot_description_wait=0.5)
    with node.run() as process:
        assert node.change(Transition.TRANSITION_CONFIGURE)
        wanted = "no description on /left/robot_description within 0.5 s: the embodiment's limits hold alone"
        wait_for(lambda: wanted in process.log, "the warning")


def test_what_does_not_fit_is_refused_with_both_sides(
    peer: Peer, publish_description: Any, shared_data: Path, tmp_path: Path
) -> None:
    publish_description(description(shared_data))
    node = Node(peer, tmp_path)
    other = {"embodiment": "aloha_single", "task": "block_stacking", "tf_prefix": "", "topics": [""]}
    with node.run() as process:
        for change, *words in (
            ({"tf_prefix": ""}, "ur5 has a joint 'shoulder_pan_joint'", "'left_shoulder_pan_joint'", "tf_prefix"),
            ({"task": "fold_shorts"}, "the task is for aloha_bimanual, but the robot is ur5"),
            ({"topics": ["cameras.cam_wrist"]}, "the parameter topics has 'cameras.cam_wrist'", "ENTRY:=TOPIC"),
            ({"robot_description_wait": -1.0}, "the parameter robot_description_wait is -1.0"),
            (
                other | {"robot_description_wait": 0.0},
                "the policy's cameras are observation.images.cam_front, observation.images.cam_wrist",
                "aloha_single has observation.images.cam_high, observation.images.cam_right_wrist",
            ),
        ):
            assert not any(peer.set_parameters("/policy", **(RIGHT | change)))
            line = node.refusal(process)
            for word in words:
                assert word in line
        assert not any(node.sent.values())


def test_a_task_longer_than_the_chunk_is_refused_with_both_sides(peer: Peer, tmp_path: Path) -> None:
    task = tmp_path / "long.yaml"
    task.write_text("instruction: Wave.\nembodiment: ur5\nexecution_length: 51\n")
    node = Node(peer, tmp_path, task=task, robot_description_wait=0.0)
    with node.run() as process:
        line = node.refusal(process)
    assert "every 51 control steps by the task's execution_length, but the policy's chunks have 50" in line
