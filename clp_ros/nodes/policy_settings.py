# SPDX-License-Identifier: Apache-2.0
"""The policy node's parameters, and the settings made of them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from rclpy.node import Node

from clp_ros.control.chunk_schedule import MODES, ScheduleSettings
from clp_ros.control.replan import ReplanConfig
from clp_ros.control.watchdog import WatchdogConfig
from clp_ros.core.errors import ClpError
from clp_ros.core.settings import did_you_mean
from clp_ros.nodes.parameters import given_old, texts
from clp_ros.robots.embodiment import Embodiment
from clp_ros.robots.task import Task, load_task

PARAMETERS: dict[str, tuple[Any, str]] = {
    "checkpoint": ("", "Folder of the policy's checkpoint, or a repository on the hub"),
    "embodiment": ("", "The robot: a name under config/embodiments, or a YAML file"),
    "tf_prefix": ("", "Prefix of every joint name, as the driver's argument of that name"),
    "topics": ([""], "Topics that differ from the embodiment's, each ENTRY:=TOPIC"),
    "robot_description_wait": (
        2.0,
        "Seconds to wait for the robot's URDF, whose limits narrow the embodiment's; 0: not used",
    ),
    "controller_wait": (
        1.0,
        "Seconds to wait for the parameters of the controllers' nodes, checked when activating; 0: no check",
    ),
    "task": ("", "The instruction: a name under config/tasks, a YAML file, or the sentence itself"),
    "heads": ([""], "Heads of the checkpoint by task, each TASK:=FOLDER; ~/task switches between them"),
    "device": ("auto", "Where the policy runs: auto, cpu, cuda or cuda:N"),
    "threads": (0, "Number of torch's threads on the CPU; 0: torch's default"),
    "compile": (False, "Whether to compile the policy's denoising step with torch.compile, while configuring"),
    "replan_steps": (-1, "Control steps between chunks; 0: whenever frames arrive; -1: the task's execution length"),
    "rate_hz": (0.0, "Largest number of chunks per second; 0: no limit"),
    "max_latency": (1.0, "Seconds; a chunk whose observation is older when it could be sent is dropped"),
    "mode": ("replace", "How chunks are joined: replace, ensemble, or rtc where the policy has it"),
    "send_lead_time": (0.02, "Seconds that a message may take to reach the controllers"),
    "max_deviation": (
        0.05,
        "Largest distance of a chunk from the robot, and of the robot from its trajectory: share of the range",
    ),
    "input_timeout": (0.3, "Seconds that an input may be missing or stale before a safe stop"),
    "policy_timeout": (5.0, "Seconds that the policy may take for a chunk before a safe stop"),
    "max_faults": (20, "Faults since activating after which the node goes to its error state; 0: never"),
    "activate_timeout": (10.0, "Seconds to wait for all inputs when activating"),
    "log_folder": ("", "Folder for a file of JSON lines per run; empty: none"),
    "dry_run": (False, "Whether trajectories are published to ~/preview only, with the controller as frame_id"),
}


# Parameters of the release before, and what to do instead. Remove them in 0.3.
OLD_PARAMETERS: dict[str, str] = {
    "start_distance": "is a distance for rad and m alike: set max_deviation, a share of each joint's range",
    "lead": "is send_lead_time now",
    "blend_steps": "does nothing: a chunk is tracked from the splice on, as closely as the limits allow; remove it",
    "too_fast": "does nothing: a chunk is tracked inside the limits, and refused beyond max_deviation; remove it",
    "max_scale": "does nothing: a chunk is tracked inside the limits, and refused beyond max_deviation; remove it",
}


def given_heads(node: Node, embodiment: Embodiment) -> dict[str, Path]:
    """Returns the folders of the parameter ``heads`` by instruction. A task is given as in the parameter ``task``.

    Raises:
        ClpError: An entry is not TASK:=FOLDER, a task is not known, or an instruction has two heads.
    """
    found: dict[str, Path] = {}
    for text in texts(node.get_parameter("heads").value):
        task, sign, folder = text.rpartition(":=")
        if not sign or not folder.strip():
            raise ClpError(
                f"the parameter heads has {text!r}", where=node.get_name(), hint="write TASK:=FOLDER for each head"
            )
        instruction = load_task(task.strip(), embodiment).instruction
        if instruction in found:
            raise ClpError(
                f"the parameter heads has two heads for {instruction!r}", where=node.get_name(), hint="remove one"
            )
        found[instruction] = Path(folder.strip()).expanduser().absolute()
    return found


def replan_config(node: Node, task: Task, chunk_size: int) -> ReplanConfig:
    """Returns when chunks are made, from ``replan_steps``, ``rate_hz`` and ``max_latency``.

    Args:
        node: The node.
        task: Its execution length is the default of ``replan_steps``.
        chunk_size: Number of steps of the policy's chunks.

    Raises:
        ClpError: A parameter is out of range, or there would be more steps between chunks than a chunk has.
    """
    steps = _number(node, "replan_steps", -1)
    given = steps != -1
    steps = steps if given else task.execution_length
    if steps > chunk_size:
        source = "the parameter replan_steps" if given else "the task's execution_length"
        raise ClpError(
            f"a new chunk every {steps} control steps by {source}, but the policy's chunks have {chunk_size}",
            where=node.get_parameter("checkpoint").value,
            hint=f"set replan_steps to at most {chunk_size}, or use a checkpoint of longer chunks",
        )
    return ReplanConfig(steps, _number(node, "rate_hz", 0), _number(node, "max_latency", above=0))


def schedule(node: Node) -> ScheduleSettings:
    """Returns how chunks are joined, from ``mode``, ``send_lead_time`` and ``max_deviation``.

    Old parameters are accepted, with a warning for each.

    Raises:
        ClpError: A parameter is out of range.
    """
    given = given_old(node, OLD_PARAMETERS)
    return ScheduleSettings(
        mode=_choice(node, "mode", MODES),
        send_lead_time_s=_number(node, "lead" if "lead" in given else "send_lead_time", 0),
        max_deviation=_number(node, "max_deviation", above=0),
        start_distance=_number(node, "start_distance", above=0) if "start_distance" in given else None,
    )


def watchdog_config(node: Node) -> WatchdogConfig:
    """Returns when the robot is stopped, from ``input_timeout``, ``policy_timeout`` and ``max_faults``.

    Raises:
        ClpError: A parameter is out of range.
    """
    return WatchdogConfig(
        _number(node, "input_timeout", above=0),
        _number(node, "policy_timeout", above=0),
        _number(node, "max_faults", 0),
    )


def _number(node: Node, name: str, least: float = -math.inf, above: float = -math.inf) -> Any:
    value = node.get_parameter(name).value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ClpError(f"the parameter {name} is {value!r}", where="policy", hint="give a number")
    if not (least <= value < math.inf and value > above):
        bound = f"above {above:g}" if above > -math.inf else f"of at least {least:g}"
        raise ClpError(f"the parameter {name} is {value}", where="policy", hint=f"give a number {bound}")
    return value


def _choice(node: Node, name: str, choices: tuple[str, ...]) -> Any:
    value = node.get_parameter(name).value
    if value not in choices:
        raise ClpError(f"the parameter {name} is {value!r}", where="policy", hint=did_you_mean(value, list(choices)))
    return value
