# SPDX-License-Identifier: Apache-2.0
"""A simulated robot: controllers, and a body in MuJoCo that follows what they command."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from clp_ros.core.errors import ClpError
from clp_ros.robots.embodiment import Embodiment
from clp_ros.robots.trajectory import Trajectory
from clp_ros.robots.trajectory_controller import Command, State
from clp_ros.simulation.closed_loop import Controllers
from clp_ros.simulation.model import Follower, Joint, load_model, load_mujoco

# A robot that is so far behind its clock, as after a jump, stands still instead of catching up.
_BEHIND_NS = 10**9


class SimulatedRobot:
    """One robot in its scene. Not thread-safe.

    Args:
        embodiment: One of those that clp_ros ships; topics and a tf_prefix may differ.
        seed: Of where the cube lies.

    Raises:
        ClpError: There is no model of it, or a package is missing.
    """

    def __init__(self, embodiment: Embodiment, seed: int = 0) -> None:
        self.embodiment = embodiment
        self._mujoco = load_mujoco()
        self._model = load_model(embodiment)
        model = self._model.mujoco
        self.data: Any = self._mujoco.MjData(model)
        self.step_ns = round(model.opt.timestep * 1e9)
        actuators = {int(model.actuator_trnid[index, 0]): index for index in range(model.nu)}
        # Per MuJoCo joint: which joint of the embodiment moves it, how far, and where it is in MuJoCo's arrays.
        rows = [
            (index, gain, actuators[model.joint(name).id], model.joint(name).qposadr[0], model.joint(name).dofadr[0])
            for index, joint in enumerate(self._model.joints)
            for name, gain in joint.driven
        ]
        joint, gain, actuator, position, velocity = (np.array(column) for column in zip(*rows, strict=True))
        self._joint, self._gain, self._actuator, self._position, self._velocity = (
            joint,
            gain,
            actuator,
            position,
            velocity,
        )
        self._shares = np.bincount(joint)
        # A gripper begins where it does in every demonstration.
        self._turns = np.array([one.unit == "rad" for one in embodiment.joints])
        self._lower = np.array([one.lower for one in embodiment.joints])
        self._upper = np.array([one.upper for one in embodiment.joints])
        body = model.jnt_bodyid[model.joint(self._model.cube).id]
        self._cube_geom = model.geom(model.body_geomadr[body])
        self._renderers: dict[tuple[int, int], Any] = {}
        self.reset(seed)

    @property
    def mujoco_model(self) -> Any:
        """The ``mujoco.MjModel``."""
        return self._model.mujoco

    @property
    def modelled_joints(self) -> tuple[Joint, ...]:
        """How each of the embodiment's joints moves MuJoCo's."""
        return self._model.joints

    @property
    def home(self) -> np.ndarray:
        """(joints,) where it began, rad or m."""
        return self._home.copy()

    def reset(self, seed: int | Sequence[int], spread: float = 0.0) -> None:
        """Puts the robot to where it begins, and the cube somewhere on the table.

        Args:
            seed: Draws both.
            spread: How far, in rad, a joint of the arm may begin from where demonstrations do.
        """
        model, data = self._model, self.data
        draw = np.random.default_rng(seed)
        place = draw.uniform(*model.cube_range)
        away = spread * draw.uniform(-1.0, 1.0, len(model.home)) * self._turns
        self._home = np.clip(model.home + away, self._lower, self._upper)
        self._mujoco.mj_resetData(model.mujoco, data)
        data.qpos[self._position] = self._home[self._joint] * self._gain
        data.ctrl[self._actuator] = data.qpos[self._position]
        data.joint(model.cube).qpos[:] = [*place, 1, 0, 0, 0]
        self._mujoco.mj_forward(model.mujoco, data)
        self._controllers = Controllers(self.embodiment, self._home)
        self._time_ns: int | None = None

    # ------------------------------------------------------------------------------------------------ moving

    def receive(self, trajectory: Trajectory, now_ns: int) -> None:
        """Gives a trajectory to its controller.

        Raises:
            RejectedError: The controller drops it.
        """
        self._controllers.receive(trajectory, now_ns)

    def command(self, controller: str, command: Command, now_ns: int) -> None:
        """Gives a message to a controller, by its name in the embodiment.

        Raises:
            RejectedError: The controller drops it.
        """
        self._controllers.controllers[controller].receive(command, now_ns)

    @property
    def controller_parameters(self) -> dict[str, dict[str, Any]]:
        """The ROS parameters of every controller, by its name in the embodiment."""
        return {name: one.parameters for name, one in self._controllers.controllers.items()}

    def step(self, time_ns: int) -> None:
        """Lets it move up to a time, at the model's own step; the controllers command it at each."""
        if self._time_ns is None or not 0 <= time_ns - self._time_ns < _BEHIND_NS:
            self._time_ns = time_ns - self.step_ns
        while self._time_ns + self.step_ns <= time_ns:
            self._time_ns += self.step_ns
            self._controllers.step(self._time_ns)
            wanted = self._controllers.commanded().positions
            self.data.ctrl[self._actuator] = wanted[self._joint] * self._gain
            self._mujoco.mj_step(self._model.mujoco, self.data)

    def commanded(self) -> State:
        """What all joints were commanded last."""
        return self._controllers.commanded()

    def measured(self) -> np.ndarray:
        """(joints,) float64: where they are, rad or m. Fingers that move in pairs: their mean."""
        # MuJoCo's limits give way a little; an encoder's zero does not.
        return np.clip(self._of(self.data.qpos[self._position]), self._lower, self._upper)

    def speeds(self) -> np.ndarray:
        """(joints,) float64: how fast they move, per second."""
        return self._of(self.data.qvel[self._velocity])

    def _of(self, values: np.ndarray) -> np.ndarray:
        return np.bincount(self._joint, values / self._gain) / self._shares

    def qpos_addresses(self, joints: slice) -> np.ndarray:
        """Where some of the embodiment's joints, each of one MuJoCo joint, are in MuJoCo's ``qpos``."""
        return self._position[np.searchsorted(self._joint, np.arange(len(self.embodiment.joints))[joints])]

    # ------------------------------------------------------------------------------------------------ the cube

    @property
    def cube_rests_at(self) -> float:
        """Height of the cube's centre when it lies on the table, in metres."""
        return float(self._cube_geom.size[2])

    def cube(self) -> np.ndarray:
        """(3,) float64: the cube's centre, in metres."""
        return self.data.joint(self._model.cube).qpos[:3].copy()

    def touching_cube(self) -> set[str]:
        """Names of the shapes that touch the cube."""
        model, cube = self._model.mujoco, self._cube_geom.id
        pairs = [tuple(pair) for pair in self.data.contact.geom if cube in pair]
        return {model.geom(other).name for pair in pairs for other in pair if other != cube}

    # ------------------------------------------------------------------------------------------------ seeing

    def joint_states(self, source: str) -> tuple[list[str], list[float], list[float]]:
        """Names, positions and velocities that a robot publishes: an entry of the embodiment's ``joint_states``."""
        names: list[str] = []
        positions: list[float] = []
        speeds: list[float] = []
        owners = [one.joint_states for one in self.embodiment.controllers.values() for _ in one.joints]
        measured = zip(self.measured(), self.speeds(), strict=True)
        for owner, joint, modelled, (position, speed) in zip(
            owners, self.embodiment.joints, self._model.joints, measured, strict=True
        ):
            if owner != source:
                continue
            for its in (Follower(joint.name, 1.0), *self._model.followers.get(modelled.name, ())):
                names.append(its.name)
                positions.append(float(its.offset + its.gain * position))
                speeds.append(float(its.gain * speed))
        return names, positions, speeds

    def picture(self, camera: str, height: int, width: int) -> np.ndarray:
        """(height, width, 3) uint8 RGB, from one of the embodiment's cameras.

        Raises:
            ClpError: Nothing can be drawn here.
        """
        renderer = self._renderers.get((height, width))
        if renderer is None:
            renderer = self._renderers[height, width] = self._renderer(height, width)
        renderer.update_scene(self.data, self._model.cameras[camera])
        return renderer.render()

    def _renderer(self, height: int, width: int) -> Any:
        model = self._model.mujoco
        model.vis.global_.offheight = max(height, model.vis.global_.offheight)
        model.vis.global_.offwidth = max(width, model.vis.global_.offwidth)
        model.vis.quality.offsamples = 0  # a CPU that draws has no time for smooth edges, nor for shadows
        try:
            renderer = self._mujoco.Renderer(model, height, width)
        except Exception as error:  # each GL library has errors of its own
            raise ClpError(
                f"MuJoCo cannot draw here ({' '.join(str(error).split())})",
                where=f"MUJOCO_GL={os.environ.get('MUJOCO_GL', '')}",
                fix="install EGL (Debian: apt-get install libegl1 libgl1-mesa-dri), or set MUJOCO_GL to glfw or osmesa",
            ) from error
        for flag in (self._mujoco.mjtRndFlag.mjRND_SHADOW, self._mujoco.mjtRndFlag.mjRND_REFLECTION):
            renderer.scene.flags[flag] = 0
        return renderer

    def close(self) -> None:
        """Frees what draws."""
        for renderer in self._renderers.values():
            renderer.close()
        self._renderers.clear()
