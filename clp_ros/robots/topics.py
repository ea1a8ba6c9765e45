# SPDX-License-Identifier: Apache-2.0
"""Names, types and sampling of an embodiment's topics."""

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
    """Returns a type's full name if it is text."""
    return full_type(name) if isinstance(name, str) else name


TopicName = Annotated[
    str, BeforeValidator(_with_slash), Field(pattern=r"^/[A-Za-z_][A-Za-z0-9_]*(/[A-Za-z_][A-Za-z0-9_]*)*$")
]


def type_advice(wanted: str, found: str) -> str:
    """Returns the hint for a topic of type ``found`` for which the embodiment says ``wanted``.

    Empty if ``wanted`` is not the type of an input.
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
    """How a topic is sampled on control ticks. Only ``tolerance_ms`` has a default.

    Attributes:
        policy: ``hold``: the newest message, however old. ``asof``: the newest, if not older than ``tolerance_ms``.
            ``drop``: the newest, if its time is less than one control step ago. A tick without it is not used.
        tolerance_ms: Milliseconds, for ``asof``.
        stamp: Time of a message: ``header`` (time of the measurement) or ``receive`` (time of arrival). A message is
            not used at earlier ticks.
    """

    policy: Literal["hold", "asof", "drop"]
    tolerance_ms: Positive | None = None
    stamp: Literal["header", "receive"]

    @model_validator(mode="after")
    def _tolerance_belongs_to_asof(self) -> Self:
        if (self.policy == "asof") != (self.tolerance_ms is not None):
            raise ValueError("tolerance_ms belongs to policy asof, which needs it")
        return self
