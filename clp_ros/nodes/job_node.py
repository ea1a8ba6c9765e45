# SPDX-License-Identifier: Apache-2.0
"""A node that runs one job, once, from its start on.

After the job the node keeps running, so that a later subscriber still receives its topics (transient local). After a
fault it keeps running too, with the fault on /diagnostics.
"""

from __future__ import annotations

import threading
import traceback
from collections.abc import Mapping
from typing import Any

from rclpy.clock import Clock, ClockType
from rclpy.node import Node
from std_msgs.msg import String

from clp_ros.core.errors import ClpError
from clp_ros.nodes.job import CancelledError, Job
from clp_ros.nodes.parameters import declare
from clp_ros.nodes.topics import LATCHED


class JobNode(Node):
    """Runs :meth:`run_job` in a thread of its own.

    It is not the executor's thread, because services must be answered meanwhile. The executor has one thread, because
    rclpy's multi-threaded executor is so slow that most of a robot's messages would be lost.

    Args:
        name: The node's name.
        parameters: By name, a parameter's default and description. They are read once, at the start.
        untyped: Name of a parameter that accepts several types.

    Attributes:
        exit_code: The exit code of the process; 1 after a bug.
        job: Reports the work on /diagnostics.
    """

    def __init__(self, name: str, parameters: Mapping[str, tuple[Any, str]], untyped: str = "") -> None:
        super().__init__(name)
        declare(self, parameters, read_only=True, untyped=untyped)
        self._names = tuple(parameters)
        self.exit_code = 0
        self._done = self.create_publisher(String, "~/done", LATCHED)
        self.job = Job(self, "starting")
        # A timer starts the thread, because only a spinning node is ended by a signal.
        self._worker = threading.Thread(target=self._work, name=name)
        self._start = self.create_timer(0.0, self._begin, clock=Clock(clock_type=ClockType.STEADY_TIME))

    def run_job(self, value: dict[str, Any]) -> str:
        """Runs the job.

        Args:
            value: The parameters' values.

        Returns:
            The output folder, published on ``~/done``.

        Raises:
            ClpError: The user can fix it.
        """
        raise NotImplementedError

    def destroy_node(self) -> None:
        """Ends the job, which removes its incomplete output, waits for it, and destroys the node."""
        self.job.cancel()
        if self._worker.is_alive():
            self._worker.join()
        super().destroy_node()

    def _begin(self) -> None:
        self._start.cancel()
        self._worker.start()

    def _work(self) -> None:
        try:
            with self.job.work("checking the parameters"):
                output = self.run_job({name: self.get_parameter(name).value for name in self._names})
                self._done.publish(String(data=output))
        except CancelledError:
            return
        except (ClpError, OSError) as error:
            self.get_logger().error(str(error))
        except Exception as error:  # noqa: BLE001 - a bug: the process ends with a traceback
            if not self.context.ok():
                return  # a signal has ended ROS between a check and a publish
            if type(error).__name__ == "OutOfMemoryError":  # torch's
                fault = ClpError(str(error).splitlines()[0], where="the GPU", hint="set the parameter device to cpu")
                self.get_logger().error(str(fault))
                return
            self.get_logger().fatal(traceback.format_exc())
            self.exit_code = 1
            self.context.try_shutdown()
