# SPDX-License-Identifier: Apache-2.0
"""rclpy's private names, as Jazzy has them. See :mod:`clp_ros.core.compat`."""

from collections.abc import Callable, Collection
from typing import Any

# rclpy exports InvalidHandle, but neither what its C library raises nor the wait set an executor is made of.
from rclpy.impl.implementation_singleton import rclpy_implementation
from rclpy.lifecycle import LifecycleNodeMixin
from rclpy.node import Node

RCLError: type[Exception] = rclpy_implementation.RCLError
WaitSet = rclpy_implementation.WaitSet

Callback = Callable[..., Any]


def replace_change_state(node: LifecycleNodeMixin, callback: Callback) -> Callback:
    """Answers the service ``change_state`` by another callback, and returns rclpy's own.

    rclpy makes the service in its constructor; a second one of the same name would answer too.
    """
    service = node._service_change_state
    own, service.callback = service.callback, callback
    return own


def lifecycle_state(node: LifecycleNodeMixin) -> str:
    """The label of a lifecycle node's state. rclpy tells it by the service ``get_state`` only."""
    return node._state_machine.current_state[1]


def given_parameters(node: Node) -> Collection[str]:
    """Names of the parameters given to a node, declared or not. rclpy keeps those not declared to itself."""
    return node._parameter_overrides
