# SPDX-License-Identifier: Apache-2.0
"""Drives any robot that has a YAML file: camera and joint topics in, one JointTrajectory a controller out."""

from launch import LaunchDescription

from clp_ros.nodes.launch_policy import policy_description


def generate_launch_description() -> LaunchDescription:
    return policy_description()
