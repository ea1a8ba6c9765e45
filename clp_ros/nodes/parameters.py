# SPDX-License-Identifier: Apache-2.0
"""Declares and reads ROS parameters, including those that several nodes share and those of the release before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rcl_interfaces.msg import ParameterDescriptor
from rclpy.node import Node

from clp_ros.checkpoints.hub import is_repository, local_folder
from clp_ros.core.errors import ClpError
from clp_ros.core.settings import did_you_mean
from clp_ros.nodes.compat import given_parameters
from clp_ros.robots.embodiment import Embodiment, load_embodiment


def declare(node: Node, parameters: Mapping[str, tuple[Any, str]], *, read_only: bool, untyped: str = "") -> None:
    """Declares parameters.

    Args:
        node: The node.
        parameters: Default value and description by name. The default also determines the type.
        read_only: Whether the parameters are read once at start. Setting one later is then refused.
        untyped: Name of a parameter that accepts several types.
    """
    for name, (default, description) in parameters.items():
        descriptor = ParameterDescriptor(description=description, read_only=read_only, dynamic_typing=name == untyped)
        node.declare_parameter(name, default, descriptor)


def declare_old(node: Node, parameters: Mapping[str, str]) -> None:
    """Declares parameters of the release before, without values.

    Args:
        node: The node.
        parameters: By old name, what the user must do instead: ``is NEW now``, or ``does nothing: …``.
    """
    for name, instead in parameters.items():
        node.declare_parameter(name, None, ParameterDescriptor(description=f"Old: {instead}", dynamic_typing=True))


def given_old(node: Node, parameters: Mapping[str, str]) -> list[str]:
    """Returns the names of old parameters that have a value, and logs a warning for each.

    Args:
        node: The node.
        parameters: As for :func:`declare_old`.
    """
    given = [name for name in parameters if node.get_parameter(name).value is not None]
    for name in given:
        node.get_logger().warning(f"the parameter {name} {parameters[name]}")
    return given


def check_known(node: Node, names: Sequence[str]) -> None:
    """Checks that every given parameter exists. rclpy would ignore one that does not, as after a misspelling.

    Args:
        node: The node.
        names: The known names, for the hint.

    Raises:
        ClpError: A given parameter is not declared.
    """
    for name in given_parameters(node):
        if not node.has_parameter(name) and not name.startswith("qos_overrides."):
            raise ClpError(f"unknown parameter {name!r}", where=node.get_name(), hint=did_you_mean(name, list(names)))


def given_text(node: Node, name: str, hint: str) -> str:
    """Returns a text parameter.

    Args:
        node: The node.
        name: Its name.
        hint: What to give, for the error.

    Raises:
        ClpError: It is empty.
    """
    value = node.get_parameter(name).value
    if not value.strip():
        raise ClpError(f"the parameter {name} is empty", where=node.get_name(), hint=f"give {hint}")
    return value


def texts(value: str | list[str]) -> list[str]:
    """Returns the texts of a list parameter that are not empty. ROS has no empty list, so files write ``[""]``."""
    return [text for text in ([value] if isinstance(value, str) else value) if text]


def checkpoint_folder(node: Node) -> Path:
    """Returns the absolute folder of the parameter ``checkpoint``. A repository id is downloaded.

    Raises:
        ClpError: It is empty, or the repository is not in the hub's cache and cannot be downloaded.
    """
    value = node.get_parameter("checkpoint").value
    if not value:
        raise ClpError("the parameter checkpoint is empty", where=node.get_name(), hint="give the checkpoint's folder")
    if is_repository(value):
        node.get_logger().info(f"{value}: from the hub's cache, or downloaded")
    return local_folder(Path(value).expanduser()).absolute()


def given_embodiment(node: Node) -> Embodiment:
    """Returns the robot of the parameters ``embodiment``, ``tf_prefix`` and ``topics``.

    Raises:
        ClpError: See :func:`embodiment_parameters` and :func:`load_embodiment`.
    """
    return load_embodiment(*embodiment_parameters(node))


def embodiment_parameters(node: Node) -> tuple[str, str, dict[str, str]]:
    """Returns the parameters ``embodiment``, ``tf_prefix`` and ``topics``, the last as topic by entry.

    Raises:
        ClpError: ``embodiment`` is empty, or an entry of ``topics`` is not ENTRY:=TOPIC.
    """
    name = given_text(node, "embodiment", "a name under config/embodiments, or a YAML file")
    tf_prefix, topics = (node.get_parameter(key).value for key in ("tf_prefix", "topics"))
    renamed = {}
    for text in texts(topics):
        entry, sign, topic = text.partition(":=")
        if not sign:
            raise ClpError(
                f"the parameter topics has {text!r}",
                where=node.get_name(),
                hint="write ENTRY:=TOPIC, cameras.top:=/top",
            )
        renamed[entry.strip()] = topic.strip()
    return name, tf_prefix, renamed


def output_folder(node: Node, checkpoint: Path, suffix: str) -> Path:
    """Returns the absolute folder of the parameter ``output``.

    The default is beside the checkpoint. For a repository, which lies in the hub's cache, the default is in the current
    folder.

    Args:
        node: The node.
        checkpoint: The checkpoint's folder.
        suffix: The default's name is that of the checkpoint with this suffix.
    """
    value = node.get_parameter("output").value
    if value:
        return Path(value).expanduser().absolute()
    given = node.get_parameter("checkpoint").value
    if is_repository(given):
        return Path.cwd() / f"{given.partition('@')[0].rpartition('/')[2]}_{suffix}"
    return checkpoint.with_name(f"{checkpoint.name}_{suffix}")
