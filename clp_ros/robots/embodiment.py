# SPDX-License-Identifier: Apache-2.0
"""An embodiment: the topics of a robot's cameras and joints, and how they map to a policy's features."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from clp_ros.core.errors import ClpError
from clp_ros.core.settings import Settings, did_you_mean, find_settings, load_settings
from clp_ros.robots.actions import Actions, ActionSource, CommandedJoint, commanded_joints
from clp_ros.robots.controller import Controller, Joint
from clp_ros.robots.topics import JOINT_STATE_TYPE, JOINT_TRAJECTORY_TYPE, Sync, TopicName, in_full

_logger = logging.getLogger(__name__)


def _repeated(names: list[str]) -> list[str]:
    return sorted(name for name, count in Counter(names).items() if count > 1)


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
    type: Annotated[Literal["sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage"], BeforeValidator(in_full)]
    feature: str = Field(pattern=r"^observation\.images?(\.[A-Za-z0-9_]+)*$")
    height: Annotated[int, Field(gt=0)] = 480
    width: Annotated[int, Field(gt=0)] = 640
    sync: Sync

    @property
    def slot(self) -> str:
        """Old name of :attr:`feature`, removed in the next release."""
        return self.feature


class JointStates(Settings):
    """A sensor_msgs/JointState topic.

    Attributes:
        topic: Where it is.
        sync: How it is sampled.
        robot_description: Topic of the URDF of its joints; by default ``robot_description`` beside ``topic``.
    """

    topic: TopicName
    sync: Sync
    robot_description: TopicName | None = None

    @property
    def description_topic(self) -> str:
        """Topic of the URDF of its joints, if the robot publishes one."""
        return self.robot_description or f"{self.topic.rpartition('/')[0]}/robot_description"


class SpeedScaling(Settings):
    """The robot's current speed scaling, as from Universal_Robots_ROS2_Driver's speed_scaling_state_broadcaster.

    Attributes:
        topic: std_msgs/Float64, percent.
        controllers: The embodiment's controllers that slow down trajectories accordingly by themselves.
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
    actions: Actions = Field(default_factory=lambda: Actions(source="next_state"))

    @model_validator(mode="before")
    @classmethod
    def _accept_slot(cls, document: Any) -> Any:
        """Accepts the old name of a camera's ``feature``; see :class:`Camera`."""
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
                    advice = did_you_mean(name, list(self.controllers))
                    raise ValueError(f"speed_scaling.controllers: there is no controller {name!r}, {advice}")
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

    @model_validator(mode="after")
    def _actions_are_whole(self) -> Self:
        # A topic may have two roles: a leader's JointStates may be on the follower's topic, and recorded commands are
        # usually on the controllers' topics.
        shared = dict.fromkeys((states.topic for states in self.joint_states.values()), JOINT_STATE_TYPE)
        shared |= dict.fromkeys((controller.topic for controller in self.controllers.values()), JOINT_TRAJECTORY_TYPE)
        shared |= {camera.topic: camera.type for camera in self.cameras.values()}
        commanded: dict[int, str] = {}
        for name, entry in self.actions.topics.items():
            where = f"actions.topics.{name}"
            if shared.setdefault(entry.topic, entry.type) != entry.type:
                raise ValueError(f"{where}: {entry.topic} is a {shared[entry.topic]}, not a {entry.type}")
            try:
                joints = commanded_joints(entry, self.controllers)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
            if entry.has_names and (twice := _repeated([joint.name for joint in joints])):
                raise ValueError(f"{where}: the joint {twice[0]} is there twice")
            for joint in joints:
                if joint.index in commanded:
                    both = f"actions.topics.{commanded[joint.index]} and {name}"
                    raise ValueError(f"the joint {self.joints[joint.index].name} is commanded by {both}")
                commanded[joint.index] = name
        missing = [joint.name for index, joint in enumerate(self.joints) if index not in commanded]
        if self.actions.topics and missing:
            raise ValueError(f"actions.topics: none commands the joint {missing[0]}")
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

    @property
    def action_topics(self) -> dict[str, str]:
        """ROS type name of every topic from which actions are read; empty if they are the next states."""
        if self.actions.source != "topics":
            return {}
        return {entry.topic: entry.type for entry in self.actions.topics.values()}

    @property
    def demonstration_topics(self) -> dict[str, str]:
        """ROS type name of every topic in a demonstration: inputs and actions."""
        return self.topics | self.action_topics

    def commanded_joints(self, name: str) -> list[CommandedJoint]:
        """Returns the joints that an entry of ``actions.topics`` commands, in the order of its data."""
        return commanded_joints(self.actions.topics[name], self.controllers)

    def with_action_source(self, source: ActionSource) -> Embodiment:
        """Returns the same robot with another source of actions.

        Raises:
            ClpError: The embodiment declares no topics with commands.
        """
        if source == "topics" and not self.actions.topics:
            raise ClpError(
                "the embodiment declares no topics with actions", where=self.name, hint="write actions.topics"
            )
        return self.model_copy(update={"actions": self.actions.model_copy(update={"source": source})})

    def joint_indices(self, source: str) -> list[int]:
        """Returns the indices in :attr:`joints` of the joints of an entry of ``joint_states``, ascending."""
        sources = [controller.joint_states for controller in self.controllers.values() for _ in controller.joints]
        return [index for index, name in enumerate(sources) if name == source]

    def sync_of(self, topic: str) -> Sync:
        """Returns how an input topic is sampled."""
        sources: list[Camera | JointStates] = [*self.cameras.values(), *self.joint_states.values()]
        return next(source.sync for source in sources if source.topic == topic)


