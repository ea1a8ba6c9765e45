# SPDX-License-Identifier: Apache-2.0
"""Drives a UR5 or UR5e with a gripper: camera and joint topics in, one JointTrajectory a controller out."""

from launch import LaunchDescription

from clp_ros.nodes.launch_policy import embodiment_description


def generate_launch_description() -> LaunchDescription:
    return embodiment_description("ur5")
