# SPDX-License-Identifier: Apache-2.0
"""Starts the calibration node, which finds redundant layers from recorded bags or from the robot's live topics."""

from launch import LaunchDescription

from clp_ros.nodes.launch_job import job_description


def generate_launch_description() -> LaunchDescription:
    return job_description(
        "calibration",
        "checkpoint",
        "embodiment",
        "task",
        tf_prefix="",
        topics="",
        bag="",
        samples="",
        output="",
        overwrite="",
        seed="",
        device="",
        statistics="",
        use_sim_time="",
    )
