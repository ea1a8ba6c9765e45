# SPDX-License-Identifier: Apache-2.0
"""Evaluations in LeRobot's environments: our own simulated tasks, and LIBERO where it is installed."""

import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from clp_ros import cli
from clp_ros.core.errors import ClpError
from clp_ros.evaluation import lerobot_envs
from clp_ros.jobs.evaluate import EvaluateRequest, run

pytestmark = pytest.mark.usefixtures("one_thread")

HAS_SIMULATION = all(importlib.util.find_spec(one) for one in ("mujoco", "gym_aloha", "lerobot_env_clp"))
simulated = pytest.mark.skipif(not HAS_SIMULATION, reason="needs requirements-simulation.txt and lerobot_env_clp")


def missing_libero() -> str:
    try:
        lerobot_envs.check_libero()
    except ClpError as error:
        return str(error)
    return ""


@simulated
def test_starts_and_outcomes_of_an_environment(
    family_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Success comes from the environment; a batch may be larger than what is left of the episodes."""
    from clp_ros.robots.embodiment import load_embodiment
    from clp_ros.simulation.task_registry import simulated_task
    from clp_ros.simulation.task_simulation import TaskSimulation
    from lerobot_env_clp import TaskEnv

    step = TaskEnv.step
    embodiment = load_embodiment("ur5")
    simulation = TaskSimulation(embodiment, simulated_task("pick_and_lift", embodiment))
    places = {}
    for seed in (1, 2, 3):
        simulation.reset(seed)
        places[seed] = simulation.layout["cube"].position[0]

    def is_far(simulation: TaskSimulation) -> bool:
        return bool(simulation.layout["cube"].position[0] > min(places.values()))

    def solved_in_the_third_step(self: TaskEnv, action: np.ndarray) -> tuple:
        observation, _, _, truncated, _ = step(self, action)
        is_success = self._steps == 3 and is_far(self._simulation)
        return observation, float(is_success), is_success, truncated, {"is_success": is_success}

    asked = {
        "checkpoints": (family_checkpoint("smolvla", "ur5"),),
        "env": "clp_sim:pick_and_lift",
        "env_options": {"robot": "ur5", "episode_length": 5, "observation_height": 24, "observation_width": 32},
        "episodes": 3,
        "seed": 1,
        "batch": 2,
        "workers": 0,
        "replan_steps": 5,
    }
    result = run(EvaluateRequest(**asked, output=tmp_path / "e"))
    (row,) = result.checkpoints
    assert [(one.seed, one.success, one.seconds) for one in row.outcomes] == [(n, False, 0.1) for n in (1, 2, 3)]
    assert len({one.start for one in row.outcomes}) == 3
    assert (row.latency_ms, result.embodiment, result.task, result.mode) == (None, "clp_sim", "pick_and_lift", "steps")
    assert (tmp_path / "e" / "contact_sheet.png").is_file()
    monkeypatch.setattr(TaskEnv, "step", solved_in_the_third_step)
    again = run(EvaluateRequest(**asked, output=tmp_path / "e"))
    assert again.checkpoints == result.checkpoints  # it was played already
    played = run(EvaluateRequest(**asked)).checkpoints[0].outcomes
    assert [one.start for one in played] == [one.start for one in row.outcomes]
    assert [one.success for one in played] == [place > min(places.values()) for place in places.values()]
    assert {one.seconds for one in played if one.success} == {0.06}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--env", "libro:libero_spatial"], "did you mean 'libero'"),
        (["--env", "aloha:AlohaInsertion-v0", "--env-option", "episode_lenght=3"], "did you mean 'episode_length'"),
        (["--env", "aloha"], "TYPE:TASK"),
        (["--env", "aloha:AlohaInsertion-v0", "--latency", "50"], "has no latency"),
    ],
)
def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert cli.main(["evaluate", str(tmp_path), *arguments]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("libero") is not None, reason="LIBERO is installed")
def test_libero_that_is_missing_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evaluate", str(tmp_path), "--env", "libero:libero_spatial"]) == 1
    assert "LIBERO is not installed" in capsys.readouterr().err


@pytest.mark.slow  # The environment of clp_ros covers the same way through lerobot's rollouts.
@pytest.mark.skipif(bool(missing_libero()), reason=f"LIBERO: {missing_libero()}")
def test_libero(family_checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A pruned checkpoint plays one short episode."""
    from clp_ros.jobs import prune

    os.environ.setdefault("MUJOCO_GL", "egl")
    pruned = tmp_path / "pruned"
    prune.run(prune.PruneRequest(checkpoint=family_checkpoint("smolvla"), removal={"vlm": (1, 2)}, output=pruned))
    options = ["task_ids=[0]", "episode_length=4", "observation_height=64", "observation_width=64"]
    arguments = ["--env", "libero:libero_spatial", "--env-option", *options, "--episodes", "1", "--json"]
    assert cli.main(["evaluate", str(pruned), *arguments]) == 0
    (outcome,) = json.loads(capsys.readouterr().out)["checkpoints"][0]["outcomes"]
    assert (outcome["task"], outcome["success"], outcome["seconds"]) == ("libero_spatial-0", False, 0.2)
    assert (
        outcome["instruction"] == "pick up the black bowl between the plate and the ramekin and place it on the plate"
    )
