# SPDX-License-Identifier: Apache-2.0
"""Starts the pruning node, which prunes a checkpoint at each call of `/pruning/prune`."""

from launch import LaunchDescription
from launch_ros.actions import Node

from clp_ros.nodes.launch_node import node_description


def generate_launch_description() -> LaunchDescription:
    return node_description(
        "pruning",
        lambda arguments: [Node(**arguments)],
        "checkpoint",
        calibration="",
        output="",
        overwrite="",
        budgets="",
        threshold="",
        criterion="",
        seed="",
    )
