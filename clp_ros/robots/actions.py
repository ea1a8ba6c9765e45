# SPDX-License-Identifier: Apache-2.0
"""The source of a demonstration's actions: the next measured state, or topics with commands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from clp_ros.core.settings import Settings, did_you_mean
from clp_ros.robots.topics import FLOAT64_MULTI_ARRAY_TYPE, Sync, TopicName, in_full

if TYPE_CHECKING:
    from clp_ros.robots.controller import Controller, Joint

ActionSource = Literal["next_state", "topics"]


class ActionJoint(Settings):
    """One joint of a topic with commands.

    Attributes:
        joint: The embodiment's joint; ``CONTROLLER/JOINT`` if several controllers have a joint of that name.
        name: Its name in the topic's messages, which may differ for a leader arm; by default the embodiment's name.
        zero, one: For a joint with the unit ``normalised``: the topic's positions for the policy's 0 and 1; by default
        the joint's own. A leader's gripper often has another range than its follower's.
    """

    joint: str = Field(min_length=1)
    name: Annotated[str, Field(min_length=1)] | None = None
    zero: float | None = None
    one: float | None = None


class ActionTopic(Settings):
    """A topic with commands.

    Attributes:
        topic: Its name.
        type: Its message type. A JointTrajectory is sampled as by the controller that follows it. A JointState (of a
            leader arm) gives its positions. A Float64MultiArray has one position for each joint, as for a
            forward_command_controller.
        controllers: The controllers whose joints it commands; all of them if left out.
        joints: The joints it commands, each a name or an :class:`ActionJoint`, for a Float64MultiArray in the order of
            its data; those of ``controllers``, in their order, if left out.
        sync: How it is sampled. A JointTrajectory has the age of its end.
    """

    topic: TopicName
    type: Annotated[
        Literal["trajectory_msgs/msg/JointTrajectory", "sensor_msgs/msg/JointState", "std_msgs/msg/Float64MultiArray"],
        BeforeValidator(in_full),
    ]
    controllers: list[str] = Field(default_factory=list)
    joints: list[ActionJoint] = Field(default_factory=list)
    sync: Sync

    @property
    def has_names(self) -> bool:
        """Whether its messages name their joints."""
        return self.type != FLOAT64_MULTI_ARRAY_TYPE

    @field_validator("joints", mode="before")
    @classmethod
    def _names_are_joints(cls, joints: Any) -> Any:
        if not isinstance(joints, list):
            return joints
        return [{"joint": joint} if isinstance(joint, str) else joint for joint in joints]

    @model_validator(mode="after")
    def _arrays_have_neither_names_nor_a_header(self) -> Self:
        if self.has_names:
            return self
        if self.sync.stamp == "header":
            raise ValueError("a Float64MultiArray has no header: set sync.stamp to receive")
        if not self.controllers and not self.joints:
            raise ValueError("a Float64MultiArray has no names: give joints, in the order of its data")
        if named := [joint.joint for joint in self.joints if joint.name is not None]:
            raise ValueError(f"a Float64MultiArray has no names: the joint {named[0]} needs none")
        return self


class Actions(Settings):
    """The source of a demonstration's actions.

    Attributes:
        source: ``next_state``: the action at a control tick is the state measured at the next one. ``topics``: it is
            the topics' command at the tick. By default ``topics`` if any are declared.
        topics: The topics with commands, under names of your choice. Each joint is commanded by one of them.
    """

    source: ActionSource
    topics: dict[str, ActionTopic] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _source_follows_from_topics(cls, document: Any) -> Any:
        if isinstance(document, dict) and "source" not in document:
            return document | {"source": "topics" if document.get("topics") else "next_state"}
        return document

    @model_validator(mode="after")
    def _topics_are_there(self) -> Self:
        if self.source == "topics" and not self.topics:
            raise ValueError("source topics needs topics")
        return self


@dataclass(frozen=True)
class CommandedJoint:
    """A joint commanded by a topic. The policy's value is (position - offset) / scale.

    Attributes:
        index: Its index in the action vector.
        name: Its name in the topic's messages.
        offset: The topic's position for the policy's 0.
        scale: The difference in the topic's position for a difference of 1 in the policy's value.
    """

    index: int
    name: str
    offset: float
    scale: float


def commanded_joints(entry: ActionTopic, controllers: Mapping[str, Controller]) -> list[CommandedJoint]:
    """Returns the joints that a topic commands, in the order of its data.

    Args:
        entry: The topic.
        controllers: The embodiment's, in vector order.

    Raises:
        ValueError: It names a controller or joint that does not exist, or a joint that several controllers have.
    """
    for name in entry.controllers:
        if name not in controllers:
            raise ValueError(f"there is no controller {name!r}, {did_you_mean(name, list(controllers))}")
    vector = [(name, joint) for name, controller in controllers.items() for joint in controller.joints]
    chosen = entry.controllers or list(controllers)
    if not entry.joints:
        order = [index for name in chosen for index, (owner, _) in enumerate(vector) if owner == name]
        return [_commanded(index, vector[index][1], ActionJoint(joint=vector[index][1].name)) for index in order]
    found = []
    for given in entry.joints:
        index = _find(given.joint, vector, chosen)
        found.append(_commanded(index, vector[index][1], given))
    return found


def _find(name: str, vector: Sequence[tuple[str, Joint]], chosen: Sequence[str]) -> int:
    places = [index for index, (owner, joint) in enumerate(vector) if owner in chosen and joint.name == name]
    places = places or [index for index, (owner, joint) in enumerate(vector) if f"{owner}/{joint.name}" == name]
    if len(places) > 1:
        owners = [vector[index][0] for index in places]
        raise ValueError(f"the joint {name!r} is in {' and '.join(owners)}: write {owners[0]}/{name}")
    if not places:
        known = [joint.name for owner, joint in vector if owner in chosen]
        raise ValueError(f"there is no joint {name!r}, {did_you_mean(name, known)}")
    return places[0]


def _commanded(index: int, joint: Joint, given: ActionJoint) -> CommandedJoint:
    if joint.unit != "normalised" and not (given.zero is None and given.one is None):
        raise ValueError(f"joint {given.joint}: zero and one belong to a joint whose unit is normalised")
    offset = joint.offset if given.zero is None else given.zero
    scale = (joint.offset + joint.scale if given.one is None else given.one) - offset
    if scale == 0:
        raise ValueError(f"joint {given.joint}: zero and one must differ")
    # Without `zero` and `one`, the joint's own values are used: a sum and a difference would round.
    own = given.zero is None and given.one is None
    return CommandedJoint(index, given.name or joint.name, offset, joint.scale if own else scale)
