# SPDX-License-Identifier: Apache-2.0
"""What a node says of itself on /diagnostics, once a second, whatever else it is doing."""

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
    """How a node is, as diagnostic_msgs/DiagnosticStatus has it."""

    OK = DiagnosticStatus.OK
    WARN = DiagnosticStatus.WARN
    ERROR = DiagnosticStatus.ERROR
    STALE = DiagnosticStatus.STALE


@dataclass(frozen=True)
class Report:
    """One status.

    Attributes:
        level: How the node is.
        message: That in a few words.
        values: Figures, by name; floats are shortened to four digits.
    """

    level: Level
    message: str
    values: Mapping[str, object] = field(default_factory=dict)


class Diagnostics:
    """Publishes a node's report on /diagnostics at 1 Hz.

    It has a callback group of its own, so it goes on while another callback of the node works; that needs a
    multi-threaded executor. It goes by a steady clock: a paused simulation does not silence it.

    Args:
        node: The node; its full name is the status's name.
        report: Called once a second on an executor's thread; it must not block.
    """

    def __init__(self, node: Node, report: Callable[[], Report]) -> None:
        self._node = node
        self._report = report
        group = MutuallyExclusiveCallbackGroup()
        self._publisher = node.create_publisher(DiagnosticArray, "/diagnostics", 10, callback_group=group)
        steady = Clock(clock_type=ClockType.STEADY_TIME)
        self._timer = node.create_timer(PERIOD_S, self.publish, callback_group=group, clock=steady)

    def publish(self) -> None:
        """Publishes the report now, as when a state worth telling at once has changed."""
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
