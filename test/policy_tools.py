# SPDX-License-Identifier: Apache-2.0
"""Shared by the tests of the policy node: a robot's inputs, a policy that fails on demand, and their driver."""

import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Self

import cv2
import numpy as np
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState, GetState
from rclpy.qos import QoSProfile, qos_profile_sensor_data
from ros_tools import NodeProcess, Peer, parameter_arguments, running, wait_for
from rosgraph_msgs.msg import Clock
from scipy.interpolate import CubicHermiteSpline
from sensor_msgs.msg import CompressedImage, JointState
from std_msgs.msg import String
from trajectory_msgs.msg import JointTrajectory

from clp_ros.robots.embodiment import Embodiment

# The node with a policy that answers with the state it saw, grippers opening, and moves or misbehaves as its task says.
NODE = """
import sys, time
import numpy as np
from clp_ros.core.errors import ClpError
from clp_ros.nodes.policy import PolicyNode
from clp_ros.nodes.spin import main

class OutOfMemoryError(RuntimeError): ...  # as torch has it

class Echo:
    chunk_size = 100
    def check_features(self, features, action_size, whose):
        if action_size != 14:
            raise ClpError("the policy has 14 joints", where=whose)
    def predict_chunk(self, images, state, task):
        assert [image.shape for image in images.values()] == [(48, 64, 3)] * 3
        when = time.time() + 0.02 * np.arange(1, self.chunk_size + 1)
        if "raise" in task: raise KeyError("a model may raise anything")
        if "exit" in task: sys.exit("a library gives up")
        if "cuda" in task: raise RuntimeError("CUDA error: device-side assert triggered")
        if "memory" in task: raise OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        if "slow" in task: time.sleep(1.2)
        if "hang" in task: time.sleep(2.2)
        chunk = np.repeat(state[None], self.chunk_size, axis=0)
        chunk[:, [6, 13]] = np.linspace(0.5, 1.0, self.chunk_size)[:, None]
        if "wave" in task: chunk[:, [0, 7]] += 0.15 * np.stack([np.sin(np.pi * when), np.cos(np.pi * when)], axis=1)
        if "threads" in task:
            import torch
            print("the policy's thread has", torch.get_num_threads(), "threads of torch", flush=True)
        if "nan" in task: chunk[3, 2] = np.nan
        if "inf" in task: chunk[5, 8] = np.inf
        if "narrow" in task: chunk = chunk[:, :13]
        if "far" in task: chunk[:, [6, 13]] = 100.0
        if "jump" in task: chunk[:, 1] += 0.5
        if "leap" in task: chunk[5:, 7] += 3.0
        if "rush" in task: chunk[:, 0] += 0.2 * np.sin(10 * np.pi * when)
        if "turn" in task: chunk[:, [0, 7]] += 0.006 * np.arange(1, self.chunk_size + 1)[:, None]
        if "late" in task: time.sleep(0.5); chunk = chunk[:5]
        return chunk

def load(folder, device):
    if folder.name == "slow": time.sleep(2.5)
    if folder.name == "broken": raise RuntimeError("not a fault of the user's")
    return Echo()

sys.exit(main(lambda: PolicyNode(load), threads=1, last_words=PolicyNode.brake))
"""
TASK = "fold the shorts"
SENT_TOPICS = [
    "/follower_left/arm_controller/joint_trajectory",
    "/follower_left/gripper_controller/joint_trajectory",
    "/follower_right/arm_controller/joint_trajectory",
    "/follower_right/gripper_controller/joint_trajectory",
]
ARM = ["waist", "shoulder", "elbow", "forearm_roll", "wrist_angle", "wrist_rotate"]
LEFT = dict(zip(ARM, [0.1, -0.2, 0.3, -0.4, 0.5, -0.6], strict=True)) | {"left_finger": 0.03}
RIGHT = dict(zip(ARM, [-0.15, -0.25, -0.35, 0.45, 0.55, 0.65], strict=True)) | {"left_finger": 0.05}
MS = 10**6
# Nothing is sent in so long: several chunks at the fastest pace.
QUIET_S = 1.0


class SimulatedClock:
    """Publishes /clock at 100 Hz: the computer's own time, and an offset that a test may change."""

    def __init__(self, peer: Peer) -> None:
        self.offset_ns = 0
        self._publisher = peer.node.create_publisher(Clock, "/clock", 10)
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def __call__(self) -> int:
        """The time, nanoseconds."""
        return time.time_ns() + self.offset_ns

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._end.wait(0.01):
            message = Clock()
            message.clock.sec, message.clock.nanosec = divmod(self(), 10**9)
            self._publisher.publish(message)


