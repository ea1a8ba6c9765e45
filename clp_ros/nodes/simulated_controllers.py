# SPDX-License-Identifier: Apache-2.0
"""Nodes of simulated joint_trajectory_controllers, with the names and parameters of the real ones."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from rcl_interfaces.msg import ParameterDescriptor
from rclpy.context import Context
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.node import Node

from clp_ros.nodes.controllers import node_name
from clp_ros.robots.embodiment import Embodiment


class SimulatedControllerNodes:
    """One node per controller with read-only parameters. One thread spins all of them.

    The policy node reads these parameters when it is activated (:mod:`clp_ros.nodes.controllers`).

    Args:
        embodiment: The robot. A controller gets no node if its topic does not contain the node's name.
        parameters: The parameters of each controller, by the controller's name in the embodiment.
        context: The process's ROS context.
    """

    def __init__(self, embodiment: Embodiment, parameters: Mapping[str, Mapping[str, Any]], context: Context) -> None:
        self._executor = SingleThreadedExecutor(context=context)
        self._nodes: list[Node] = []
        read_only = ParameterDescriptor(read_only=True)
        for name, controller in embodiment.controllers.items():
            if (owner := node_name(controller.topic)) is None:
                continue
            namespace, _, base = owner.rpartition("/")
            # Without the process's arguments: a launch file's node name is for the simulation node only.
            node = Node(base, namespace=namespace, context=context, use_global_arguments=False, enable_rosout=False)
            for key, value in parameters[name].items():
                node.declare_parameter(key, value, read_only)
            self._executor.add_node(node)
            self._nodes.append(node)
        self._thread = threading.Thread(target=self._spin, name="controllers", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Destroys the nodes."""
        self._executor.shutdown()
        self._thread.join()
        for node in self._nodes:
            node.destroy_node()
        self._nodes = []

    def _spin(self) -> None:
        with suppress(ExternalShutdownException):  # raised by rclpy.shutdown()
            self._executor.spin()
