# SPDX-License-Identifier: Apache-2.0
"""Starts the conversion node, which makes a LeRobotDataset of recorded bags."""

from launch import LaunchDescription

from clp_ros.nodes.launch_job import job_description


def generate_launch_description() -> LaunchDescription:
    return job_description(
        "conversion",
        "bags",
        "embodiment",
        "output",
        task="",
        tf_prefix="",
        topics="",
        overwrite="",
        episodes_by="",
        action="",
        fps="",
        images="",
        resize="",
        stamps="",
    )
