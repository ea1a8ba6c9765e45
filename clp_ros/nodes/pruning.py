# SPDX-License-Identifier: Apache-2.0
"""The pruning node: writes a pruned checkpoint from a calibration folder each time ``~/prune`` is called."""

from __future__ import annotations

import json
import time
import traceback
from pathlib import Path
from typing import Any

from rclpy.callback_groups import ReentrantCallbackGroup
from rclpy.node import Node
from std_msgs.msg import String
from std_srvs.srv import Trigger

from clp_ros.core.errors import ClpError
from clp_ros.nodes.job import CancelledError, Job
from clp_ros.nodes.parameters import checkpoint_folder, declare, output_folder, texts
from clp_ros.nodes.spin import main as run_node
from clp_ros.nodes.topics import LATCHED

PARAMETERS: dict[str, tuple[Any, str]] = {
    "checkpoint": ("", "Folder of the checkpoint to prune, or a repository on the hub"),
    "calibration": ("", "Calibration folder of that checkpoint; empty: the one received on calibration/done"),
    "output": ("", "Folder to write; empty: <checkpoint>_pruned"),
    "overwrite": (False, "Whether an output folder that is not empty may be replaced"),
    "budgets": ([""], "Layers to remove from a module, each MODULE=K; none: the paper's share"),
    "threshold": (0.0, "Lowest score of a layer that may be removed; 0: the highest that the budget allows"),
    "criterion": ("cka", "Score to remove by: cka, mse, cosine, random or keep-first"),
    "seed": (0, "Seed of the criterion random"),
}


class PruningNode(Node):
    """Prunes at each call. config/nodes/pruning.yaml explains the parameters, which are read at each call."""

    def __init__(self) -> None:
        super().__init__("pruning")
        declare(self, PARAMETERS, read_only=False)
        self._latest = ""  # the folder received on calibration/done
        self._job = Job(self, "ready")
        # A relative name: the calibration node in the same namespace.
        self.create_subscription(String, "calibration/done", self._receive, LATCHED)
        # Reentrant, so that a second call during the first one is refused at once.
        self.create_service(Trigger, "~/prune", self._prune, callback_group=ReentrantCallbackGroup())

    def destroy_node(self) -> None:
        """Ends a running pruning, which removes its incomplete output, waits for it, and destroys the node."""
        self._job.cancel()
        super().destroy_node()

    def _receive(self, message: String) -> None:
        self._latest = message.data

    def _prune(self, _: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        started = time.monotonic()
        try:
            with self._job.work("reading the calibration"):
                result = self._write_checkpoint()
                result["seconds"] = round(time.monotonic() - started, 3)
                self._job.step(
                    "done", output=result["output"], removed=json.dumps(result["removed"]), seconds=result["seconds"]
                )
        except CancelledError:
            response.message = "the node shuts down"
        except (ClpError, OSError) as error:
            self.get_logger().error(str(error))
            response.message = str(error)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - the caller needs an answer
            self.get_logger().error(traceback.format_exc())
            response.message = f"{type(error).__name__}: {error}"
        else:
            response.success = True
            response.message = json.dumps(result)
            self.get_logger().info(response.message)
        return response

    def _write_checkpoint(self) -> dict[str, Any]:
        from clp_ros.jobs.prune import PruneRequest, run
        from clp_ros.pruning.arguments import parse_budgets

        value = {name: self.get_parameter(name).value for name in PARAMETERS}
        checkpoint = checkpoint_folder(self)
        calibration = value["calibration"] or self._latest
        if not calibration:
            raise ClpError(
                "there is no calibration",
                where="pruning",
                hint="set the parameter calibration, or run the calibration node",
            )
        calibration = Path(calibration).expanduser().absolute()
        request = PruneRequest(
            checkpoint=checkpoint,
            output=output_folder(self, checkpoint, "pruned"),
            calibration=calibration,
            budgets=parse_budgets(texts(value["budgets"])),
            threshold=value["threshold"] or None,
            criterion=value["criterion"],
            seed=value["seed"],
            overwrite=value["overwrite"],
        )
        result = run(request, self._job.job_progress)
        if result.unchecked:
            self.get_logger().warning(f"not fully checked against lerobot: {result.unchecked}")
        return {"checkpoint": str(checkpoint), "calibration": str(calibration), **result.to_json()}


def main() -> int:
    """Entry point of ``ros2 run clp_ros pruning``."""
    return run_node(PruningNode)


if __name__ == "__main__":
    raise SystemExit(main())
