# SPDX-License-Identifier: Apache-2.0
"""An embodiment: which topics a robot's cameras and joints are on, and how they map to a policy's features."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from clp_ros.bags.names import absolute_topic, full_type
from clp_ros.core.errors import ClpError
from clp_ros.core.settings import Settings, did_you_mean, find_settings, load_settings

_logger = logging.getLogger(__name__)

Positive = Annotated[float, Field(gt=0)]
JOINT_STATE_TYPE = "sensor_msgs/msg/JointState"
CAMERA_TYPES = ("sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage")
# Of what a joint may report to be beyond its limits: the share of its range, and the least, rad or m. The unit of the
# controller is not known of a normalised joint: the smaller number.
_TOLERANCE_SHARE = 0.05
_LEAST_TOLERANCE = {"rad": 0.05, "m": 0.005, "normalised": 0.005}


def _with_slash(name: Any) -> Any:
    return absolute_topic(name) if isinstance(name, str) and name and not name.startswith("~") else name


def _in_full(name: Any) -> Any:
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
    if wanted not in CAMERA_TYPES:
        return ""
    if found in CAMERA_TYPES:
        return "correct its type in the embodiment"
    return f"name a topic of type {' or '.join(CAMERA_TYPES)} in the embodiment: cameras are read from those only"


def _repeated(names: list[str]) -> list[str]:
    return sorted(name for name, count in Counter(names).items() if count > 1)


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


class Camera(Settings):
    """A camera topic.

    Attributes:
        topic: Where it is.
        type: Of its messages.
        feature: The policy's feature that it feeds, e.g. ``observation.images.cam_high``. ``slot`` is the key's old
            name, accepted for one release.
        height, width: Its size in pixels, for checkpoints made for this robot.
        sync: How it is sampled.
    """

    topic: TopicName
    type: Annotated[Literal["sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage"], BeforeValidator(_in_full)]
    feature: str = Field(pattern=r"^observation\.images?(\.[A-Za-z0-9_]+)*$")
    height: Annotated[int, Field(gt=0)] = 480
    width: Annotated[int, Field(gt=0)] = 640
    sync: Sync

    @property
    def slot(self) -> str:
        """Old name of :attr:`feature`; it goes with the next release."""
        return self.feature


class JointStates(Settings):
    """A sensor_msgs/JointState topic.

    Attributes:
        topic: Where it is.
        sync: How it is sampled.
        robot_description: Where the URDF of its joints is; by default ``robot_description`` beside ``topic``.
    """

    topic: TopicName
    sync: Sync
    robot_description: TopicName | None = None

    @property
    def description_topic(self) -> str:
        """Where the URDF of its joints is, if the robot publishes one."""
        return self.robot_description or f"{self.topic.rpartition('/')[0]}/robot_description"


class Joint(Settings):
    """One joint of a controller.

    Attributes:
        name: As the JointState and the controller name it.
        lower, upper: Position limits, in the controller's unit (rad or m).
        velocity: Velocity limit, in that unit per second.
        acceleration: Acceleration limit, in that unit per second squared; None where there is none.
        unit: What the policy sees: ``rad`` or ``m`` as they are, or ``normalised``, 0 at ``zero`` and 1 at ``one``.
        zero, one: For ``normalised``, and None otherwise; by default lower and upper.
        tolerance: How far beyond its limits the joint may report to be, in the controller's unit; see
            :attr:`measured_tolerance` for the default.
    """

    name: str = Field(min_length=1)
    lower: float
    upper: float
    velocity: Positive
    acceleration: Positive | None = None
    unit: Literal["rad", "m", "normalised"]
    zero: float | None = None
    one: float | None = None
    tolerance: Positive | None = None

    @model_validator(mode="after")
    def _limits_and_units_make_sense(self) -> Self:
        if self.lower >= self.upper:
            raise ValueError(f"joint {self.name}: lower must be below upper")
        if self.unit != "normalised" and not (self.zero is None and self.one is None):
            raise ValueError(f"joint {self.name}: zero and one belong to unit normalised")
        if self.unit == "normalised" and self.scale == 0:
            raise ValueError(f"joint {self.name}: zero and one must differ")
        return self

    @property
    def measured_tolerance(self) -> float:
        """How far beyond its limits the joint may report to be, in the controller's unit.

        Unless ``tolerance`` says otherwise: a share of its range, for calibration is never perfect, but 0.05 rad or
        5 mm at least, for a finger's mechanics give more than a share of its short stroke.
        """
        if self.tolerance is not None:
            return self.tolerance
        return max(_TOLERANCE_SHARE * (self.upper - self.lower), _LEAST_TOLERANCE[self.unit])

    @property
    def offset(self) -> float:
        """The controller's position where the policy's value is 0."""
        if self.unit != "normalised":
            return 0.0
        return self.lower if self.zero is None else self.zero

    @property
    def scale(self) -> float:
        """The controller's way for a step of 1 in the policy's value: position = offset + scale * value."""
        if self.unit != "normalised":
            return 1.0
        return (self.upper if self.one is None else self.one) - self.offset


class Controller(Settings):
    """A joint_trajectory_controller: where its trajectories go and where its joints are measured."""

    joint_states: str
    topic: TopicName
    joints: Annotated[list[Joint], Field(min_length=1)]

    @model_validator(mode="after")
    def _joints_are_unique(self) -> Self:
        names = [joint.name for joint in self.joints]
        twice = _repeated(names)
        if twice:
            raise ValueError(f"the joint {twice[0]} is there twice")
        return self


class SpeedScaling(Settings):
    """How fast the robot moves at present, as Universal_Robots_ROS2_Driver's speed_scaling_state_broadcaster says.

    Attributes:
        topic: std_msgs/Float64, percent.
        controllers: Those of the embodiment that pass through a trajectory as much more slowly by themselves.
    """

    topic: TopicName
    controllers: list[str]


class Embodiment(Settings):
    """A robot. Its controllers' joints, in file order, are the components of ``observation.state`` and ``action``."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    description: str
    control_rate_hz: Annotated[float, Field(ge=0.1, le=1000)]
    cameras: Annotated[dict[str, Camera], Field(min_length=1)]
    joint_states: Annotated[dict[str, JointStates], Field(min_length=1)]
    controllers: Annotated[dict[str, Controller], Field(min_length=1)]
    speed_scaling: SpeedScaling | None = None

    @model_validator(mode="before")
    @classmethod
    def _accept_slot(cls, document: Any) -> Any:
        """Takes the old name of a camera's ``feature``; see :class:`Camera`."""
        cameras = document.get("cameras") if isinstance(document, dict) else None
        if not isinstance(cameras, dict):
            return document
        renamed = {
            name: {"feature" if key == "slot" else key: value for key, value in camera.items()}
            for name, camera in cameras.items()
            if isinstance(camera, dict) and "slot" in camera and "feature" not in camera
        }
        if not renamed:
            return document
        what = ", ".join(f"cameras.{name}.slot" for name in renamed)
        _logger.warning("embodiment %s: %s: the key is now 'feature'", document.get("name"), what)
        return document | {"cameras": cameras | renamed}

    @model_validator(mode="after")
    def _names_fit_together(self) -> Self:
        for name, controller in self.controllers.items():
            if controller.joint_states not in self.joint_states:
                raise ValueError(
                    f"controllers.{name}.joint_states is {controller.joint_states!r}, "
                    f"not one of joint_states: {', '.join(self.joint_states)}"
                )
        inputs = [camera.topic for camera in self.cameras.values()]
        inputs += [states.topic for states in self.joint_states.values()]
        if self.speed_scaling is not None:
            inputs.append(self.speed_scaling.topic)
            for name in self.speed_scaling.controllers:
                if name not in self.controllers:
                    raise ValueError(f"speed_scaling.controllers: {did_you_mean(name, list(self.controllers))}")
        outputs = [controller.topic for controller in self.controllers.values()]
        features = [camera.feature for camera in self.cameras.values()]
        for what, names in (("topic", inputs + outputs), ("feature", features)):
            twice = _repeated(names)
            if twice:
                raise ValueError(f"the {what} {twice[0]} is there twice")
        for source in self.joint_states:
            readers = [controller for controller in self.controllers.values() if controller.joint_states == source]
            if not readers:
                raise ValueError(f"joint_states.{source} is used by no controller")
            names = [joint.name for controller in readers for joint in controller.joints]
            twice = _repeated(names)
            if twice:
                raise ValueError(f"the joint {twice[0]} of joint_states {source} has two controllers")
        return self

    @cached_property
    def joints(self) -> tuple[Joint, ...]:
        """All joints in vector order."""
        return tuple(joint for controller in self.controllers.values() for joint in controller.joints)

    @property
    def action_size(self) -> int:
        """Length of ``observation.state`` and of one action."""
        return len(self.joints)

    @property
    def period_ns(self) -> int:
        """One control step in nanoseconds."""
        return round(1e9 / self.control_rate_hz)

    @property
    def topics(self) -> dict[str, str]:
        """ROS type name of every input topic."""
        topics = {camera.topic: camera.type for camera in self.cameras.values()}
        return topics | {states.topic: JOINT_STATE_TYPE for states in self.joint_states.values()}

    def joint_indices(self, source: str) -> list[int]:
        """Where the joints of an entry of ``joint_states`` belong in :attr:`joints`, ascending."""
        sources = [controller.joint_states for controller in self.controllers.values() for _ in controller.joints]
        return [index for index, name in enumerate(sources) if name == source]

    def sync_of(self, topic: str) -> Sync:
        """How an input topic is sampled."""
        return {source.topic: source.sync for source in (*self.cameras.values(), *self.joint_states.values())}[topic]


