# SPDX-License-Identifier: Apache-2.0
"""A scene: the objects on the table of a simulated robot, and how a seed places and colours them.

A scene belongs to several tasks, so a picture of it does not say which task is meant.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from scipy.spatial.transform import Rotation

from clp_ros.simulation.model import load_mujoco

Layout = Mapping[str, "Placement"]
"""Where each object of a scene begins, by its name. An object that is not named is not there."""

WRIST_FOVY = 45.0
"""Field of view of ALOHA's wrist cameras in scenes, in degrees. gym-aloha's 20 show little more than the fingertips."""

# Where an object is that is not there: far outside of every picture. It falls freely, which costs no contacts.
_NOWHERE = (60.0, 60.0, -100.0)


@dataclass(frozen=True)
class Placement:
    """Where an object begins, and its colour.

    Attributes:
        position: (3,) float64: its centre, in metres. For what lies on the table, a bin or a zone: of its bottom.
        yaw: Rotation about the vertical, in rad.
        colour: Name of the colour, as an instruction may have it.
        rgba: (4,) the colour, 0 to 1.
    """

    position: np.ndarray
    yaw: float
    colour: str
    rgba: tuple[float, float, float, float]


@dataclass(frozen=True)
class Box:
    """A box that can be moved. ``half``: half its edges, in metres; ``mass`` in kg."""

    name: str
    half: tuple[float, float, float]
    mass: float

    @property
    def height(self) -> float:
        """Height of its centre above its bottom, in metres."""
        return self.half[2]

    def add_to(self, spec: Any) -> None:
        """Adds it to a ``mujoco.MjSpec``."""
        squares = np.square(self.half)
        inertia = self.mass / 3 * (squares.sum() - squares)
        _movable(spec, self.name, load_mujoco().mjtGeom.mjGEOM_BOX, self.half, self.mass, inertia)


@dataclass(frozen=True)
class Can:
    """A standing cylinder that can be moved. ``radius`` and ``half_height`` in metres, ``mass`` in kg."""

    name: str
    radius: float
    half_height: float
    mass: float

    @property
    def height(self) -> float:
        """Height of its centre above its bottom, in metres."""
        return self.half_height

    def add_to(self, spec: Any) -> None:
        """Adds it to a ``mujoco.MjSpec``."""
        size = (self.radius, self.half_height, 0.0)
        across = self.mass * (self.radius**2 / 4 + self.half_height**2 / 3)
        inertia = np.array([across, across, self.mass * self.radius**2 / 2])
        _movable(spec, self.name, load_mujoco().mjtGeom.mjGEOM_CYLINDER, size, self.mass, inertia)


@dataclass(frozen=True)
class Bin:
    """An open square box that is fixed to the table.

    Attributes:
        name: Its name.
        half: Half its inner edge, in metres.
        rim: Height of its rim above the table, in metres.
        wall: Thickness of its walls and floor, in metres.
    """

    name: str
    half: float = 0.055
    rim: float = 0.05
    wall: float = 0.004

    height: ClassVar[float] = 0.0

    def add_to(self, spec: Any) -> None:
        """Adds it to a ``mujoco.MjSpec``."""
        body = spec.worldbody.add_body(name=self.name, mocap=True)
        box, outer = load_mujoco().mjtGeom.mjGEOM_BOX, self.half + self.wall
        body.add_geom(type=box, size=[outer, outer, self.wall / 2], pos=[0, 0, self.wall / 2])
        for sign in (-1, 1):
            place = sign * (self.half + self.wall / 2)
            body.add_geom(type=box, size=[self.wall / 2, outer, self.rim / 2], pos=[place, 0, self.rim / 2])
            body.add_geom(type=box, size=[outer, self.wall / 2, self.rim / 2], pos=[0, place, self.rim / 2])


@dataclass(frozen=True)
class Zone:
    """A disc that is painted on the table. ``radius`` in metres."""

    name: str
    radius: float = 0.05

    height: ClassVar[float] = 0.0

    def add_to(self, spec: Any) -> None:
        """Adds it to a ``mujoco.MjSpec``."""
        body = spec.worldbody.add_body(name=self.name, mocap=True)
        cylinder = load_mujoco().mjtGeom.mjGEOM_CYLINDER
        body.add_geom(
            type=cylinder, size=[self.radius, 0.0005, 0], pos=[0, 0, 0.0005], contype=0, conaffinity=0, group=1
        )


SceneObject = Box | Can | Bin | Zone


def _movable(spec: Any, name: str, kind: Any, size: tuple[float, ...], mass: float, inertia: np.ndarray) -> None:
    body = spec.worldbody.add_body(name=name, mass=mass, inertia=inertia, explicitinertial=True)
    body.add_freejoint(name=name)
    body.add_geom(name=name, type=kind, size=list(size), condim=4)


def aim(camera: Any, position: tuple[float, float, float], at: tuple[float, float, float], fovy: float) -> None:
    """Moves a camera of a ``mujoco.MjSpec``. Its picture is upright, or has the world's y axis up if it looks down.

    Args:
        camera: The camera.
        position: Where it is, in metres.
        at: What it looks at, in metres.
        fovy: Its vertical field of view, in degrees.
    """
    backward = np.subtract(position, at)
    backward /= np.linalg.norm(backward)
    upward = np.array([0.0, 1.0, 0.0] if abs(backward[2]) > 0.999 else [0.0, 0.0, 1.0])
    right = np.cross(upward, backward)
    right /= np.linalg.norm(right)
    axes = np.stack([right, np.cross(backward, right), backward], axis=1)
    mujoco = load_mujoco()
    camera.mode = mujoco.mjtCamLight.mjCAMLIGHT_FIXED
    camera.alt.type = mujoco.mjtOrientation.mjORIENTATION_QUAT
    camera.pos, camera.fovy = position, fovy
    camera.quat = Rotation.from_matrix(axes).as_quat(scalar_first=True)


class Scene(ABC):
    """What lies on a robot's table. Two scenes that are equal have the same model and the same layout by seed.

    Attributes:
        objects: The objects that are added to the robot's model. The robot's own cube is there already: ``cube``.
    """

    objects: ClassVar[tuple[SceneObject, ...]]
    # The cube of the robots' models: half its edge, in metres.
    cube_half: ClassVar[float] = 0.02

    def furnish(self, spec: Any) -> None:
        """Adds the objects to the ``mujoco.MjSpec`` of the robot, and may move its cameras."""
        for one in self.objects:
            one.add_to(spec)

    @abstractmethod
    def draw(self, rng: np.random.Generator) -> Layout:
        """Draws where the objects begin, and their colours."""

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash((type(self), *sorted(vars(self).items())))


class Furniture:
    """The objects of a scene in a compiled model: places and paints them, without compiling again.

    Args:
        scene: The scene that furnished the model.
        model: The ``mujoco.MjModel``.
        cube: Name of the joint of the robot's own cube.
    """

    def __init__(self, scene: Scene, model: Any, cube: str) -> None:
        self._model = model
        joints = {"cube": cube} | {one.name: one.name for one in scene.objects if isinstance(one, Box | Can)}
        self.qpos = {name: int(model.joint(joint).qposadr[0]) for name, joint in joints.items()}
        self.qvel = {name: int(model.joint(joint).dofadr[0]) for name, joint in joints.items()}
        self.bodies = {name: int(model.joint(joint).bodyid[0]) for name, joint in joints.items()}
        fixed = [one.name for one in scene.objects if one.name not in joints]
        self.mocap = {name: int(model.body(name).mocapid[0]) for name in fixed}
        self._geoms = {
            name: np.flatnonzero(model.geom_bodyid == body)
            for name, body in (self.bodies | {name: model.body(name).id for name in fixed}).items()
        }
        self._heights = {"cube": scene.cube_half} | {one.name: one.height for one in scene.objects}

    def place(self, data: Any, layout: Layout) -> None:
        """Places all objects. The state of ``data`` has been reset."""
        for name, address in self.qpos.items():
            there = layout.get(name)
            data.qpos[address : address + 7] = (*_NOWHERE, 1, 0, 0, 0) if there is None else self._pose(name, there)
        for name, index in self.mocap.items():
            there = layout.get(name)
            pose = np.array((*_NOWHERE, 1, 0, 0, 0)) if there is None else self._pose(name, there)
            data.mocap_pos[index], data.mocap_quat[index] = pose[:3], pose[3:]
        for name, placement in layout.items():
            self._model.geom_rgba[self._geoms[name]] = placement.rgba

    def _pose(self, name: str, there: Placement) -> np.ndarray:
        height = np.array([0.0, 0.0, self._heights[name]])
        return np.array([*(there.position + height), math.cos(there.yaw / 2), 0, 0, math.sin(there.yaw / 2)])
