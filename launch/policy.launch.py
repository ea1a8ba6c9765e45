# SPDX-License-Identifier: Apache-2.0
"""Starts the policy node for any robot with a YAML file."""

from launch import LaunchDescription

from clp_ros.nodes.launch_policy import policy_description


def generate_launch_description() -> LaunchDescription:
    return policy_description()
