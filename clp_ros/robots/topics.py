# SPDX-License-Identifier: Apache-2.0
"""What the topics of an embodiment have in common: names, types, and how they are sampled on control ticks."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from clp_ros.bags.names import absolute_topic, full_type
from clp_ros.core.settings import Settings

Positive = Annotated[float, Field(gt=0)]
JOINT_STATE_TYPE = "sensor_msgs/msg/JointState"
JOINT_TRAJECTORY_TYPE = "trajectory_msgs/msg/JointTrajectory"
FLOAT64_MULTI_ARRAY_TYPE = "std_msgs/msg/Float64MultiArray"
CAMERA_TYPES = ("sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage")
_COMMAND_TYPES = (JOINT_TRAJECTORY_TYPE, FLOAT64_MULTI_ARRAY_TYPE)


def _with_slash(name: Any) -> Any:
    return absolute_topic(name) if isinstance(name, str) and name and not name.startswith("~") else name


def in_full(name: Any) -> Any:
    """A type's full name, where it is text."""
    return full_type(name) if isinstance(name, str) else name


TopicName = Annotated[
    str, BeforeValidator(_with_slash), Field(pattern=r"^/[A-Za-z_][A-Za-z0-9_]*(/[A-Za-z_][A-Za-z0-9_]*)*$")
]


def type_advice(wanted: str, found: str) -> str:
    """What to do where a topic of an embodiment is of type ``found``, and ``wanted`` is what the embodiment says.

    Empty where ``wanted`` is no type of an input.
    """
    if wanted == JOINT_STATE_TYPE:
        return f"name a topic of type {JOINT_STATE_TYPE} in the embodiment: joint states are read from those only"
    if wanted in _COMMAND_TYPES:
        return "correct its type under actions in the embodiment"
    if wanted not in CAMERA_TYPES:
        return ""
    if found in CAMERA_TYPES:
        return "correct its type in the embodiment"
    return f"name a topic of type {' or '.join(CAMERA_TYPES)} in the embodiment: cameras are read from those only"


class Sync(Settings):
    """How a topic is sampled on control ticks. Nothing here has a default, but ``tolerance_ms``.

    Attributes:
        policy: ``hold``: the newest message, however old. ``asof``: the newest, if not older than ``tolerance_ms``.
            ``drop``: the newest, if its time is less than one control step ago. A tick without it is not used.
        tolerance_ms: Milliseconds, for ``asof``.
        stamp: Which time a message has: ``header`` (when it was measured) or ``receive`` (when it came in). No message
            serves a tick before its time.
    """

    policy: Literal["hold", "asof", "drop"]
    tolerance_ms: Positive | None = None
    stamp: Literal["header", "receive"]

    @model_validator(mode="after")
    def _tolerance_belongs_to_asof(self) -> Self:
        if (self.policy == "asof") != (self.tolerance_ms is not None):
            raise ValueError("tolerance_ms belongs to policy asof, which needs it")
        return self
