# SPDX-License-Identifier: Apache-2.0
"""Starts the policy node for a single-arm ALOHA, the right arm."""

from launch import LaunchDescription

from clp_ros.nodes.launch_policy import embodiment_description


def generate_launch_description() -> LaunchDescription:
    return embodiment_description("aloha_single")
