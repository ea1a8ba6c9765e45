# SPDX-License-Identifier: Apache-2.0
"""The simulated tasks as LeRobot environments: gymnasium's checks, starts, success, and stock lerobot-eval."""

import importlib.util
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

if not all(importlib.util.find_spec(package) for package in ("mujoco", "gym_aloha")):
    pytest.skip("the simulation's packages are in requirements-simulation.txt", allow_module_level=True)
from clp_ros.core.errors import ClpError
from clp_ros.evaluation.closed_loop import start_hash
from clp_ros.robots.embodiment import load_embodiment
from clp_ros.simulation.episode import ExpertPolicy
from clp_ros.simulation.task_registry import simulated_task
from clp_ros.simulation.task_simulation import TaskSimulation

pytest.importorskip("lerobot_env_clp", reason="make setup installs it")
from lerobot_env_clp import GYM_ID, ClpSimEnv, TaskEnv


@pytest.fixture(scope="module")
def env() -> Iterator[TaskEnv]:
    made = TaskEnv("ur5", "put_into_bin", observation_height=24, observation_width=32)
    yield made
    made.close()


def test_gymnasium_finds_nothing_wrong() -> None:
    import gymnasium
    from gymnasium.utils.env_checker import check_env

    made = gymnasium.make(GYM_ID, robot="aloha_bimanual", task="hand_over", observation_height=24, observation_width=32)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_env(made.unwrapped)
    made.close()
    # Joint positions are neither symmetric nor normalised, and have no names for infinity.
    expected = ("symmetric and normalized", "is -infinity", "is infinity")
    assert not [str(one.message) for one in caught if not any(text in str(one.message) for text in expected)]


def test_a_seed_is_the_start_of_clp_evaluate(env: TaskEnv) -> None:
    embodiment = load_embodiment("ur5")
    other = TaskSimulation(embodiment, simulated_task("put_into_bin", embodiment))
    for seed in (5, 6):
        observation, info = env.reset(seed=seed)
        other.reset(seed)
        assert start_hash(env._simulation) == start_hash(other)
        assert env.task_description == other.instruction()
        state = (other.measured() - [joint.offset for joint in embodiment.joints]) / [
            joint.scale for joint in embodiment.joints
        ]
        np.testing.assert_allclose(observation["agent_pos"], state, atol=1e-6)
        assert not info["is_success"]


def test_the_expert_succeeds_and_the_episode_ends(env: TaskEnv) -> None:
    env.reset(seed=2)
    expert = ExpertPolicy(env._simulation)
    expert.reset(env._simulation, 2)
    joints = env._simulation.embodiment.joints
    offset, scale = (np.array([getattr(joint, part) for joint in joints]) for part in ("offset", "scale"))
    env._size = 16, 16  # pictures cost most of the time
    terminated = truncated = False
    steps = rewards = 0
    while not (terminated or truncated):
        action, _ = expert.act(env._simulation)
        _, reward, terminated, truncated, info = env.step(((action - offset) / scale).astype(np.float32))
        steps, rewards = steps + 1, rewards + reward
        assert info["is_success"] is terminated
    env._size = 24, 32
    assert terminated
    assert (rewards, truncated) == (1.0, False)
    assert steps / 50 == pytest.approx(env._simulation.success_s)


def test_wrong_names_are_refused_early() -> None:
    with pytest.raises(ClpError, match="did you mean 'put_into_bin'"):
        ClpSimEnv(robot="ur5", task="put_into_bins")
    assert ClpSimEnv(robot="aloha_bimanual", task="all").tasks == ("hand_over", "lift_bar", "put_into_bin")


def test_stock_lerobot_eval(
    family_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `lerobot-eval` runs: it finds the plugin, makes the environment and writes its file."""
    from lerobot.scripts import lerobot_eval

    checkpoint = family_checkpoint("smolvla", "ur5")
    arguments = [
        f"--policy.path={checkpoint}",
        "--policy.device=cpu",
        "--policy.n_action_steps=5",
        "--env.type=clp_sim",
        "--env.robot=ur5",
        "--env.task=pick_and_lift",
        "--env.episode_length=6",
        "--env.observation_height=24",
        "--env.observation_width=32",
        "--eval.n_episodes=1",
        "--eval.batch_size=1",
        f"--output_dir={tmp_path}",
    ]
    monkeypatch.setattr(sys, "argv", ["lerobot-eval", *arguments])
    lerobot_eval.main()
    info = json.loads((tmp_path / "eval_info.json").read_text())
    assert info["overall"]["n_episodes"] == 1
    assert info["overall"]["pc_success"] == 0.0
