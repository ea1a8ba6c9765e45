# SPDX-License-Identifier: Apache-2.0
"""The environment type ``clp_sim`` of LeRobot's commands."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import gymnasium as gym
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.envs.configs import EnvConfig
from lerobot.utils.constants import ACTION, OBS_IMAGES, OBS_STATE

from clp_ros.core.errors import ClpError
from clp_ros.robots.embodiment import load_embodiment
from clp_ros.simulation.task_registry import simulated_task, tasks_for

GYM_ID = "clp_sim/Task-v0"
_ALL_TASKS = "all"


@EnvConfig.register_subclass("clp_sim")
@dataclass
class ClpSimEnv(EnvConfig):
    """A simulated robot of clp_ros and its tasks.

    Attributes:
        robot: Name of an embodiment that clp_ros ships.
        task: A simulated task; with LeRobot 0.6 also several, separated by commas, or ``all``.
        fps: Set to the robot's control rate.
        episode_length: Longest episode, in control steps; None: the task's.
        observation_height: Height of the images in pixels.
        observation_width: Width of the images in pixels.
        render_mode: ``rgb_array``.
    """

    robot: str = "ur5"
    task: str | None = "pick_and_lift"
    fps: int = 50
    episode_length: int | None = None
    observation_height: int = 96
    observation_width: int = 96
    render_mode: str = "rgb_array"
    features: dict[str, PolicyFeature] = field(default_factory=dict)
    features_map: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        embodiment = load_embodiment(self.robot)
        for task in self.tasks:
            simulated_task(task, embodiment)  # raises early
        self.fps = round(1e9 / embodiment.period_ns)
        size = (embodiment.action_size,)
        self.features = {
            ACTION: PolicyFeature(FeatureType.ACTION, size),
            "agent_pos": PolicyFeature(FeatureType.STATE, size),
        }
        self.features_map = {ACTION: ACTION, "agent_pos": OBS_STATE}
        shape = (self.observation_height, self.observation_width, 3)
        for camera in embodiment.cameras.values():
            key = f"pixels/{camera.feature.removeprefix(f'{OBS_IMAGES}.')}"
            self.features[key] = PolicyFeature(FeatureType.VISUAL, shape)
            self.features_map[key] = camera.feature

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks' names."""
        if not self.task:
            raise ClpError("no task is given", where="--env.task", hint="give the name of a simulated task, or all")
        return tuple(tasks_for(self.robot)) if self.task == _ALL_TASKS else tuple(self.task.split(","))

    @property
    def package_name(self) -> str:
        """See :class:`EnvConfig`."""
        return "lerobot_env_clp"

    @property
    def gym_id(self) -> str:
        """See :class:`EnvConfig`."""
        return GYM_ID

    @property
    def gym_kwargs(self) -> dict[str, Any]:
        """Arguments of :class:`lerobot_env_clp.task_env.TaskEnv`."""
        return {"task": self.task, **self._common}

    @property
    def _common(self) -> dict[str, Any]:
        names = ("robot", "episode_length", "observation_height", "observation_width", "render_mode")
        return {name: getattr(self, name) for name in names}

    def create_envs(self, n_envs: int, use_async_envs: bool = False) -> dict[str, dict[int, gym.vector.VectorEnv]]:
        """Returns a vectorised environment for each task, by the robot's name and the task's number.

        Args:
            n_envs: Number of copies of each.
            use_async_envs: Whether each copy has a process of its own, if there is one task.
        """
        return {
            self.robot: {index: self._vector(task, n_envs, use_async_envs) for index, task in enumerate(self.tasks)}
        }

    def _vector(self, task: str, n_envs: int, use_async_envs: bool) -> gym.vector.VectorEnv:
        makers = [partial(_make, {"task": task, **self._common})] * n_envs
        # Of several tasks, LeRobot plays one at a time, but all environments exist from the beginning.
        if use_async_envs and n_envs > 1 and len(self.tasks) == 1:
            return gym.vector.AsyncVectorEnv(makers, context="forkserver")
        return gym.vector.SyncVectorEnv(makers)


def _make(arguments: dict[str, Any]) -> gym.Env[Any, Any]:
    """Returns an environment that costs nothing after its episode has ended, while LeRobot waits for the others."""
    from lerobot.envs.utils import FreezeAfterEpisodeEnd

    from lerobot_env_clp.task_env import TaskEnv

    return FreezeAfterEpisodeEnd(TaskEnv(**arguments))