class Robot:
    """Publishes the inputs of the bimanual ALOHA, 30 Hz, and can lose or spoil each.

    Attributes:
        positions: Of every joint, by the topic of its JointStates.
        spoil: By topic: changes each message before it is published, or loses it where it gives False.
    """

    def __init__(self, peer: Peer, embodiment: Embodiment, clock: Callable[[], int] = time.time_ns) -> None:
        self._node = peer.node
        self._clock = clock
        picture = np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8)
        self._jpeg = cv2.imencode(".jpg", picture)[1].tobytes()
        # A camera driver's quality, and a joint_state_broadcaster's.
        self._cameras = {
            camera.topic: self._node.create_publisher(CompressedImage, camera.topic, qos_profile_sensor_data)
            for camera in embodiment.cameras.values()
        }
        self._joints = {
            states.topic: self._node.create_publisher(JointState, states.topic, QoSProfile(depth=1))
            for states in embodiment.joint_states.values()
        }
        self.positions = dict(zip(self._joints, (LEFT, RIGHT), strict=True))
        self.spoil: dict[str, Callable[[Any], bool | None]] = {}
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._end.wait(1 / 30):
            stamp = divmod(self._clock(), 10**9)
            for topic, publisher in (self._cameras | self._joints).items():
                message = CompressedImage(format="jpeg") if topic in self._cameras else JointState()
                message.header.stamp.sec, message.header.stamp.nanosec = stamp
                if topic in self._cameras:
                    message.data.frombytes(self._jpeg)
                else:
                    # As Interbotix has it: other joints too, in another order.
                    joints = {"gripper": 1.0, "right_finger": -0.03} | dict(reversed(self.positions[topic].items()))
                    message.name, message.position = list(joints), list(joints.values())
                if (spoil := self.spoil.get(topic)) is None or spoil(message) is not False:
                    publisher.publish(message)


class Driver:
    """Takes the node through its life and hears what it sends."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer
        self.sent = {topic: peer.hear(JointTrajectory, topic, 100) for topic in SENT_TOPICS}
        self.statuses = peer.hear_diagnostics("policy")
        self._tasks = peer.node.create_publisher(String, "/policy/task", 1)

    def change(self, transition: int) -> bool:
        request = ChangeState.Request(transition=Transition(id=transition))
        return self._peer.call(ChangeState, "/policy/change_state", request).success

    @property
    def state(self) -> str:
        return self._peer.call(GetState, "/policy/get_state").current_state.label

    def up(self) -> None:
        assert self.change(Transition.TRANSITION_CONFIGURE)
        assert self.change(Transition.TRANSITION_ACTIVATE)

    def set_task(self, text: str) -> None:
        wait_for(lambda: self._tasks.get_subscription_count(), "the node's task topic")
        self._tasks.publish(String(data=text))

    @property
    def count(self) -> int:
        return sum(len(received) for received in self.sent.values())

    def last(self) -> dict[str, JointTrajectory]:
        """The newest message of every topic."""
        return {topic: received[-1] for topic, received in self.sent.items()}

    def expect_chunks(self) -> None:
        """Waits for two more chunks on every topic."""
        before = {topic: len(received) for topic, received in self.sent.items()}
        wait_for(lambda: all(len(self.sent[topic]) >= before[topic] + 2 for topic in SENT_TOPICS), "chunks")

    def expect_motion(self) -> None:
        """Waits for two more chunks, and until the first moments, whose points are not sent, are over."""
        self.expect_chunks()
        wait_for(
            lambda: all(knots(message)[0][0] - stamp_ns(message) < 50 * MS for message in self.last().values()),
            "chunks that the robot follows already",
        )

    def expect_quiet(self, seconds: float = QUIET_S) -> None:
        time.sleep(0.2)  # what was under way
        before = self.count
        time.sleep(seconds)
        assert self.count == before

    def expect_status(self, level: bytes, *words: str) -> dict[str, str]:
        """Waits for a new status of a level whose message has all words; returns its values."""
        start = len(self.statuses)

        def found() -> list[dict[str, str]]:
            new = self.statuses[start:]
            return [s.values | {"": s.message} for s in new if s.level == level and all(w in s.message for w in words)]

        try:
            return wait_for(found, f"a status with {words}", 20)[0]
        except TimeoutError as error:
            received = [(status.level, status.message) for status in self.statuses[start:]]
            raise AssertionError(f"{error}; heard {received}") from error


def start_node(
    folder: Path, command: tuple[str, ...] = ("-c", NODE), **parameters: Any
) -> AbstractContextManager[NodeProcess]:
    """The policy node as a process, with a folder for its checkpoint and its log."""
    given = {"checkpoint": folder, "embodiment": "aloha_bimanual", "task": TASK, "replan_steps": 0}
    given |= {"robot_description_wait": 0.0} | parameters  # the robot here has none, see test_robot_description.py
    return running([*command, *parameter_arguments(given)], folder / "log.txt")


def stamp_ns(message: Any) -> int:
    """A message's stamp."""
    return message.header.stamp.sec * 10**9 + message.header.stamp.nanosec


def knots(message: JointTrajectory) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Times (ns, on the robot's clock), positions and velocities of a message's points."""
    starts = [point.time_from_start for point in message.points]
    times = np.array([stamp_ns(message) + start.sec * 10**9 + start.nanosec for start in starts])
    positions, speeds = (np.array([getattr(p, of) for p in message.points]) for of in ("positions", "velocities"))
    return times, positions, speeds


def assert_continues(message: JointTrajectory, before: JointTrajectory) -> None:
    """A message begins where, and as fast as, the controllers are by the one before it; and it ends at rest."""
    old_times, old, old_speeds = knots(before)
    times, positions, speeds = knots(message)
    splice = min(times[0], old_times[-1])  # at rest, once the old one has ended
    expected = CubicHermiteSpline((old_times - splice) / 1e9, old, old_speeds)
    np.testing.assert_allclose(positions[0], expected(0.0), atol=1e-6)
    np.testing.assert_allclose(speeds[0], expected(0.0, nu=1), atol=1e-5)
    assert not speeds[-1].any()
