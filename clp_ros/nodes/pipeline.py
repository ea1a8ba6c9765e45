# SPDX-License-Identifier: Apache-2.0
"""The pipeline node: recorded bags and a checkpoint become a fine-tuned pruned checkpoint."""

from __future__ import annotations

from typing import Any

from clp_ros.nodes.job_node import JobNode
from clp_ros.nodes.parameters import checkpoint_folder, given_text, output_folder, texts
from clp_ros.nodes.spin import main as run_node

PARAMETERS: dict[str, tuple[Any, str]] = {
    "bags": ([""], "Recorded rosbag2 folders, one episode each"),
    "checkpoint": ("", "Folder of the policy's checkpoint, or a repository on the hub"),
    "embodiment": ("", "The robot: a name under config/embodiments, or a YAML file"),
    "task": ("", "The instruction: a name under config/tasks, a YAML file, or the sentence itself"),
    "output": ("", "Folder of the results; an interrupted run in it is continued; empty: <checkpoint>_pipeline"),
    "samples": (64, "Number of frames to calibrate on"),
    "budgets": ([""], "Layers to remove from a module, each MODULE=K; none: the paper's share"),
    "threshold": (0.0, "Least score of a layer that may go; 0: the largest that the budget allows"),
    "steps": (20_000, "Training steps"),
    "batch_size": (8, "Frames of a training step"),
    "train": ("default", "Weights to train: default, all, expert, last=K or lora=R"),
    "seed": (0, "Seed of everything that is drawn at random"),
    "device": ("auto", "Where the policy runs: auto, cpu, cuda or cuda:N"),
    "threads": (0, "Threads that torch computes with on the CPU; 0: as many as it takes by itself"),
}


class PipelineNode(JobNode):
    """See the module's text and config/nodes/pipeline.yaml for its parameters."""

    def __init__(self) -> None:
        super().__init__("pipeline", PARAMETERS)

    def run_job(self, value: dict[str, Any]) -> str:
        """See :class:`JobNode`."""
        from clp_ros.core.threads import set_threads
        from clp_ros.jobs.pipeline import PipelineRequest, run
        from clp_ros.pruning.arguments import parse_budgets

        set_threads(value.pop("threads"))
        checkpoint = checkpoint_folder(self)
        given_text(self, "embodiment", "a name under config/embodiments, or a YAML file")
        value |= {
            "checkpoint": checkpoint,
            "bags": texts(value["bags"]),
            "budgets": parse_budgets(texts(value["budgets"])),
            "threshold": value["threshold"] or None,
            "output": output_folder(self, checkpoint, "pipeline"),
        }
        result = run(PipelineRequest(**value), self.job.job_progress)
        self.job.step("done", output=result.output, checkpoint=result.checkpoint)
        self.get_logger().info(f"done: {result.checkpoint}")
        return str(result.checkpoint)


def main() -> int:
    """Entry point of ``ros2 run clp_ros pipeline``."""
    return run_node(PipelineNode, threads=1)


if __name__ == "__main__":
    raise SystemExit(main())
