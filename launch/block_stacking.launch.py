# SPDX-License-Identifier: Apache-2.0
"""The task "block stacking" on the robot it is for, aloha_single."""

from launch import LaunchDescription

from clp_ros.nodes.launch_policy import task_description


def generate_launch_description() -> LaunchDescription:
    return task_description("block_stacking")
