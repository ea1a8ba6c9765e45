# SPDX-License-Identifier: Apache-2.0
"""A simulated task of clp_ros as a gymnasium environment."""

from __future__ import annotations

from typing import Any, ClassVar

import gymnasium as gym
import numpy as np

from clp_ros.robots.embodiment import load_embodiment
from clp_ros.simulation.task_registry import simulated_task
from clp_ros.simulation.task_simulation import TaskSimulation

_IMAGES = "observation.images."
# Seeds that a reset without one draws.
_SEEDS = 2**31


class TaskEnv(gym.Env[dict[str, Any], np.ndarray]):
    """One robot, its table and one task. Each step is one control step, and its action the command at the end of it.

    ``reset(seed=s)`` gives the start that ``clp evaluate`` plays with the seed s. States and actions have the policy's
    units. An episode terminates with success, and is truncated at the task's time limit. The reward is 1 at success and
    0 otherwise. ``info["is_success"]`` says whether the task is solved.

    Args:
        robot: Name of an embodiment that clp_ros ships.
        task: Name of one of its simulated tasks.
        observation_height: Height of the images in pixels.
        observation_width: Width of the images in pixels.
        episode_length: Longest episode, in control steps; None: the task's.
        render_mode: ``rgb_array``.

    Raises:
        clp_ros.core.errors.ClpError: There is no such robot or task, or a package is missing.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"], "render_fps": 50}

    def __init__(
        self,
        robot: str = "ur5",
        task: str = "pick_and_lift",
        observation_height: int = 96,
        observation_width: int = 96,
        episode_length: int | None = None,
        render_mode: str = "rgb_array",
    ) -> None:
        self.render_mode = render_mode
        embodiment = load_embodiment(robot)
        self._simulation = TaskSimulation(embodiment, simulated_task(task, embodiment))
        self.task = task
        self.metadata = {**self.metadata, "render_fps": round(1e9 / embodiment.period_ns)}
        limit_s = self._simulation.task.time_limit_s
        self._max_episode_steps = episode_length or round(limit_s * 1e9 / embodiment.period_ns)
        self._steps = 0
        self._size = observation_height, observation_width
        self._cameras = {camera.feature.removeprefix(_IMAGES): name for name, camera in embodiment.cameras.items()}
        joints = embodiment.joints
        self._offset, self._scale = (np.array([getattr(one, part) for one in joints]) for part in ("offset", "scale"))
        ends = (np.array([[one.lower, one.upper] for one in joints]).T - self._offset) / self._scale
        self.action_space = gym.spaces.Box(
            ends.min(axis=0).astype(np.float32), ends.max(axis=0).astype(np.float32), dtype=np.float32
        )
        picture = gym.spaces.Box(0, 255, (observation_height, observation_width, 3), np.uint8)
        self.observation_space = gym.spaces.Dict(
            {
                "agent_pos": gym.spaces.Box(-np.inf, np.inf, (len(joints),), np.float32),
                "pixels": gym.spaces.Dict(dict.fromkeys(self._cameras, picture)),
            }
        )

    @property
    def task_description(self) -> str:
        """The instruction of this start."""
        return self._simulation.instruction()

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Draws a start. See :class:`gymnasium.Env`."""
        super().reset(seed=seed, options=options)
        self._simulation.reset(int(self.np_random.integers(_SEEDS)) if seed is None else seed)
        self._steps = 0
        return self._observation(), {"is_success": False}

    def step(self, action: np.ndarray) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Simulates one control step. See :class:`gymnasium.Env`.

        Args:
            action: (joints,) float, in the policy's units; positions outside the joints' limits are clipped.
        """
        self._simulation.act(self._offset + np.asarray(action, dtype=np.float64) * self._scale)
        self._steps += 1
        is_success = self._simulation.success_s is not None
        is_over = not is_success and self._steps >= self._max_episode_steps
        return self._observation(), float(is_success), is_success, is_over, {"is_success": is_success}

    def render(self) -> np.ndarray:
        """Returns a picture of the first camera: (480, 640, 3) uint8."""
        return self._simulation.picture(next(iter(self._cameras.values())), 480, 640).copy()

    def close(self) -> None:
        """Frees the renderers."""
        self._simulation.close()

    def _observation(self) -> dict[str, Any]:
        return {
            "agent_pos": ((self._simulation.measured() - self._offset) / self._scale).astype(np.float32),
            "pixels": {
                feature: self._simulation.picture(name, *self._size).copy() for feature, name in self._cameras.items()
            },
        }
