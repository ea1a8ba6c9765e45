# SPDX-License-Identifier: Apache-2.0
"""The task "screwdriver to basket" on the robot it is for, ur5."""

from launch import LaunchDescription

from clp_ros.nodes.launch_policy import task_description


def generate_launch_description() -> LaunchDescription:
    return task_description("screwdriver_to_basket")
