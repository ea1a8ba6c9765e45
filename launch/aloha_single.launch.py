# SPDX-License-Identifier: Apache-2.0
"""Drives a single-arm ALOHA, the right arm: camera and joint topics in, one JointTrajectory a controller out."""

from launch import LaunchDescription

from clp_ros.nodes.launch_policy import embodiment_description


def generate_launch_description() -> LaunchDescription:
    return embodiment_description("aloha_single")