def load_embodiment(
    name_or_path: str | Path, tf_prefix: str = "", topics: Mapping[str, str] | None = None
) -> Embodiment:
    """Reads an embodiment by its name under config/embodiments, or from a .yaml file.

    Args:
        name_or_path: Its name or file.
        tf_prefix: Put before the name of every joint, as a driver's argument of that name does.
        topics: Topics that are elsewhere, by their entry in the file: ``cameras.cam_high``, ``controllers.arm``,
            ``joint_states.ur``, ``joint_states.ur.robot_description``.

    Raises:
        ClpError: There is no such file, or something in it is wrong; it names the key. Or ``topics`` names an entry
            that does not exist, or makes two topics one.
    """
    path = find_settings(name_or_path, "embodiments", "embodiment")
    embodiment = load_settings(path, Embodiment)
    if not tf_prefix and not topics:
        return embodiment
    document = embodiment.model_dump()
    for controller in document["controllers"].values():
        for joint in controller["joints"]:
            joint["name"] = tf_prefix + joint["name"]
    entries = _topic_entries(document)
    for name, topic in (topics or {}).items():
        if name not in entries:
            raise ClpError(
                f"{embodiment.name} has no topic {name!r}", where=path, fix=did_you_mean(name, list(entries))
            )
        entry, key = entries[name]
        entry[key] = topic
    try:
        return Embodiment.model_validate(document)
    except ValidationError as error:
        fault = error.errors()[0]
        place = ".".join(str(part) for part in fault["loc"]).removesuffix(".topic")
        what = "is not an absolute topic" if fault["type"] == "string_pattern_mismatch" else fault["msg"]
        given = f"{(topics or {}).get(place, '')} " if place else ""
        raise ClpError(
            f"the topics given do not fit: {given}{what.removeprefix('Value error, ')}", where=place or path
        ) from error


def _topic_entries(document: Mapping[str, Any]) -> dict[str, tuple[dict[str, Any], str]]:
    """The topics of an embodiment's document that can be given another name: by entry, the mapping and its key."""
    kinds = ("cameras", "joint_states", "controllers")
    found = {f"{kind}.{name}": (entry, "topic") for kind in kinds for name, entry in document[kind].items()}
    for name, entry in document["joint_states"].items():
        found[f"joint_states.{name}.robot_description"] = (entry, "robot_description")
    if document.get("speed_scaling"):
        found["speed_scaling"] = (document["speed_scaling"], "topic")
    return found
