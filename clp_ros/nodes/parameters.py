# SPDX-License-Identifier: Apache-2.0
"""Declaring a node's parameters, and those that several nodes read alike."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rcl_interfaces.msg import ParameterDescriptor
from rclpy.node import Node

from clp_ros.checkpoints.hub import is_repository, local_folder
from clp_ros.core.errors import ClpError
from clp_ros.robots.embodiment import Embodiment, load_embodiment


def declare(node: Node, parameters: Mapping[str, tuple[Any, str]], *, read_only: bool, untyped: str = "") -> None:
    """Declares parameters.

    Args:
        node: The node.
        parameters: Default, which also fixes the type, and description, by name.
        read_only: Whether they hold from the start on: setting one later is refused, instead of doing nothing.
        untyped: Name of one that may have several types.
    """
    for name, (default, description) in parameters.items():
        descriptor = ParameterDescriptor(description=description, read_only=read_only, dynamic_typing=name == untyped)
        node.declare_parameter(name, default, descriptor)


def texts(value: str | list[str]) -> list[str]:
    """The texts of a parameter that are not empty: ROS has no type for an empty list, so files say ``[""]``."""
    return [text for text in ([value] if isinstance(value, str) else value) if text]


def checkpoint_folder(node: Node) -> Path:
    """The folder of the parameter ``checkpoint``, absolute. It may be a repository id, which is then downloaded.

    Raises:
        ClpError: It is empty, or a repository that is neither in the hub's cache nor can be downloaded.
    """
    value = node.get_parameter("checkpoint").value
    if not value:
        raise ClpError("the parameter checkpoint is empty", where=node.get_name(), fix="give the checkpoint's folder")
    if is_repository(value):
        node.get_logger().info(f"{value}: from the hub's cache, or downloaded")
    return local_folder(Path(value).expanduser()).absolute()


def given_embodiment(node: Node) -> Embodiment:
    """The robot of the parameters ``embodiment``, ``tf_prefix`` and ``topics``.

    Raises:
        ClpError: See :func:`embodiment_parameters` and :func:`load_embodiment`.
    """
    return load_embodiment(*embodiment_parameters(node))


def embodiment_parameters(node: Node) -> tuple[str, str, dict[str, str]]:
    """The parameters ``embodiment``, ``tf_prefix`` and ``topics``, the last by entry.

    Raises:
        ClpError: ``embodiment`` is empty, or an entry of ``topics`` is not ENTRY:=TOPIC.
    """
    name, tf_prefix, topics = (node.get_parameter(key).value for key in ("embodiment", "tf_prefix", "topics"))
    if not name.strip():
        raise ClpError(
            "the parameter embodiment is empty",
            where=node.get_name(),
            fix="give a name under config/embodiments, or a YAML file",
        )
    renamed = {}
    for text in texts(topics):
        entry, sign, topic = text.partition(":=")
        if not sign:
            raise ClpError(
                f"the parameter topics has {text!r}", where=node.get_name(), fix="write ENTRY:=TOPIC, cameras.top:=/top"
            )
        renamed[entry.strip()] = topic.strip()
    return name, tf_prefix, renamed


def output_folder(node: Node, checkpoint: Path, suffix: str) -> Path:
    """The parameter ``output``, absolute; by default beside the checkpoint, named as it with a suffix.

    A repository's lies in the hub's cache: by default, the folder is then made where the node was started.
    """
    value = node.get_parameter("output").value
    if value:
        return Path(value).expanduser().absolute()
    given = node.get_parameter("checkpoint").value
    if is_repository(given):
        return Path.cwd() / f"{given.partition('@')[0].rpartition('/')[2]}_{suffix}"
    return checkpoint.with_name(f"{checkpoint.name}_{suffix}")
