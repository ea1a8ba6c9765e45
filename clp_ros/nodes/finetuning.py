# SPDX-License-Identifier: Apache-2.0
"""The fine-tuning node: a checkpoint and a LeRobotDataset become a fine-tuned checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from clp_ros.core.errors import ClpError
from clp_ros.nodes.job_node import JobNode
from clp_ros.nodes.parameters import checkpoint_folder, output_folder, texts
from clp_ros.nodes.spin import main as run_node

PARAMETERS: dict[str, tuple[Any, str]] = {
    "checkpoint": ("", "Folder of the policy's checkpoint, or a repository on the hub"),
    "dataset": ("", "Folder of a LeRobotDataset, version 3"),
    "output": ("", "Folder to write; empty: <checkpoint>_finetuned"),
    "overwrite": (False, "Whether an output folder that is not empty, or an unfinished run, is replaced"),
    "resume": (True, "Whether an unfinished run with this output is taken up, and a finished one left as it is"),
    "steps": (20_000, "Training steps"),
    "batch_size": (8, "Frames in a batch"),
    "train": ("default", "Weights to train: default (as config.json says), all, expert, last=K or lora=R"),
    "episodes": (0, "Number of episodes to use, from the first; 0: all"),
    "held_out": (0.0, "Share of the episodes of each task on which the loss is only measured"),
    "learning_rate": (0.0, "Highest learning rate; 0: the checkpoint's"),
    "workers": (-1, "Processes that load frames; -1: 4, but fewer than the cores"),
    "seed": (1000, "Seed of the frames' order, of noise and of times"),
    "device": ("auto", "Where the policy is trained: auto, cpu, cuda or cuda:N"),
    "threads": (0, "Number of torch's threads on the CPU; 0: torch's default"),
    "options": ([""], "More options of lerobot-train, such as --policy.scheduler_warmup_steps=100"),
}


class FinetuningNode(JobNode):
    """Fine-tunes once, from its start on. config/nodes/finetuning.yaml explains the parameters."""

    def __init__(self) -> None:
        super().__init__("finetuning", PARAMETERS)

    def run_job(self, value: dict[str, Any]) -> str:
        """See :class:`JobNode`."""
        from clp_ros.core.threads import set_threads
        from clp_ros.jobs.finetune import FinetuneRequest, run

        set_threads(value["threads"])
        if not value["dataset"]:
            raise ClpError("there is no dataset", where="finetuning", hint="set the parameter dataset")
        checkpoint = checkpoint_folder(self)
        request = FinetuneRequest(
            checkpoint=checkpoint,
            dataset=Path(value["dataset"]).expanduser().absolute(),
            output=output_folder(self, checkpoint, "finetuned"),
            overwrite=value["overwrite"],
            resume=value["resume"] and not value["overwrite"],
            steps=value["steps"],
            batch_size=value["batch_size"],
            train=value["train"],
            episodes=value["episodes"] or None,
            held_out=value["held_out"],
            learning_rate=value["learning_rate"] or None,
            workers=None if value["workers"] < 0 else value["workers"],
            seed=value["seed"],
            device=value["device"],
            options=tuple(texts(value["options"])),
        )
        result = run(request, self.job.job_progress)
        self.job.step("done", output=result.output, steps=result.steps, loss=result.loss_last)
        self.get_logger().info(f"{result.steps} steps, loss {result.loss_last:.4f}: {result.output}")
        return result.output


def main() -> int:
    """Entry point of ``ros2 run clp_ros finetuning``."""
    return run_node(FinetuningNode, threads=1)


if __name__ == "__main__":
    raise SystemExit(main())
