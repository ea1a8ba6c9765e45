# SPDX-License-Identifier: Apache-2.0
"""rclpy's private names, as Jazzy has them. See :mod:`clp_ros.core.compat`."""

from collections.abc import Callable, Collection
from typing import Any

# rclpy exports InvalidHandle, but neither the exception of its C library nor the wait set of its executors.
from rclpy.impl.implementation_singleton import rclpy_implementation
from rclpy.lifecycle import LifecycleNodeMixin
from rclpy.node import Node

RCLError: type[Exception] = rclpy_implementation.RCLError
WaitSet = rclpy_implementation.WaitSet

Callback = Callable[..., Any]


def replace_change_state(node: LifecycleNodeMixin, callback: Callback) -> Callback:
    """Answers the service ``change_state`` by another callback, and returns rclpy's own.

    rclpy creates the service in its constructor. A second service of the same name would answer too.
    """
    service = node._service_change_state
    own, service.callback = service.callback, callback
    return own


def lifecycle_state(node: LifecycleNodeMixin) -> str:
    """Returns the label of a lifecycle node's state. Publicly, rclpy has it in the service ``get_state`` only."""
    return node._state_machine.current_state[1]


def given_parameters(node: Node) -> Collection[str]:
    """Returns the names of the parameters given to a node, declared or not. rclpy's public methods skip the latter."""
    return node._parameter_overrides
