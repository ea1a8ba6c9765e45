# SPDX-License-Identifier: Apache-2.0
"""Starts the policy node for the task "groceries to basket" on its robot, ur10e."""

from launch import LaunchDescription

from clp_ros.nodes.launch_policy import task_description


def generate_launch_description() -> LaunchDescription:
    return task_description("groceries_to_basket")
