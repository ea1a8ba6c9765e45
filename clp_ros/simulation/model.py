# SPDX-License-Identifier: Apache-2.0
"""The MuJoCo models of the embodiments that clp_ros ships."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clp_ros.core.errors import ClpError
from clp_ros.core.settings import did_you_mean
from clp_ros.robots.embodiment import Embodiment
from clp_ros.simulation import universal_robots as ur

if TYPE_CHECKING:
    import mujoco

INSTALL = "pip install 'clp_ros[simulation]', or -r requirements-simulation.txt from the checkout"
# The Interbotix follower, closed and open: finger in metres, gripper in rad (ALOHA's constants.py).
_FINGER, _GRIPPER = (0.021, 0.057), (0.6197, 1.6214)
_ALOHA_ARM = ("waist", "shoulder", "elbow", "forearm_roll", "wrist_angle", "wrist_rotate")
# Initial positions of an arm and its finger in ALOHA's demonstrations: gym-aloha's START_ARM_POSE.
_ALOHA_HOME = (0.0, -0.96, 1.16, 0.0, -0.3, 0.0, 0.024)


@dataclass(frozen=True)
class Joint:
    """The MuJoCo joints that a joint of the embodiment drives.

    Attributes:
        name: Name of the embodiment's joint, without a tf_prefix.
        driven: Name and gain of each MuJoCo joint, whose position is the gain times the joint's position.
    """

    name: str
    driven: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Follower:
    """A published joint without a controller. Its position is ``offset + gain`` times that of another joint.

    Attributes:
        name: Name of the published joint.
        gain: The gain.
        offset: The offset, rad or m.
    """

    name: str
    gain: float
    offset: float = 0.0


@dataclass(frozen=True)
class Model:
    """A robot in its scene.

    Attributes:
        mujoco: The compiled model.
        joints: The joints, in the order of the action.
        home: (joints,) float64: initial positions, rad or m.
        cameras: Name of the scene's camera by name of the embodiment's camera.
        cube: Name of the cube's free joint.
        cube_range: (2, 3) float64: lowest and highest initial position of the cube, in metres.
        followers: Published joints by the name of the joint that they follow.
    """

    mujoco: mujoco.MjModel
    joints: tuple[Joint, ...]
    home: np.ndarray
    cameras: dict[str, str]
    cube: str
    cube_range: np.ndarray
    followers: dict[str, tuple[Follower, ...]] = field(default_factory=dict)


def load_mujoco() -> Any:
    """Imports MuJoCo. Without an OpenGL library, it is imported without rendering.

    Raises:
        ClpError: MuJoCo is not installed.
    """
    chosen = os.environ.setdefault("MUJOCO_GL", "egl")
    try:
        try:
            import mujoco
        except (ImportError, AttributeError, RuntimeError) as error:  # raised for a missing GL library
            if isinstance(error, ModuleNotFoundError) and error.name == "mujoco":
                raise
            os.environ["MUJOCO_GL"] = "disable"
            import mujoco

            os.environ["MUJOCO_GL"] = chosen
    except ModuleNotFoundError as error:
        raise ClpError("the simulation needs a package that is missing", where=error.name, hint=INSTALL) from error
    return mujoco


def load_model(embodiment: Embodiment, furnish: Callable[[Any], None] | None = None) -> Model:
    """Returns the model of an embodiment that clp_ros ships.

    Args:
        embodiment: The robot. Its joints may have a tf_prefix.
        furnish: Adds bodies to the ``mujoco.MjSpec`` before it is compiled, and may move cameras.

    Raises:
        ClpError: The embodiment has no model, its joints or cameras differ from the model's, or a package is missing.
    """
    makers = {
        "ur5": lambda: _universal_robot(ur.UR5E, furnish),
        "ur10e": lambda: _universal_robot(ur.UR10E, furnish),
        "aloha_single": lambda: _aloha(("right",), furnish),
        "aloha_bimanual": lambda: _aloha(("left", "right"), furnish),
    }
    if embodiment.name not in makers:
        raise ClpError(
            f"there is no simulated {embodiment.name}",
            where=embodiment.name,
            hint=did_you_mean(embodiment.name, list(makers)),
        )
    model = makers[embodiment.name]()
    names = [joint.name for joint in embodiment.joints]
    # The embodiment's names may begin with a tf_prefix.
    if len(names) != len(model.joints) or not all(
        name.endswith(its.name) for name, its in zip(names, model.joints, strict=True)
    ):
        raise ClpError(
            f"the simulated {embodiment.name} has the joints {', '.join(joint.name for joint in model.joints)}, "
            f"this embodiment {', '.join(names)}",
            where=embodiment.name,
        )
    if unknown := sorted(set(embodiment.cameras) - set(model.cameras)):
        raise ClpError(
            f"the simulated {embodiment.name} has no camera {unknown[0]!r}, only {', '.join(model.cameras)}",
            where=embodiment.name,
        )
    return model


def _universal_robot(kinematics: ur.Kinematics, furnish: Callable[[Any], None] | None) -> Model:
    spec = load_mujoco().MjSpec.from_string(ur.model(kinematics))
    if furnish is not None:
        furnish(spec)
    arm = [Joint(name, ((name, 1.0),)) for name in ur.JOINTS]
    gripper = Joint(ur.GRIPPER, ((ur.GRIPPER, 1.0), ("right_knuckle", 1.0)))
    return Model(
        spec.compile(),
        (*arm, gripper),
        np.array(ur.HOME),
        {name: name for name in ("cam_front", "cam_wrist")},
        "cube",
        np.array([[0.4, -0.15, 0.02], [0.6, 0.25, 0.02]]),
    )


def _aloha(sides: tuple[str, ...], furnish: Callable[[Any], None] | None) -> Model:
    mujoco = load_mujoco()
    found = importlib.util.find_spec("gym_aloha")  # not imported, because only its files are needed
    if found is None or not found.submodule_search_locations:
        raise ClpError("the simulation needs a package that is missing", where="gym-aloha", hint=INSTALL)
    scene = Path(found.submodule_search_locations[0], "assets", "bimanual_viperx_transfer_cube.xml")
    spec = mujoco.MjSpec.from_file(str(scene))
    for key in list(spec.keys):  # keyframes are for the cube and both arms
        spec.delete(key)
    if "left" not in sides:
        for actuator in list(spec.actuators):
            if actuator.target.startswith("vx300s_left/"):
                spec.delete(actuator)
        spec.delete(spec.camera("front_close"))  # it looks at the left arm
        spec.delete(spec.body("vx300s_left"))
    joints: list[Joint] = []
    for side in sides:
        joints += [Joint(name, ((f"vx300s_{side}/{name}", 1.0),)) for name in _ALOHA_ARM]
        fingers = ((f"vx300s_{side}/left_finger", 1.0), (f"vx300s_{side}/right_finger", -1.0))
        joints.append(Joint("left_finger", fingers))
    to_gripper = (_GRIPPER[1] - _GRIPPER[0]) / (_FINGER[1] - _FINGER[0])
    gripper = Follower("gripper", to_gripper, _GRIPPER[0] - to_gripper * _FINGER[0])
    cameras = {"cam_high": "top", "cam_low": "angle"} | {f"cam_{side}_wrist": f"{side}_wrist" for side in sides}
    if furnish is not None:
        furnish(spec)
    return Model(
        spec.compile(),
        tuple(joints),
        np.array(_ALOHA_HOME * len(sides)),
        cameras,
        "red_box_joint",
        np.array([[0.0, 0.4, 0.05], [0.2, 0.6, 0.05]]),  # gym-aloha's
        {"left_finger": (gripper, Follower("right_finger", -1.0))},
    )
