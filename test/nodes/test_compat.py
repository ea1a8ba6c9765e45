# SPDX-License-Identifier: Apache-2.0
"""rclpy's private names do what the nodes need of them; a new rclpy that changes one fails here first."""

import pytest

pytest.importorskip("rclpy")

import rclpy
from rclpy.lifecycle import LifecycleNodeMixin
from rclpy.node import Node
from rclpy.parameter import Parameter
from ros_tools import own_domain
from std_msgs.msg import String

from clp_ros.nodes import compat


class Managed(LifecycleNodeMixin, Node):
    def __init__(self) -> None:
        Node.__init__(self, "managed", parameter_overrides=[Parameter("misspelt", value=1)])
        LifecycleNodeMixin.__init__(self)


@pytest.fixture(scope="module")
def node():
    with own_domain():
        rclpy.init()
        yield Managed()
        rclpy.try_shutdown()


def test_the_state_follows_transitions(node):
    assert compat.lifecycle_state(node) == "unconfigured"
    node.trigger_configure()
    assert compat.lifecycle_state(node) == "inactive"


def test_a_transition_that_does_not_exist_raises(node):
    with pytest.raises(compat.RCLError):
        node.trigger_cleanup()
        node.trigger_cleanup()


def test_the_service_is_answered_by_another_callback(node):
    own = compat.replace_change_state(node, len)
    try:
        assert callable(own)
        (service,) = (one for one in node.services if one.srv_name.endswith("/change_state"))
        assert service.callback is len
    finally:
        assert compat.replace_change_state(node, own) is len


def test_given_parameters_are_known_without_being_declared(node):
    assert "misspelt" in compat.given_parameters(node)
    assert not node.has_parameter("misspelt")


def test_a_wait_set_waits_for_subscriptions(node):
    subscription = node.create_subscription(String, "nothing", lambda _: None, 1)
    with node.context.handle, subscription.handle:
        waiting = compat.WaitSet(1, 0, 0, 0, 0, 0, node.context.handle)
        waiting.clear_entities()
        waiting.add_subscription(subscription.handle)
        waiting.wait(1_000_000)
        assert list(waiting.get_ready_entities("subscription")) == []
