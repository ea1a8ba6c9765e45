# SPDX-License-Identifier: Apache-2.0
"""The simulation as users have it: a process of its own behind the real robot's topics, over real DDS."""

import importlib.util
from array import array
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import yaml
from rclpy.duration import Duration
from rclpy.qos import qos_profile_sensor_data
from ros_tools import NodeProcess, Peer, running, wait_for
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import CompressedImage, JointState
from std_msgs.msg import Bool, String
from std_srvs.srv import Trigger
from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

from clp_ros.core.resources import resource_path
from clp_ros.nodes.controllers import ControllerNodes
from clp_ros.nodes.simulation import PARAMETERS
from clp_ros.nodes.topics import LATCHED
from clp_ros.robots.embodiment import load_embodiment
from clp_ros.robots.urdf_limits import read_limits

EMBODIMENT = load_embodiment("ur5")
NAMES = [joint.name for joint in EMBODIMENT.joints]
ARM = EMBODIMENT.controllers["arm"]


@pytest.fixture
def options() -> str:
    return ""


@pytest.fixture
def simulation(ros_domain: int, tmp_path: Path, options: str) -> Iterator[NodeProcess]:
    if not all(importlib.util.find_spec(package) for package in ("mujoco", "gym_aloha")):
        pytest.skip("the simulation's packages are in requirements-simulation.txt")
    command = f"-m clp_ros.cli simulate --embodiment ur5 --rate 4 --pictures plain {options}"
    with running(command.split(), tmp_path / "simulation.log") as process:
        wait_for(lambda: "simulating ur5" in process.log or process.process.poll() is not None, "the simulation")
        yield process


def trajectory(positions: list[float], seconds: float, **more: list[float]) -> JointTrajectory:
    point = JointTrajectoryPoint(positions=positions, time_from_start=Duration(seconds=seconds).to_msg(), **more)
    return JointTrajectory(joint_names=NAMES[:6], points=[point])


def test_it_is_the_robot(simulation: NodeProcess, peer: Peer) -> None:
    states = peer.hear(JointState, EMBODIMENT.joint_states["ur"].topic)
    pictures = peer.hear(CompressedImage, EMBODIMENT.cameras["cam_wrist"].topic, qos_profile_sensor_data)
    times = peer.hear(Clock, "/clock", qos_profile_sensor_data)
    publisher = peer.node.create_publisher(JointTrajectory, ARM.topic, 1)
    descriptions = peer.hear(String, "/robot_description", LATCHED)
    received = (states, pictures, times, descriptions)
    wait_for(lambda: all(received) and publisher.get_subscription_count(), "the robot's topics")
    assert read_limits(descriptions[0].data, "/robot_description").keys() >= set(NAMES)
    assert list(states[0].name) == NAMES
    home = np.array(states[0].position)
    picture = cv2.imdecode(np.frombuffer(pictures[0].data, np.uint8), cv2.IMREAD_COLOR)
    assert picture.shape == (480, 640, 3)
    assert 1 <= states[0].header.stamp.sec < 1000  # its own clock
    assert 1 <= times[0].clock.sec < 1000

    # Each controller's node answers for its parameters, as the policy node asks when it is activated.
    logged: list[str] = []
    peer.node.declare_parameter("controller_wait", 20.0)
    peer.node.get_logger = lambda: SimpleNamespace(warning=logged.append, info=logged.append)
    asking = ControllerNodes(peer.node, EMBODIMENT)
    facts = asking.check(lambda: False)
    asking.close()
    assert {name: one.joints for name, one in facts.items()} == {"arm": tuple(NAMES[:6]), "gripper": tuple(NAMES[6:])}
    assert {(one.from_desired, one.moving_end, one.interpolation) for one in facts.values()} == {
        (True, False, "splines")
    }
    assert logged == []

    goal = home[:6] + 0.2
    publisher.publish(trajectory(list(goal), 1.0))
    wait_for(lambda: np.abs(np.array(states[-1].position)[:6] - goal).max() < 0.01, "the goal")
    publisher.publish(trajectory(list(home[:6]), 1.0, velocities=[0.1] * 6))  # does not end at rest
    wait_for(lambda: "arm drops a trajectory: the trajectory does not end at rest" in simulation.log, "a rejection")
    assert np.abs(np.array(states[-1].position)[:6] - goal).max() < 0.01

    assert peer.call(Trigger, "/simulation/reset").message == "seed 1"
    wait_for(lambda: np.abs(np.array(states[-1].position) - home).max() < 0.01, "home")
    assert isinstance(states[-1].velocity, array)
    assert simulation.stop() == 0
    assert "Traceback" not in simulation.log


@pytest.mark.parametrize("options", ["--task pick_and_lift --seed 3"])
def test_a_task_has_its_instruction_and_its_success(simulation: NodeProcess, peer: Peer) -> None:
    from clp_ros.simulation.episode import ExpertPolicy, play_episode
    from clp_ros.simulation.task_registry import simulated_task
    from clp_ros.simulation.task_simulation import TaskSimulation

    local = TaskSimulation(EMBODIMENT, simulated_task("pick_and_lift", EMBODIMENT), 3)
    told = local.instruction()
    actions = np.array([command for _, command in play_episode(local, ExpertPolicy(local), 3)])
    assert local.success_s is not None
    instructions = peer.hear(String, "/simulation/instruction", LATCHED)
    successes = peer.hear(Bool, "/simulation/success", LATCHED)
    publishers = {
        name: peer.node.create_publisher(JointTrajectory, controller.topic, 1)
        for name, controller in EMBODIMENT.controllers.items()
    }
    connected = (one.get_subscription_count() for one in publishers.values())
    wait_for(lambda: instructions and successes and all(connected), "the task's topics")
    assert instructions[0].data == told
    assert not successes[0].data

    start = 0
    for name, controller in EMBODIMENT.controllers.items():
        part = actions[:, start : start + len(controller.joints)]
        start += len(controller.joints)
        points = [
            JointTrajectoryPoint(positions=row, time_from_start=Duration(seconds=0.02 * step).to_msg())
            for step, row in enumerate(part.tolist(), 1)
        ]
        names = [joint.name for joint in controller.joints]
        publishers[name].publish(JointTrajectory(joint_names=names, points=points))
    wait_for(lambda: successes[-1].data, "the success of the expert's motion")

    reset = peer.call(Trigger, "/simulation/reset")
    assert reset.message == "seed 4"
    wait_for(lambda: len(instructions) == 2 and not successes[-1].data, "the next start")
    local.reset(4)
    assert instructions[1].data == local.instruction()


def test_wrong_parameters_are_reported_in_one_line(ros_domain: int, tmp_path: Path) -> None:
    for arguments, reported in (
        ("embodiment:=ur6", "unknown embodiment 'ur6'"),
        ("embodiment:=ur5 -p rate:=2.0", "set clock to true as well"),
        ("embodiment:=ur5 -p pictures:=rendered", "did you mean 'render'"),
        ("embodiment:=ur5 -p camera_rate:=0.0", "give a number above 0"),
    ):
        command = ["-m", "clp_ros.nodes.simulation", "--ros-args", "-p", *arguments.split()]
        with running(command, tmp_path / "log") as process:
            assert process.process.wait(60) == 1
            assert reported in process.log
            assert "Traceback" not in process.log


def test_the_parameter_file_has_all_parameters_and_their_defaults() -> None:
    document = yaml.safe_load(resource_path("config/nodes/simulation.yaml").read_text())
    assert document == {"/**": {"ros__parameters": {name: default for name, (default, _) in PARAMETERS.items()}}}
