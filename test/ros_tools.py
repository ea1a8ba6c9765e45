# SPDX-License-Identifier: Apache-2.0
"""Nodes as processes of their own, and a peer in the test's process that talks to them over real DDS."""

import fcntl
import itertools
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import pytest
import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from rcl_interfaces.srv import GetParameters, SetParameters
from rclpy.context import Context
from rclpy.executors import Executor, SingleThreadedExecutor
from rclpy.node import Node
from rclpy.parameter import Parameter
from warm_processes import Program

TIMEOUT_S = 60.0
"""How long anything is waited for before the test fails: generous, machines under load are slow."""
_SETTLE_S = 0.5
_domain_numbers = itertools.count()
ROOT = Path(__file__).resolve().parents[1]


@contextmanager
def own_domain() -> Iterator[int]:
    """A ROS domain of a test's own, in the environment; parallel runs on this machine get others.

    Domains up to 100 only: from 102 on, DDS's ports lie in the range Linux gives to outgoing connections.
    """
    start = 7 * os.getpid() + next(_domain_numbers)
    for domain in (1 + (start + step) % 100 for step in range(100)):
        lock = open(Path(tempfile.gettempdir()) / f"clp_ros_test_domain_{domain}.lock", "a")  # noqa: SIM115
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            continue
        break
    else:
        pytest.skip("all 100 ROS domains are taken by other test runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROS_DOMAIN_ID", str(domain))
        patch.setenv("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
        yield domain
    lock.close()  # which gives up the lock


def wait_for[T](found: Callable[[], T], what: str, timeout: float = TIMEOUT_S) -> T:
    """Waits until ``found`` gives something true, and returns it."""
    deadline = time.monotonic() + timeout
    while not (result := found()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: nothing for {timeout:g} s")
        time.sleep(0.02)
    return result


@dataclass(frozen=True)
class Status:
    """One status received on /diagnostics."""

    level: bytes
    message: str
    values: dict[str, str]


@contextmanager
def spinning(executor: Executor) -> Iterator[None]:
    """Spins an executor in a thread until the end of the block.

    The thread ends before the caller ends ROS: a thread that is about to wait raises if its context is no longer valid.
    """
    ended = threading.Event()

    def spin() -> None:
        while executor.context.ok() and not ended.is_set():
            executor.spin_once(timeout_sec=0.05)

    thread = threading.Thread(target=spin)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        executor.shutdown()


class Peer:
    """A node in this process: hears topics, calls services."""

    def __init__(self, domain: int) -> None:
        self._context = Context()
        rclpy.init(args=[], context=self._context, domain_id=domain)
        self.node = Node("peer", context=self._context)
        executor = SingleThreadedExecutor(context=self._context)
        executor.add_node(self.node)
        self._clients: dict[str, Any] = {}
        self._spinning = ExitStack()
        self._spinning.enter_context(spinning(executor))

    def close(self) -> None:
        self._spinning.close()
        self.node.destroy_node()
        self._context.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def hear(self, kind: type, topic: str, qos: Any = 10) -> list[Any]:
        """The messages that come in on a topic from now on; the list grows."""
        received: list[Any] = []
        self.node.create_subscription(kind, topic, received.append, qos)
        return received

    def hear_diagnostics(self, name: str) -> list[Status]:
        """What a node says of itself from now on; the list grows."""
        received: list[Status] = []

        def add(message: DiagnosticArray) -> None:
            for status in message.status:
                if status.name == name:
                    values = {value.key: value.value for value in status.values}
                    received.append(Status(status.level, status.message, values))

        self.node.create_subscription(DiagnosticArray, "/diagnostics", add, 100)
        return received

    def call(self, kind: type, service: str, request: Any = None, timeout: float = TIMEOUT_S) -> Any:
        """A service's response."""
        future = self.start_call(kind, service, request, timeout)
        wait_for(future.done, f"a response of {service}", timeout)
        return future.result()

    def start_call(self, kind: type, service: str, request: Any = None, timeout: float = TIMEOUT_S) -> Any:
        """A future for a service's response."""
        if service not in self._clients:
            client = self._clients[service] = self.node.create_client(kind, service)
            if not client.wait_for_service(timeout_sec=timeout):
                raise TimeoutError(f"no service {service}")
            # The service may know of this client's requests before it knows where responses go, and loses the first
            # one then ("failed to send response (timeout)", 2 of 80 calls at once after the start).
            time.sleep(_SETTLE_S)
        return self._clients[service].call_async(request or kind.Request())

    def parameter(self, node: str, name: str) -> Any:
        """A parameter's value, asked for over the network."""
        response = self.call(GetParameters, f"{node}/get_parameters", GetParameters.Request(names=[name]))
        return rclpy.parameter.parameter_value_to_python(response.values[0])

    def set_parameters(self, node: str, **values: Any) -> list[str]:
        """Sets parameters; returns why it was refused, a text each, empty where it was not."""
        request = SetParameters.Request(
            parameters=[Parameter(name, value=value).to_parameter_msg() for name, value in values.items()]
        )
        results = self.call(SetParameters, f"{node}/set_parameters", request).results
        return ["" if result.successful else result.reason or "refused" for result in results]


@dataclass
class NodeProcess:
    """A running node."""

    process: Program
    log_path: Path

    @property
    def log(self) -> str:
        """Its stdout and stderr so far."""
        return self.log_path.read_text(encoding="utf-8", errors="replace")

    def stop(self, number: int = signal.SIGINT, timeout: float = TIMEOUT_S) -> int:
        """Sends a signal and returns the exit code."""
        self.process.send_signal(number)
        return self.process.wait(timeout)


def parameter_arguments(parameters: Mapping[str, Any]) -> list[str]:
    """``--ros-args -p name:=value …``"""
    return ["--ros-args", *(part for name, value in parameters.items() for part in ("-p", f"{name}:={value}"))]


@contextmanager
def running(command: Sequence[str], log_path: Path) -> Iterator[NodeProcess]:
    """Runs ``python <command>`` in this environment (its ROS_DOMAIN_ID), and kills it if the test leaves it behind."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    process = Program(command, log_path, env=environment, cwd=ROOT)
    try:
        yield NodeProcess(process, log_path)
    finally:
        process.kill()
        process.wait()
