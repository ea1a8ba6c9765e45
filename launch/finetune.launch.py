# SPDX-License-Identifier: Apache-2.0
"""Starts the fine-tuning node, which trains a checkpoint on a LeRobotDataset."""

from launch import LaunchDescription

from clp_ros.nodes.launch_job import job_description


def generate_launch_description() -> LaunchDescription:
    return job_description(
        "finetuning",
        "checkpoint",
        "dataset",
        output="",
        overwrite="",
        resume="",
        steps="",
        batch_size="",
        train="",
        episodes="",
        held_out="",
        learning_rate="",
        seed="",
        device="",
        options="",
    )
