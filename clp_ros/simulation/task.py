# SPDX-License-Identifier: Apache-2.0
"""What a simulated task is: its scene, its instruction's wordings, its success test, and an expert that solves it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from scipy.spatial.transform import Rotation

from clp_ros.simulation.arms import Arm
from clp_ros.simulation.scene import Layout, Scene


@dataclass(frozen=True)
class ObjectState:
    """The state of an object.

    Attributes:
        position: (3,) float64: its centre; of a bin or a zone, its bottom. In metres.
        rotation: (3, 3) float64: its axes in the world's frame.
        velocity: (3,) float64, in metres per second.
        touched_by: Names of the arms of which a finger touches it.
        held_by: Names of the arms of which both fingers touch it.
    """

    position: np.ndarray
    rotation: np.ndarray
    velocity: np.ndarray
    touched_by: frozenset[str] = frozenset()
    held_by: frozenset[str] = frozenset()

    @property
    def speed(self) -> float:
        """Speed in metres per second."""
        return float(np.linalg.norm(self.velocity))

    @property
    def yaw(self) -> float:
        """Direction of its x axis about the vertical, in rad."""
        return float(np.arctan2(self.rotation[1, 0], self.rotation[0, 0]))


@dataclass(frozen=True)
class ArmState:
    """The state of an arm.

    Attributes:
        arm: The arm.
        position: (3,) float64: the measured position of its tool, in metres.
        rotation: (3, 3) float64: the measured orientation of its tool.
        gripper: Measured position of the gripper's joint, rad or m.
        gripper_command: Last command of the gripper's joint, rad or m.
    """

    arm: Arm
    position: np.ndarray
    rotation: np.ndarray
    gripper: float
    gripper_command: float

    @property
    def opening(self) -> float:
        """0: closed on an object or further; 1: open."""
        return _opening(self.arm, self.gripper)

    @property
    def opening_command(self) -> float:
        """The commanded opening, 0 to 1."""
        return _opening(self.arm, self.gripper_command)

    @property
    def yaw(self) -> float:
        """How far the gripper is turned about the vertical from the arm's ``down``, in rad."""
        turn = self.rotation @ self.arm.down.inv().as_matrix()
        return float(np.arctan2(turn[1, 0] - turn[0, 1], turn[0, 0] + turn[1, 1]))

    @property
    def tilt(self) -> float:
        """Angle between the gripper and the vertical, in rad."""
        turn = self.rotation @ self.arm.down.inv().as_matrix()
        return float(np.arccos(np.clip(turn[2, 2], -1.0, 1.0)))


def _opening(arm: Arm, gripper: float) -> float:
    return float(np.clip((gripper - arm.grasp) / (arm.opened - arm.grasp), 0.0, 1.0))


@dataclass(frozen=True)
class TaskState:
    """The simulated state, as a success test and an expert see it.

    Attributes:
        objects: By name. An object that is not in this episode's layout is left out.
        arms: By name.
        layout: Where the objects began.
    """

    objects: Mapping[str, ObjectState]
    arms: Mapping[str, ArmState]
    layout: Layout


@dataclass(frozen=True)
class Goal:
    """Where an expert wants an arm.

    Attributes:
        position: (3,) of the tool, in metres.
        rotation: Orientation of the tool.
        gripper: Position of the gripper's joint, rad or m.
        speed: Share of the usual speed.
    """

    position: np.ndarray
    rotation: Rotation
    gripper: float
    speed: float = 1.0


class SimulatedTask(ABC):
    """A task of simulated robots. An instance named ``TASK`` makes a module a task.

    Attributes:
        name: As users write it.
        robots: Names of the embodiments that can do it.
        wordings: What the instruction may be. ``{cube}`` stands for the colour of the scene's object of that name.
        hold_s: How long the success test must hold, in seconds.
        time_limit_s: Longest episode, in seconds.
    """

    name: ClassVar[str]
    robots: ClassVar[tuple[str, ...]]
    wordings: ClassVar[tuple[str, ...]]
    hold_s: ClassVar[float] = 0.3
    time_limit_s: ClassVar[float] = 15.0

    @abstractmethod
    def scene(self, robot: str) -> Scene:
        """Returns the scene on the table of one of :attr:`robots`."""

    @abstractmethod
    def success(self, state: TaskState) -> bool:
        """Returns whether the task is done in this state. It must hold for :attr:`hold_s`."""

    @abstractmethod
    def goals(self, state: TaskState) -> dict[str, Goal]:
        """Returns where the expert wants each arm now. A function of the state, so it answers to every disturbance."""

    def instruction(self, layout: Layout, wording: int = 0) -> str:
        """Returns the instruction of an episode, in one of the wordings."""
        colours = {name: placement.colour for name, placement in layout.items()}
        return self.wordings[wording % len(self.wordings)].format_map(colours)
