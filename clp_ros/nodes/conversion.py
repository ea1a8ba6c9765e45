# SPDX-License-Identifier: Apache-2.0
"""The conversion node: recorded bags become a LeRobotDataset."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from clp_ros.core.errors import ClpError
from clp_ros.nodes.job_node import JobNode
from clp_ros.nodes.parameters import embodiment_parameters, texts
from clp_ros.nodes.spin import main as run_node

PARAMETERS: dict[str, tuple[Any, str]] = {
    "bags": ([""], "Recorded rosbag2 folders, or folders of them"),
    "embodiment": ("", "The robot: a name under config/embodiments, or a YAML file"),
    "tf_prefix": ("", "Prefix of every joint name"),
    "topics": ([""], "Topics that differ from the embodiment's, each ENTRY:=TOPIC"),
    "task": ("", "The instruction, topic:NAME or FILE.csv:COLUMN; empty: the file episodes.csv beside each bag"),
    "output": ("", "Folder of the dataset; bags that are missing in it are added"),
    "overwrite": (False, "Whether an output folder that is not empty is replaced"),
    "episodes_by": ("bag", "How bags are cut: bag, topic:NAME, silence:SECONDS, times:S1,S2,... or times:FILE.csv"),
    "action": ("", "next_state or topics; empty: as the embodiment says"),
    "fps": (0, "Frames per second; 0: the control rate"),
    "images": ("video", "video or png"),
    "resize": ("", "Size of the pictures, as 320x240; empty: as recorded"),
    "stamps": (False, "Whether the original stamps are stored too"),
}


class ConversionNode(JobNode):
    """Converts once, from its start on. config/nodes/conversion.yaml explains the parameters."""

    def __init__(self) -> None:
        super().__init__("conversion", PARAMETERS)

    def run_job(self, value: dict[str, Any]) -> str:
        """See :class:`JobNode`."""
        from clp_ros.jobs.convert import ConvertRequest, run

        bags = texts(value["bags"])
        for name, given in (("bags", bags), ("output", value["output"])):
            if not given:
                raise ClpError(f"there is no {name}", where="conversion", hint=f"set the parameter {name}")
        embodiment, tf_prefix, topics = embodiment_parameters(self)
        result = run(
            ConvertRequest(
                bags=tuple(bags),
                embodiment=embodiment,
                tf_prefix=tf_prefix,
                topics=topics,
                task=value["task"] or None,
                output=Path(value["output"]).expanduser().absolute(),
                overwrite=value["overwrite"],
                episodes_by=value["episodes_by"],
                action=value["action"] or None,
                fps=value["fps"] or None,
                images=value["images"],
                resize=_size(value["resize"]),
                stamps=value["stamps"],
            ),
            self.job.job_progress,
        )
        for note in result.notes:
            self.get_logger().info(note)
        for one in result.left_out:
            self.get_logger().error(f"left out: {one.bag}: {one.why}")
        if result.left_out:
            many = len(result.left_out)
            first = result.left_out[0].why
            raise ClpError(f"{many} bags are left out: {first}" if many > 1 else f"a bag is left out: {first}")
        self.job.step("done", output=result.output, episodes=result.episodes, frames=result.frames)
        self.get_logger().info(f"{result.episodes} episodes, {result.frames} frames: {result.output}")
        return str(result.output)


def _size(text: str) -> tuple[int, int] | None:
    if not text:
        return None
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise ClpError(f"{text!r} is not a size", where="resize", hint="write, for example, 320x240")
    return int(width), int(height)


def main() -> int:
    """Entry point of ``ros2 run clp_ros conversion``."""
    return run_node(ConversionNode, threads=1)


if __name__ == "__main__":
    raise SystemExit(main())
