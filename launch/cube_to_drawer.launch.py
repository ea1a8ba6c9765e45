# SPDX-License-Identifier: Apache-2.0
"""Starts the policy node for the task "cube to drawer" on its robot, aloha_single."""

from launch import LaunchDescription

from clp_ros.nodes.launch_policy import task_description


def generate_launch_description() -> LaunchDescription:
    return task_description("cube_to_drawer")
