# SPDX-License-Identifier: Apache-2.0
"""What the policy node asks of the robot's controllers, and what it makes of their answers, over real DDS."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import rclpy
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from ros_tools import Peer, spinning

from clp_ros.core.errors import ClpError
from clp_ros.nodes.controllers import ControllerFacts, ControllerNodes, node_name
from clp_ros.robots.embodiment import Embodiment, load_embodiment

PREFIX = "left_"
UR5 = load_embodiment("ur5", PREFIX)
ARM = [joint.name for joint in UR5.controllers["arm"].joints]
GRIPPER = [joint.name for joint in UR5.controllers["gripper"].joints]
# A joint_trajectory_controller's own defaults.
STOCK = {
    "interpolate_from_desired_state": False,
    "open_loop_control": False,
    "allow_nonzero_velocity_at_trajectory_end": False,
    "allow_partial_joints_goal": False,
    "interpolation_method": "splines",
}


class Logged(list):
    """Takes the place of a node's logger."""

    def warning(self, text: str) -> None:
        self.append(("warning", text))

    def info(self, text: str) -> None:
        self.append(("info", text))


@pytest.fixture
def asking(ros_domain: int) -> Iterator[Callable[..., tuple[ControllerNodes, Logged]]]:
    """A node of this process that asks."""
    rclpy.init(args=[], domain_id=ros_domain)
    node, logged = Node("policy"), Logged()
    node.get_logger = lambda: logged
    executor = SingleThreadedExecutor()
    executor.add_node(node)

    def make(wait_s: float, embodiment: Embodiment = UR5) -> tuple[ControllerNodes, Logged]:
        node.declare_parameter("controller_wait", wait_s)
        return ControllerNodes(node, embodiment), logged

    with spinning(executor):
        yield make
    node.destroy_node()
    rclpy.shutdown()


@pytest.fixture
def controller(peer: Peer) -> Iterator[Callable[..., None]]:
    """Starts a controller's node with parameters."""
    nodes: list[Node] = []

    def start(name: str, **parameters: Any) -> None:
        node = Node(name, context=peer.node.context, start_parameter_services=True)
        for key, value in parameters.items():
            node.declare_parameter(key, value)
        peer.node.executor.add_node(node)
        nodes.append(node)

    yield start
    for node in nodes:
        peer.node.executor.remove_node(node)
        node.destroy_node()


def never() -> bool:
    return False


def test_the_settings_are_read_and_the_advice_is_logged_once(asking: Any, controller: Any) -> None:
    controller("scaled_joint_trajectory_controller", **STOCK, joints=ARM[::-1])  # in another order
    controller("robotiq_gripper_controller", **STOCK | {"open_loop_control": True}, joints=GRIPPER)
    nodes, logged = asking(20.0)
    for _ in range(2):
        assert nodes.check(never) == {
            "arm": ControllerFacts(False, False, False, "splines", tuple(ARM[::-1])),
            "gripper": ControllerFacts(True, False, False, "splines", tuple(GRIPPER)),
        }
    ((level, text),) = logged
    assert level == "warning"
    assert "/scaled_joint_trajectory_controller" in text
    assert "`interpolate_from_desired_state: true`" in text
    nodes.close()


def test_a_controller_that_does_not_answer_is_noted_and_waited_for_no_longer(asking: Any, controller: Any) -> None:
    # A node that is no joint_trajectory_controller answers, but has none of the parameters.
    controller("robotiq_gripper_controller", joints=GRIPPER)
    nodes, logged = asking(1.5)
    begun = time.monotonic()
    assert nodes.check(never)["gripper"] == ControllerFacts(joints=tuple(GRIPPER))
    assert 1.0 < time.monotonic() - begun < 5.0
    begun = time.monotonic()
    nodes.check(never)
    assert time.monotonic() - begun < 1.0  # it was looked for long enough
    ((level, text),) = logged
    assert level == "info"
    assert "/scaled_joint_trajectory_controller does not answer" in text
    nodes.close()


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"joints": [name.removeprefix(PREFIX) for name in ARM]}, "has no joint 'left_elbow_joint'"),
        ({"joints": [*ARM, "left_rail_joint"]}, "also has left_rail_joint"),
        ({"joints": ARM, "interpolation_method": "none"}, "interpolation_method is none"),
    ],
)
def test_a_controller_that_would_not_follow_is_refused(
    asking: Any, controller: Any, parameters: dict[str, Any], words: str
) -> None:
    controller("scaled_joint_trajectory_controller", **STOCK | parameters)
    nodes, _ = asking(20.0, UR5.model_copy(update={"controllers": {"arm": UR5.controllers["arm"]}}))
    with pytest.raises(ClpError, match=words) as caught:
        nodes.check(never)
    assert caught.value.where == "/scaled_joint_trajectory_controller"
    nodes.close()


def test_partial_goals_allow_a_controller_of_more_joints(asking: Any, controller: Any) -> None:
    parameters = STOCK | {"allow_partial_joints_goal": True}
    controller("scaled_joint_trajectory_controller", **parameters, joints=[*ARM, "left_rail_joint"])
    nodes, _ = asking(20.0, UR5.model_copy(update={"controllers": {"arm": UR5.controllers["arm"]}}))
    assert nodes.check(never)["arm"].partial
    nodes.close()


def test_parameters_of_another_kind_of_node_say_nothing() -> None:
    assert ControllerFacts.of({"joints": 6, "interpolate_from_desired_state": "no", "interpolation_method": 2}) == (
        ControllerFacts()
    )
    assert ControllerFacts.of({"joints": "arm", "open_loop_control": "yes"}) == ControllerFacts()


def test_the_node_follows_from_the_topic() -> None:
    assert node_name("/left/arm_controller/joint_trajectory") == "/left/arm_controller"
    assert node_name("/left/commands") is None
