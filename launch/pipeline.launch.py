# SPDX-License-Identifier: Apache-2.0
"""Starts the pipeline node, which makes a fine-tuned pruned checkpoint from recorded bags and a checkpoint."""

from launch import LaunchDescription

from clp_ros.nodes.launch_job import job_description


def generate_launch_description() -> LaunchDescription:
    return job_description(
        "pipeline",
        "bags",
        "checkpoint",
        "embodiment",
        "task",
        output="",
        samples="",
        budgets="",
        threshold="",
        steps="",
        batch_size="",
        train="",
        seed="",
        device="",
    )
