# SPDX-License-Identifier: Apache-2.0
"""The policy node's parameters as the settings of what runs inside it."""

from __future__ import annotations

import math
from typing import Any

from rclpy.node import Node

from clp_ros.control.chunk_schedule import MODES, ScheduleSettings
from clp_ros.control.pace import Pace, Watch
from clp_ros.control.run_log import RunLog
from clp_ros.errors import ClpError
from clp_ros.robots.task import Task
from clp_ros.settings import did_you_mean


def pace(node: Node, task: Task, chunk_size: int) -> Pace:
    """When chunks are made: ``replan_steps``, ``rate_hz``, ``max_latency``.

    Raises:
        ClpError: One is out of its range, or there would be more steps between chunks than a chunk has.
    """
    steps = _number(node, "replan_steps", -1)
    given = steps != -1
    steps = steps if given else task.execution_length
    if steps > chunk_size:
        whose = "the parameter replan_steps" if given else "the task's execution_length"
        raise ClpError(
            f"a new chunk every {steps} control steps by {whose}, but the policy's chunks have {chunk_size}",
            where=node.get_parameter("checkpoint").value,
            fix=f"set replan_steps to at most {chunk_size}, or use a checkpoint of longer chunks",
        )
    return Pace(steps, _number(node, "rate_hz", 0), _number(node, "max_latency", above=0))


def schedule(node: Node) -> ScheduleSettings:
    """How chunks are joined: ``mode``, ``blend_steps``, ``lead``, ``too_fast``, ``max_scale``, ``start_distance``.

    Raises:
        ClpError: One is out of its range.
    """
    return ScheduleSettings(
        mode=_choice(node, "mode", MODES),
        blend_steps=_number(node, "blend_steps", 1),
        lead_s=_number(node, "lead", 0),
        too_fast=_choice(node, "too_fast", ("scale", "refuse")),
        max_scale=_number(node, "max_scale", 1),
        start_distance=_number(node, "start_distance", above=0),
    )


def watch(node: Node) -> Watch:
    """When the robot is stopped: ``input_timeout``, ``policy_timeout``, ``max_faults``.

    Raises:
        ClpError: One is out of its range.
    """
    return Watch(
        _number(node, "input_timeout", above=0),
        _number(node, "policy_timeout", above=0),
        _number(node, "max_faults", 0),
    )


def run_log(node: Node) -> RunLog:
    """The log in ``log_folder``; none where that is empty."""
    folder = node.get_parameter("log_folder").value
    return RunLog(folder or None)


def _number(node: Node, name: str, least: float = -math.inf, above: float = -math.inf) -> Any:
    value = node.get_parameter(name).value
    if not (least <= value < math.inf and value > above):
        bound = f"above {above:g}" if above > -math.inf else f"of at least {least:g}"
        raise ClpError(f"the parameter {name} is {value}", where="policy", fix=f"give a number {bound}")
    return value


def _choice(node: Node, name: str, choices: tuple[str, ...]) -> Any:
    value = node.get_parameter(name).value
    if value not in choices:
        raise ClpError(f"the parameter {name} is {value!r}", where="policy", fix=did_you_mean(value, list(choices)))
    return value
