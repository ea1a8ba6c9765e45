# SPDX-License-Identifier: Apache-2.0
"""The life of a node's process: start, spin, and a clean end on SIGINT (Ctrl-C) and SIGTERM."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

import rclpy
from rclpy.exceptions import InvalidHandle, InvalidParameterTypeException, InvalidParameterValueException
from rclpy.executors import Executor, ExternalShutdownException, MultiThreadedExecutor, SingleThreadedExecutor
from rclpy.node import Node
from rclpy.signals import SignalHandlerOptions

from clp_ros.core.errors import ClpError

# One for a long callback (loading a model), the others for services, parameters and diagnostics meanwhile.
THREADS = 4

# How long a signal may wait for the executor.
_LOOK_S = 0.1


class _WhatIsLeft(Executor):
    """Waits for what is left when another thread destroys a subscription or publisher: rclpy's own would raise."""

    def wait_for_ready_callbacks(self, *args: Any, **kwargs: Any) -> Any:
        while True:
            try:
                return super().wait_for_ready_callbacks(*args, **kwargs)
            except InvalidHandle:
                continue


class _OneThread(_WhatIsLeft, SingleThreadedExecutor):
    pass


class _Threads(_WhatIsLeft, MultiThreadedExecutor):
    pass


def main(
    make_node: Callable[[], Node],
    args: Sequence[str] | None = None,
    threads: int = THREADS,
    last_words: Callable[[Any], None] | None = None,
) -> int:
    """Runs one node until it is told to stop.

    A node that has threads of its own stops them in ``destroy_node``. One that ends itself for a fault may say so by an
    attribute ``exit_code``.

    Args:
        make_node: Makes the node. ClpError and parameters of a wrong type end the process with one line.
        args: Command line, for tests; the process's own by default.
        threads: Of the executor. One is much cheaper a message: for a node whose callbacks are all short.
        last_words: Called with the node after a signal, or an exception that ends it, while it can still send. rclpy's
            own signal handlers end ROS first, so they are not used.

    Returns:
        The exit code: 0 after SIGINT or SIGTERM, 1 when the node could not start, or the node's own.
    """
    node = None
    # The handlers raise nothing: an exception in the middle of rclpy's own code comes out of it as another one, and a
    # second signal would cut the clean-up short, which is what removes half-written output.
    signals: list[int] = []
    try:
        rclpy.init(args=args, signal_handler_options=SignalHandlerOptions.NO)
        for number in (signal.SIGINT, signal.SIGTERM):  # set here: a shell that puts this in the background ignores one
            signal.signal(number, lambda number, _: signals.append(number))
        node = make_node()
        executor = _OneThread() if threads == 1 else _Threads(num_threads=threads)
        executor.add_node(node)
        try:
            while rclpy.ok() and not signals:
                executor.spin_once(timeout_sec=_LOOK_S)
        finally:  # also after an exception of a callback, which ends the node
            if last_words is not None and rclpy.ok():
                last_words(node)
    except ExternalShutdownException:
        pass
    except (ClpError, InvalidParameterTypeException, InvalidParameterValueException) as error:
        if node is not None:
            raise  # not at start-up: a node handles the user's faults itself
        print(f"error: {error}", file=sys.stderr)  # noqa: T201 - there is no node to log with
        return 1
    finally:
        rclpy.try_shutdown()  # first: what waits for ROS in other threads ends by it
        if node is not None:
            node.destroy_node()
        # All is done; Python's own end would be one by the signal: ros2 launch sends Ctrl-C to who has had it already.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
    return getattr(node, "exit_code", 0)
