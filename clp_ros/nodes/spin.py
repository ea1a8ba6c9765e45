# SPDX-License-Identifier: Apache-2.0
"""Runs a node's process: start, spin, and a clean end on SIGINT (Ctrl-C) and SIGTERM."""

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

# One thread for a long callback, such as loading a model, and the others for services, parameters and diagnostics.
THREADS = 4

# Longest time until a signal is noticed, in seconds.
_LOOK_S = 0.1


class _TolerantExecutor(Executor):
    """An executor that continues when another thread destroys a subscription or publisher. rclpy's own would raise."""

    def wait_for_ready_callbacks(self, *args: Any, **kwargs: Any) -> Any:
        while True:
            try:
                return super().wait_for_ready_callbacks(*args, **kwargs)
            except InvalidHandle:
                continue


class _OneThread(_TolerantExecutor, SingleThreadedExecutor):
    pass


class _Threads(_TolerantExecutor, MultiThreadedExecutor):
    pass


def main(
    make_node: Callable[[], Node],
    args: Sequence[str] | None = None,
    threads: int = THREADS,
    last_words: Callable[[Any], None] | None = None,
) -> int:
    """Runs one node until a signal.

    A node with threads of its own must end them in ``destroy_node``. A node may have an attribute ``exit_code``.

    Args:
        make_node: Creates the node. ClpError, or a parameter of a wrong type, ends the process with a line on stderr.
        args: Command line, for tests; None: that of the process.
        threads: Number of the executor's threads. One is much cheaper per message, if all callbacks are short.
        last_words: Called with the node after a signal or an exception, while it can still publish. For this reason,
            rclpy's signal handlers, which end ROS first, are not used.

    Returns:
        The exit code: 0 after SIGINT or SIGTERM, 1 if the node could not start, or the node's ``exit_code``.
    """
    node = None
    # The handlers raise nothing. rclpy would turn an exception inside its own code into another one, and a second
    # signal would interrupt the clean-up, which removes half-written output.
    signals: list[int] = []
    try:
        rclpy.init(args=args, signal_handler_options=SignalHandlerOptions.NO)
        for number in (signal.SIGINT, signal.SIGTERM):  # also where a shell ignores SIGINT in the background
            signal.signal(number, lambda number, _: signals.append(number))
        node = make_node()
        executor = _OneThread() if threads == 1 else _Threads(num_threads=threads)
        executor.add_node(node)
        try:
            while rclpy.ok() and not signals:
                executor.spin_once(timeout_sec=_LOOK_S)
        finally:  # also after an exception of a callback
            if last_words is not None and rclpy.ok():
                last_words(node)
    except ExternalShutdownException:
        pass
    except (ClpError, InvalidParameterTypeException, InvalidParameterValueException) as error:
        if node is not None:
            raise  # a started node handles such errors itself
        print(f"error: {error}", file=sys.stderr)  # noqa: T201 - there is no node that could log
        return 1
    finally:
        rclpy.try_shutdown()  # first, because this ends waits in other threads
        if node is not None:
            node.destroy_node()
        # A further signal, such as a second Ctrl-C of ros2 launch, must not change the exit code.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
    return getattr(node, "exit_code", 0)
