# SPDX-License-Identifier: Apache-2.0
"""The joints of a robot and the controllers that move them."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from clp_ros.core.settings import Settings
from clp_ros.robots.topics import Positive, TopicName

# How far a joint may report to be beyond its limits: a share of its range, and a minimum in rad or m. The controller's
# unit of a normalised joint is unknown, so the smaller minimum applies.
_TOLERANCE_SHARE = 0.05
_LEAST_TOLERANCE = {"rad": 0.05, "m": 0.005, "normalised": 0.005}


class Joint(Settings):
    """One joint of a controller.

    Attributes:
        name: Its name in the JointState and the controller.
        lower, upper: Position limits, in the controller's unit (rad or m).
        velocity: Velocity limit, in that unit per second.
        acceleration: Acceleration limit, in that unit per second squared; None: no limit.
        unit: Unit of the policy's value: ``rad``, ``m``, or ``normalised``: 0 at ``zero`` and 1 at ``one``.
        zero, one: Positions for ``normalised``, by default lower and upper; None for other units.
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

        The default is a share of the range, because calibration is never perfect, but at least 0.05 rad or 5 mm,
        because a finger's mechanical play exceeds a share of its short stroke.
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
        """The change of the controller's position for 1 in the policy's value: position = offset + scale * value."""
        if self.unit != "normalised":
            return 1.0
        return (self.upper if self.one is None else self.one) - self.offset


class Controller(Settings):
    """A joint_trajectory_controller: its topic, its joints and the JointStates that measure them."""

    joint_states: str
    topic: TopicName
    joints: Annotated[list[Joint], Field(min_length=1)]

    @model_validator(mode="after")
    def _joints_are_unique(self) -> Self:
        counts = Counter(joint.name for joint in self.joints)
        if twice := sorted(name for name, count in counts.items() if count > 1):
            raise ValueError(f"the joint {twice[0]} is there twice")
        return self
