# SPDX-License-Identifier: Apache-2.0
"""Replays a demonstration to the policy node and counts its trajectories: the last step of the demo.

The policy node runs in a process of its own, as on a robot. Both processes communicate over DDS.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import rclpy
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.signals import SignalHandlerOptions
from trajectory_msgs.msg import JointTrajectory

from clp_ros.bags.reader import open_bag
from clp_ros.core.errors import ClpError
from clp_ros.nodes.replay import Replay
from clp_ros.robots.embodiment import Embodiment, load_embodiment

# Loading a full-size policy on a slow machine takes minutes.
_CONFIGURE_S = 300.0
_START_S = 30.0
_END_S = 15.0


class PolicyProcess:
    """The policy node in a process of its own. The ``with`` block ends it. Its output is copied to stderr.

    Args:
        parameters: The node's parameters. All values but floats are passed as text.
    """

    def __init__(self, parameters: Mapping[str, object]) -> None:
        command = [sys.executable, "-m", "clp_ros.nodes.policy", "--ros-args"]
        for name, value in parameters.items():
            text = json.dumps(value if isinstance(value, float) else str(value))  # quoted: the task "no" is not a bool
            command += ["-p", f"{name}:={text}"]
        plain = {"RCUTILS_CONSOLE_OUTPUT_FORMAT": "{severity}: {message}", "RCUTILS_COLORIZED_OUTPUT": "0"}
        self._process = subprocess.Popen(
            command,
            env=os.environ | plain,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        self._fault = "it printed nothing"
        self._reading = threading.Thread(target=self._read, daemon=True)
        self._reading.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def check(self) -> None:
        """Raises ClpError if the process has ended by itself."""
        if self._process.poll() is not None:
            raise self.error("ended by itself")

    def error(self, what: str) -> ClpError:
        """Ends the process, and returns an error with its last error message or last line.

        Args:
            what: What the node did, for the error's text.
        """
        self.end()
        return ClpError(f"the policy node {what}: {self._fault}", where="/policy", hint="read the node's output above")

    def end(self) -> None:
        """Ends the process, and waits for its end."""
        self._process.terminate()
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reading.join()

    def _read(self) -> None:
        is_error = False
        for line in self._process.stdout:
            sys.stderr.write(line)
            label, _, rest = line.strip().partition(": ")
            if label.lower() == "error":
                self._fault, is_error = rest, True
            elif line.strip() and not is_error:
                self._fault = line.strip()


class StoppedError(Exception):
    """A signal ended the rehearsal early."""


class Rehearsal:
    """Controls a policy node and counts the trajectories that it sends to an embodiment's controllers.

    Args:
        node: The node that communicates with the policy node.
        embodiment: The robot.
        stopped: Returns whether to end early.
    """

    def __init__(self, node: Node, embodiment: Embodiment, stopped: Callable[[], object]) -> None:
        self._node = node
        self._stopped = stopped
        self._received: dict[str, list[int]] = {name: [] for name in embodiment.controllers}  # points of each
        for name, controller in embodiment.controllers.items():
            node.create_subscription(
                JointTrajectory, controller.topic, lambda message, name=name: self._take(name, message), 10
            )

    def _take(self, controller: str, message: JointTrajectory) -> None:
        self._received[controller].append(len(message.points))

    def change_state(self, policy: PolicyProcess, transition: str, timeout: float) -> None:
        """Requests a lifecycle transition of the policy node.

        Args:
            policy: The policy node's process.
            transition: ``configure``, ``activate`` or ``deactivate``.
            timeout: Longest time of the transition, in seconds.

        Raises:
            ClpError: The node has ended, does not answer, or the transition fails.
            StoppedError: ``stopped`` returned True.
        """
        client = self._node.create_client(ChangeState, "/policy/change_state")
        if not self._wait(lambda: client.wait_for_service(timeout_sec=0.1), policy, _START_S):
            raise policy.error("does not answer")
        self.sleep(0.5)  # a server that has not discovered its client yet loses the response
        number = getattr(Transition, f"TRANSITION_{transition.upper()}")
        future = client.call_async(ChangeState.Request(transition=Transition(id=number)))
        if not self._wait(future.done, policy, timeout):
            raise policy.error(f"did not {transition} within {timeout:g} s")
        if not future.result().success:
            raise policy.error(f"refused to {transition}")

    def sleep(self, seconds: float) -> None:
        """Waits for some seconds. Raises StoppedError if ``stopped`` returns True meanwhile."""
        end = time.monotonic() + seconds
        while not self._stopped():
            if (left := end - time.monotonic()) <= 0:
                return
            time.sleep(min(left, 0.05))
        raise StoppedError

    def _wait(self, done: Callable[[], bool], policy: PolicyProcess, timeout: float) -> bool:
        deadline = time.monotonic() + timeout
        while not done():
            policy.check()
            if time.monotonic() > deadline:
                return False
            self.sleep(0.05)
        return True

    def result(self) -> dict[str, Any]:
        """Returns the number of trajectories, and the points of the longest one, by controller."""
        return {
            name: {"trajectories": len(points), "points": max(points, default=0)}
            for name, points in self._received.items()
        }


def rehearse(
    checkpoint: Path, bag: Path, embodiment_name: str, task: str, stopped: Callable[[], object]
) -> dict[str, Any]:
    """Starts the policy node, replays the bag in real time, and counts the node's trajectories.

    Args:
        checkpoint: The policy's checkpoint.
        bag: The demonstration.
        embodiment_name: A name under ``config/embodiments/``.
        task: A name under ``config/tasks/``, or an instruction.
        stopped: Returns whether to end early.

    Returns:
        ``seconds``, the duration of the bag, and ``controllers``, see :meth:`Rehearsal.result`.

    Raises:
        ClpError: The node does not start, or the bag does not match the embodiment.
        StoppedError: ``stopped`` returned True.
    """
    embodiment = load_embodiment(embodiment_name)
    parameters = {"checkpoint": checkpoint, "embodiment": embodiment_name, "task": task}
    # Random weights give random steps, far from the robot. That is acceptable here, because nothing moves.
    parameters |= {"max_deviation": 100.0}
    node = rclpy.create_node("rehearsal")
    rehearsal = Rehearsal(node, embodiment, stopped)
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    spinning = threading.Thread(target=executor.spin, daemon=True)
    spinning.start()
    over = threading.Event()
    try:
        with open_bag(bag) as reader, PolicyProcess(parameters) as policy, ThreadPoolExecutor(1) as player:
            try:
                rehearsal.change_state(policy, "configure", _CONFIGURE_S)
                playing = player.submit(Replay(node, reader).play, over)
                rehearsal.sleep(1.0)  # the node activates once its inputs are alive
                rehearsal.change_state(policy, "activate", 30.0)
                while not playing.done():
                    rehearsal.sleep(0.05)
                playing.result()
                rehearsal.change_state(policy, "deactivate", 30.0)
            finally:
                over.set()
            seconds = (reader.end_ns - reader.start_ns) / 1e9
    finally:
        executor.shutdown()
        spinning.join()
        node.destroy_node()
    return {"seconds": seconds, "controllers": rehearsal.result()}


def main(args: Sequence[str] | None = None) -> int:
    """Prints the result of :func:`rehearse` as a JSON object."""
    parser = argparse.ArgumentParser(
        description="Plays a demonstration to the policy node and counts its trajectories."
    )
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--bag", type=Path, required=True)
    parser.add_argument("--embodiment", required=True)
    parser.add_argument("--task", required=True)
    options = parser.parse_args(args)
    # Without rclpy's signal handlers, which would end ROS while this process waits for answers.
    rclpy.init(args=[], signal_handler_options=SignalHandlerOptions.NO)
    # The handlers raise nothing: an exception while the policy node is being started would leave that process running.
    # They use no Event, because the interrupted code may hold its lock.
    received: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: received.append(number))
    try:
        result = rehearse(options.checkpoint, options.bag, options.embodiment, options.task, lambda: received)
    except StoppedError:
        return 128 + received[0]
    except ClpError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 1
    finally:
        rclpy.try_shutdown()
    print(json.dumps(result))  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
