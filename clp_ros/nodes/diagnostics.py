# SPDX-License-Identifier: Apache-2.0
"""Publishes a node's state on /diagnostics once a second."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum

from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from rclpy.callback_groups import MutuallyExclusiveCallbackGroup
from rclpy.clock import Clock, ClockType
from rclpy.node import Node

PERIOD_S = 1.0


class Level(Enum):
    """The levels of diagnostic_msgs/DiagnosticStatus."""

    OK = DiagnosticStatus.OK
    WARN = DiagnosticStatus.WARN
    ERROR = DiagnosticStatus.ERROR
    STALE = DiagnosticStatus.STALE


@dataclass(frozen=True)
class Report:
    """One status.

    Attributes:
        level: The level.
        message: A short description of the state.
        values: Values by name. Floats are published with four digits.
    """

    level: Level
    message: str
    values: Mapping[str, object] = field(default_factory=dict)


class Diagnostics:
    """Publishes a node's report on /diagnostics at 1 Hz.

    The timer has a callback group of its own, so that a multi-threaded executor serves it while another callback runs.
    It uses a steady clock, so that a paused simulation does not stop it.

    Args:
        node: The node. Its full name is the status's name.
        report: Returns the report. Called once a second in an executor's thread; it must not block.
    """

    def __init__(self, node: Node, report: Callable[[], Report]) -> None:
        self._node = node
        self._report = report
        group = MutuallyExclusiveCallbackGroup()
        self._publisher = node.create_publisher(DiagnosticArray, "/diagnostics", 10, callback_group=group)
        steady = Clock(clock_type=ClockType.STEADY_TIME)
        self._timer = node.create_timer(PERIOD_S, self.publish, callback_group=group, clock=steady)

    def publish(self) -> None:
        """Publishes the report now, as after an important change."""
        report = self._report()
        message = DiagnosticArray()
        message.header.stamp = self._node.get_clock().now().to_msg()
        message.status = [
            DiagnosticStatus(
                level=report.level.value,
                name=self._node.get_fully_qualified_name().lstrip("/"),
                message=report.message,
                values=[KeyValue(key=key, value=_text(value)) for key, value in report.values.items()],
            )
        ]
        self._publisher.publish(message)


def _text(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