def load_embodiment(
    name_or_path: str | Path, tf_prefix: str = "", topics: Mapping[str, str] | None = None
) -> Embodiment:
    """Reads an embodiment by its name under config/embodiments, or from a .yaml file.

    Args:
        name_or_path: Its name or file.
        tf_prefix: Prefix for the name of every joint, like the drivers' argument of that name.
        topics: Other topic names, by their entry in the file: ``cameras.cam_high``, ``controllers.arm``,
            ``joint_states.ur``, ``joint_states.ur.robot_description``, ``speed_scaling``, ``actions.arm``.

    Raises:
        ClpError: There is no such file, or a key is wrong (the message names it); or ``topics`` names an unknown entry,
            or gives two entries one topic.
    """
    path = find_settings(name_or_path, "embodiments", "embodiment")
    embodiment = load_settings(path, Embodiment)
    if not tf_prefix and not topics:
        return embodiment
    document = embodiment.model_dump()
    for controller in document["controllers"].values():
        for joint in controller["joints"]:
            joint["name"] = tf_prefix + joint["name"]
    for entry in document["actions"]["topics"].values():
        for joint in entry["joints"]:
            owner, _, name = joint["joint"].rpartition("/")
            known = owner in document["controllers"]
            joint["joint"] = f"{owner}/{tf_prefix}{name}" if known else tf_prefix + joint["joint"]
    entries = _topic_entries(document)
    for name, topic in (topics or {}).items():
        if name not in entries:
            raise ClpError(
                f"{embodiment.name} has no topic {name!r}", where=path, hint=did_you_mean(name, list(entries))
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
            f"a topic given does not fit: {given}{what.removeprefix('Value error, ')}",
            where=place or path,
            hint="give each entry an absolute topic of its own",
        ) from error


def _topic_entries(document: Mapping[str, Any]) -> dict[str, tuple[dict[str, Any], str]]:
    """Returns the topics of an embodiment's document that can be renamed: by entry, the mapping and its key."""
    kinds = ("cameras", "joint_states", "controllers")
    found = {f"{kind}.{name}": (entry, "topic") for kind in kinds for name, entry in document[kind].items()}
    for name, entry in document["joint_states"].items():
        found[f"joint_states.{name}.robot_description"] = (entry, "robot_description")
    found |= {f"actions.{name}": (entry, "topic") for name, entry in document["actions"]["topics"].items()}
    if document.get("speed_scaling"):
        found["speed_scaling"] = (document["speed_scaling"], "topic")
    return found
