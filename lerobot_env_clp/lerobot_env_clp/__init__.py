# SPDX-License-Identifier: Apache-2.0
"""The simulated robots and tasks of clp_ros as LeRobot environments. Importing this registers the type ``clp_sim``."""

import gymnasium

from lerobot_env_clp.configuration_clp_sim import GYM_ID, ClpSimEnv
from lerobot_env_clp.task_env import TaskEnv

__all__ = ["GYM_ID", "ClpSimEnv", "TaskEnv"]

gymnasium.register(GYM_ID, entry_point="lerobot_env_clp.task_env:TaskEnv")
