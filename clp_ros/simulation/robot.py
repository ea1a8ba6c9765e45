# SPDX-License-Identifier: Apache-2.0
"""A simulated robot: controllers, and a MuJoCo body that follows their commands."""

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
from clp_ros.simulation.model import Follower, Joint, Model, load_model, load_mujoco

# After a larger jump of the clock, the robot does not simulate the time in between.
_BEHIND_NS = 10**9


class SimulatedRobot:
    """A robot in its scene. Not thread-safe.

    Args:
        embodiment: A robot that clp_ros ships. Topics and tf_prefix may differ.
        seed: Seed of the cube's position.
        furnished: The robot's model with other objects; None: the one of :func:`clp_ros.simulation.model.load_model`.

    Attributes:
        embodiment: The robot.
        data: The ``mujoco.MjData``.
        step_ns: Time step of the model, in nanoseconds.

    Raises:
        ClpError: The robot has no model, or a package is missing.
    """

    def __init__(self, embodiment: Embodiment, seed: int = 0, furnished: Model | None = None) -> None:
        self.embodiment = embodiment
        self._mujoco = load_mujoco()
        self._model = load_model(embodiment) if furnished is None else furnished
        model = self._model.mujoco
        self.data: Any = self._mujoco.MjData(model)
        self.step_ns = round(model.opt.timestep * 1e9)
        actuators = {int(model.actuator_trnid[index, 0]): index for index in range(model.nu)}
        # For each MuJoCo joint: the embodiment's joint that moves it, the gain, and its indices in MuJoCo's arrays.
        rows = [
            (index, gain, actuators[model.joint(name).id], model.joint(name).qposadr[0], model.joint(name).dofadr[0])
            for index, joint in enumerate(self._model.joints)
            for name, gain in joint.driven
        ]
        columns = (np.array(column) for column in zip(*rows, strict=True))
        self._joint, self._gain, self._actuator, self._position, self._velocity = columns
        self._shares = np.bincount(self._joint)
        # Only joints in rad begin with a random offset. A gripper always begins at the same position.
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
        """The model's entry for each of the embodiment's joints."""
        return self._model.joints

    @property
    def home(self) -> np.ndarray:
        """Initial positions since the last reset: (joints,) float64, rad or m."""
        return self._home.copy()

    def reset(self, seed: int | Sequence[int], spread: float = 0.0) -> None:
        """Moves the robot to its initial pose, and the cube to a random position on the table.

        Args:
            seed: Seed of both.
            spread: Largest random offset of the arm's joints from the initial pose of demonstrations, in rad.
        """
        model, data = self._model, self.data
        draw = np.random.default_rng(seed)
        place = draw.uniform(*model.cube_range)
        away = spread * draw.uniform(-1.0, 1.0, len(model.home)) * self._turns
        self._rest_at(np.clip(model.home + away, self._lower, self._upper))
        data.joint(model.cube).qpos[:] = [*place, 1, 0, 0, 0]
        self._mujoco.mj_forward(model.mujoco, data)

    def _rest_at(self, home: np.ndarray) -> None:
        """Resets MuJoCo's state and the controllers, with the joints at rest: (joints,) rad or m."""
        self._home = home
        self._mujoco.mj_resetData(self._model.mujoco, self.data)
        self.data.qpos[self._position] = home[self._joint] * self._gain
        self.data.ctrl[self._actuator] = self.data.qpos[self._position]
        self._controllers = Controllers(self.embodiment, home)
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
        """The ROS parameters of each controller, by the controller's name in the embodiment."""
        return {name: one.parameters for name, one in self._controllers.controllers.items()}

    def step(self, time_ns: int) -> None:
        """Simulates up to a time. The controllers command the joints at each time step of the model."""
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
        """Returns the measured positions: (joints,) float64, rad or m. For a pair of fingers, this is their mean."""
        # MuJoCo's soft limits are exceeded slightly, which a real joint's encoder would not show.
        return np.clip(self._of(self.data.qpos[self._position]), self._lower, self._upper)

    def speeds(self) -> np.ndarray:
        """Returns the measured velocities: (joints,) float64, per second."""
        return self._of(self.data.qvel[self._velocity])

    def _of(self, values: np.ndarray) -> np.ndarray:
        return np.bincount(self._joint, values / self._gain) / self._shares

    def qpos_addresses(self, joints: slice) -> np.ndarray:
        """Returns the indices in MuJoCo's ``qpos`` of some of the joints. Each must drive one MuJoCo joint."""
        return self._position[np.searchsorted(self._joint, np.arange(len(self.embodiment.joints))[joints])]

    # ------------------------------------------------------------------------------------------------ the cube

    @property
    def cube_rests_at(self) -> float:
        """Height of the cube's centre on the table, in metres."""
        return float(self._cube_geom.size[2])

    def cube(self) -> np.ndarray:
        """Returns the cube's centre: (3,) float64, in metres."""
        return self.data.joint(self._model.cube).qpos[:3].copy()

    def touching_cube(self) -> set[str]:
        """Returns the names of the shapes that touch the cube."""
        model, cube = self._model.mujoco, self._cube_geom.id
        pairs = [tuple(pair) for pair in self.data.contact.geom if cube in pair]
        return {model.geom(other).name for pair in pairs for other in pair if other != cube}

    # ------------------------------------------------------------------------------------------------ seeing

    def joint_states(self, source: str) -> tuple[list[str], list[float], list[float]]:
        """Returns the names, positions and velocities that an entry of the embodiment's ``joint_states`` publishes."""
        names: list[str] = []
        positions: list[float] = []
        speeds: list[float] = []
        measured, moving = self.measured(), self.speeds()
        for index in self.embodiment.joint_indices(source):
            followers = self._model.followers.get(self._model.joints[index].name, ())
            for its in (Follower(self.embodiment.joints[index].name, 1.0), *followers):
                names.append(its.name)
                positions.append(float(its.offset + its.gain * measured[index]))
                speeds.append(float(its.gain * moving[index]))
        return names, positions, speeds

    def picture(self, camera: str, height: int, width: int) -> np.ndarray:
        """Renders an image of one of the embodiment's cameras.

        Args:
            camera: The camera's name in the embodiment.
            height: Height in pixels.
            width: Width in pixels.

        Returns:
            (height, width, 3) uint8 RGB.

        Raises:
            ClpError: Rendering fails on this machine.
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
        model.vis.quality.offsamples = 0  # anti-aliasing and shadows are too slow on a CPU
        try:
            renderer = self._mujoco.Renderer(model, height, width)
        except Exception as error:  # each GL library raises other errors
            raise ClpError(
                f"MuJoCo cannot draw here ({' '.join(str(error).split())})",
                where=f"MUJOCO_GL={os.environ.get('MUJOCO_GL', '')}",
                hint="install EGL (apt-get install libegl1 libgl1-mesa-dri), or set MUJOCO_GL to glfw or osmesa",
            ) from error
        for flag in (self._mujoco.mjtRndFlag.mjRND_SHADOW, self._mujoco.mjtRndFlag.mjRND_REFLECTION):
            renderer.scene.flags[flag] = 0
        return renderer

    def close(self) -> None:
        """Frees the renderers."""
        for renderer in self._renderers.values():
            renderer.close()
        self._renderers.clear()
