# SPDX-License-Identifier: Apache-2.0
"""Where a demonstration's actions come from: the next measured state, or topics with commands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from clp_ros.core.settings import Settings, did_you_mean
from clp_ros.robots.topics import FLOAT64_MULTI_ARRAY_TYPE, Sync, TopicName, in_full

if TYPE_CHECKING:
    from clp_ros.robots.embodiment import Controller, Joint

ActionSource = Literal["next_state", "topics"]


class ActionJoint(Settings):
    """One joint of a topic with commands.

    Attributes:
        joint: The embodiment's joint that it is for; ``CONTROLLER/JOINT`` where several controllers have that name.
        name: What the topic's messages call it, as a leader arm's may; by default as the embodiment does.
        zero, one: For a joint whose unit is ``normalised``: the topic's positions where the policy sees 0 and 1; by
            default the joint's own. A leader's gripper often has another range than its follower's.
    """

    joint: str = Field(min_length=1)
    name: Annotated[str, Field(min_length=1)] | None = None
    zero: float | None = None
    one: float | None = None


class ActionTopic(Settings):
    """A topic with commands.

    Attributes:
        topic: Where it is.
        type: Of its messages: a JointTrajectory is sampled as the controller that follows it does; a JointState (of a
            leader arm) gives its positions; a Float64MultiArray has one position a joint, as a
            forward_command_controller takes them.
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
            raise ValueError("a Float64MultiArray has no header: set its sync stamp to receive")
        if not self.controllers and not self.joints:
            raise ValueError("a Float64MultiArray has no names: give joints, in the order of its data")
        if named := [joint.joint for joint in self.joints if joint.name is not None]:
            raise ValueError(f"a Float64MultiArray has no names: the joint {named[0]} needs none")
        return self


class Actions(Settings):
    """Where a demonstration's actions come from.

    Attributes:
        source: ``next_state``: the action at a control tick is the state measured at the next one. ``topics``: it is
            what the topics command at the tick. By default ``topics`` where there are any.
        topics: The topics with commands, by a name of your choice; each joint is commanded by one of them.
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
    """A joint as a topic commands it: the policy sees (position - offset) / scale.

    Attributes:
        index: Its place in the action vector.
        name: What the topic's messages call it.
        offset: The topic's position where the policy sees 0.
        scale: The difference in the topic's position that the policy sees as 1.
    """

    index: int
    name: str
    offset: float
    scale: float


def commanded_joints(entry: ActionTopic, controllers: Mapping[str, Controller]) -> list[CommandedJoint]:
    """The joints that a topic commands, in the order of its data.

    Args:
        entry: The topic.
        controllers: The embodiment's, in vector order.

    Raises:
        ValueError: It names a controller or a joint that there is not, or one that several controllers have.
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
    # As they are, where nothing is given: a sum and a difference would round.
    own = given.zero is None and given.one is None
    return CommandedJoint(index, given.name or joint.name, offset, joint.scale if own else scale)
