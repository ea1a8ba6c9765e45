# SPDX-License-Identifier: Apache-2.0
"""The parameters of simulated joint_trajectory_controllers, in nodes that are named as the real controllers' are."""

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
    """A node a controller, with its parameters, read-only, spun by one thread of their own.

    A robot's controllers are asked for these when the policy node is activated (:mod:`clp_ros.nodes.controllers`).

    Args:
        embodiment: The robot. A controller whose topic does not name its node has none.
        parameters: Of each controller, by its name in the embodiment.
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
            # Not the process's arguments: a launch file's name for the simulation is not theirs.
            node = Node(base, namespace=namespace, context=context, use_global_arguments=False, enable_rosout=False)
            for key, value in parameters[name].items():
                node.declare_parameter(key, value, read_only)
            self._executor.add_node(node)
            self._nodes.append(node)
        self._thread = threading.Thread(target=self._spin, name="controllers", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the nodes."""
        self._executor.shutdown()
        self._thread.join()
        for node in self._nodes:
            node.destroy_node()
        self._nodes = []

    def _spin(self) -> None:
        with suppress(ExternalShutdownException):  # how rclpy.shutdown() ends it
            self._executor.spin()
