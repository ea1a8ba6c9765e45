# SPDX-License-Identifier: Apache-2.0
"""The calibration node: writes a calibration folder from bags or live topics, and publishes the matrices."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sensor_msgs.msg import Image
from std_msgs.msg import Float64MultiArray
from std_srvs.srv import Trigger

from clp_ros.core.errors import ClpError
from clp_ros.nodes.job_node import JobNode
from clp_ros.nodes.live_frames import LiveFrames
from clp_ros.nodes.messages import image_message, matrix_message
from clp_ros.nodes.parameters import checkpoint_folder, embodiment_parameters, output_folder, texts
from clp_ros.nodes.spin import main as run_node
from clp_ros.nodes.topics import LATCHED
from clp_ros.robots.embodiment import Embodiment

if TYPE_CHECKING:
    from clp_ros.calibration.calibration_file import Calibration
    from clp_ros.policies.base import Policy
    from clp_ros.policies.statistics import Statistics
    from clp_ros.pruning.plan import Plan

PARAMETERS: dict[str, tuple[Any, str]] = {
    "checkpoint": ("", "Folder of the policy's checkpoint, or a repository on the hub"),
    "embodiment": ("", "The robot: a name under config/embodiments, or a YAML file"),
    "tf_prefix": ("", "Prefix of every joint name, as the driver's argument of that name"),
    "topics": ([""], "Topics that differ from the embodiment's, each ENTRY:=TOPIC"),
    "task": (
        "",
        "The instruction: a name under config/tasks, a YAML file, or the sentence itself; empty: each bag's in "
        "episodes.csv beside it",
    ),
    "bag": ("", "rosbag2 folder, or a list of them; empty: listen to the embodiment's topics"),
    "samples": (64, "Number of frames to draw"),
    "output": ("", "Folder to write; empty: <checkpoint>_calibration"),
    "overwrite": (False, "Whether an output folder that is not empty may be replaced"),
    "seed": (0, "Seed of the drawn frames and of the policy's noise"),
    "device": ("auto", "Where the policy runs: auto, cpu, cuda or cuda:N"),
    "statistics": (
        "",
        "Statistics for a checkpoint that has none: a LeRobotDataset's folder, or bags for those of the bags; empty: "
        "the checkpoint's",
    ),
    "threads": (0, "Number of torch's threads on the CPU; 0: torch's default"),
    "idle_timeout": (5.0, "Seconds of silence on all topics, after the first message, that end the listening"),
}
_NEXT = "ros2 service call /pruning/prune std_srvs/srv/Trigger"


class CalibrationNode(JobNode):
    """Calibrates once, from its start on. config/nodes/calibration.yaml explains the parameters."""

    def __init__(self) -> None:
        self._live: LiveFrames | None = None
        self._results: list[Any] = []  # publishers are kept, because their latched messages end with them
        super().__init__("calibration", PARAMETERS, untyped="bag")
        self.create_service(Trigger, "~/finish", self._finish)

    def run_job(self, value: dict[str, Any]) -> str:
        """See :class:`JobNode`."""
        from clp_ros.core.threads import set_threads
        from clp_ros.jobs.calibrate import CalibrateRequest, run

        if (threads := set_threads(value["threads"])) is not None:
            self.get_logger().info(f"torch computes with {threads} threads")
        checkpoint = checkpoint_folder(self)
        embodiment, tf_prefix, topics = embodiment_parameters(self)
        request = CalibrateRequest(
            checkpoint=checkpoint,
            output=output_folder(self, checkpoint, "calibration"),
            embodiment=embodiment,
            tf_prefix=tf_prefix,
            topics=topics,
            task=value["task"] or None,
            bags=texts(value["bag"]),
            samples=value["samples"],
            seed=value["seed"],
            device=value["device"],
            statistics=value["statistics"] or None,
            command=_NEXT,
            overwrite=value["overwrite"],
        )
        result = run(request, self.job.job_progress, self._calibrate_live)
        for note in result.plan.notes:
            self.get_logger().info(note)
        self._publish(result.calibration, result.plan)
        self.job.step("done", output=result.output, samples=result.meta["samples"])
        self.get_logger().info(f"calibrated on {result.meta['samples']} frames: {result.output}")
        return str(result.output)

    def _calibrate_live(
        self, policy: Policy, embodiment: Embodiment, task: str, statistics: Statistics | str | None
    ) -> Calibration:
        from clp_ros.calibration.live import calibrate_live, make_reservoir

        samples, seed = self.get_parameter("samples").value, self.get_parameter("seed").value
        reservoir = make_reservoir(policy, embodiment, samples, seed, statistics, self.get_logger().warning)
        self.job.step("listening")
        self._live = LiveFrames(self, reservoir, self.get_parameter("idle_timeout").value)
        self.get_logger().info(f"listening to {', '.join(embodiment.demonstration_topics)}")
        self._live.wait(lambda: self.job.progress(reservoir.held, samples))
        self.job.step("calibrating", **{"usable ticks": reservoir.usable})
        return calibrate_live(policy, reservoir, task, seed, self.job.progress)

    def _publish(self, calibration: Calibration, plan: Plan) -> None:
        from clp_ros.report.heatmaps import heatmap_rgb

        keys = ("threshold", "blocks", "removed", "scores")
        for name, matrix in calibration.matrices.items():
            shown = plan.report()[name]
            picture = heatmap_rgb(matrix, module=name, **{key: shown[key] for key in keys})
            self.job.check()
            matrices = self.create_publisher(Float64MultiArray, f"~/cka/{name}", LATCHED)
            matrices.publish(matrix_message(matrix, ("layer", "layer")))
            heatmaps = self.create_publisher(Image, f"~/heatmap/{name}", LATCHED)
            heatmaps.publish(image_message(picture, self.get_clock().now().to_msg(), name))
            self._results += [matrices, heatmaps]

    def _finish(self, _: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        try:
            if self._live is None:
                raise ClpError(
                    "the node does not listen to live topics",
                    where="finish",
                    hint="call it while the node listens, which needs the parameter bag to be empty",
                )
            frames = self._live.finish()
        except ClpError as error:
            response.message = str(error)
            return response
        response.success = True
        response.message = f"calibrating on {frames} frames"
        return response


def main() -> int:
    """Entry point of ``ros2 run clp_ros calibration``."""
    return run_node(CalibrationNode, threads=1)


if __name__ == "__main__":
    raise SystemExit(main())
