# SPDX-License-Identifier: Apache-2.0
"""``clp record --task``: demonstrations of a simulated task as bags, with their instructions and actions."""

import csv
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from clp_ros.bags.reader import open_bag
from clp_ros.cli import main
from clp_ros.core.errors import ClpError
from clp_ros.datasets import read_episode
from clp_ros.robots.embodiment import load_embodiment

if not all(importlib.util.find_spec(package) for package in ("mujoco", "gym_aloha")):
    pytest.skip("the simulation's packages are in requirements-simulation.txt", allow_module_level=True)
from clp_ros.simulation.robot import SimulatedRobot
from clp_ros.simulation.task_recording import INSTRUCTION_TOPIC
from clp_ros.simulation.task_registry import simulated_tasks
from clp_ros.simulation.task_simulation import TaskSimulation

FEW = ("--camera-rate", "20", "--size", "32x24", "--speed", "1.5")


@pytest.fixture(scope="module", autouse=True)
def drawing() -> None:
    robot = SimulatedRobot(load_embodiment("ur5"))
    try:
        robot.picture("cam_front", 24, 32)
    except ClpError as error:
        pytest.skip(str(error))
    finally:
        robot.close()


def record(output: Path, *arguments: str, robot: str = "ur5", task: str = "push_to_zone") -> int:
    return main(["record", "--robot", robot, "--task", task, "--output", str(output), *FEW, *arguments])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_bags_with_instructions_and_clean_actions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pushes = ("--episodes", "2", "--perturb", "0.04")
    assert record(tmp_path / "one", *pushes, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["task"] == "push_to_zone"
    assert told["solved"] == 2
    assert record(tmp_path / "again", *pushes) == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "again")

    with (tmp_path / "one" / "episodes.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    wordings = simulated_tasks()["push_to_zone"].wordings
    for row, episode in zip(rows, told["episodes"], strict=True):
        bag = tmp_path / "one" / row["bag"]
        assert row["instruction"] == episode["instruction"]
        assert any(row["instruction"].startswith(wording.split(" {")[0]) for wording in wordings)
        (said,) = open_bag(bag).messages([INSTRUCTION_TOPIC])
        assert said.data.data == row["instruction"]

    # The recorded embodiment reads the expert's answers as actions, which the pushed arm does not follow.
    recorded = load_embodiment(tmp_path / "one" / "embodiment.yaml")
    assert recorded.actions.source == "topics"
    followed = recorded.with_action_source("next_state")
    bag = tmp_path / "one" / "episode_000"
    answers, states = ([frame.action for frame in read_episode(open_bag(bag), robot)] for robot in (recorded, followed))
    steps = min(len(answers), len(states))
    assert steps > 0.8 * told["episodes"][0]["seconds"] * recorded.control_rate_hz
    off = np.abs(np.array(answers[:steps]) - np.array(states[:steps]))[:, :6]
    assert np.median(off) < 0.01
    assert off.max() > 0.005


def test_both_arms_are_recorded(tmp_path: Path) -> None:
    assert record(tmp_path / "bags", robot="aloha_bimanual", task="lift_bar") == 0
    recorded = load_embodiment(tmp_path / "bags" / "embodiment.yaml")
    first = next(iter(read_episode(open_bag(tmp_path / "bags" / "episode_000"), recorded)))
    assert first.action.shape == (14,)


def test_a_failed_episode_is_not_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    played: list[int] = []
    real = TaskSimulation.reset

    def reset(simulation: TaskSimulation, *arguments: object) -> None:
        played.append(0)
        real(simulation, *arguments)

    monkeypatch.setattr(TaskSimulation, "reset", reset)
    task = type(simulated_tasks()["push_to_zone"])
    success = task.success
    # The simulation itself is reset twice when it is made; the third reset begins the first try.
    monkeypatch.setattr(task, "success", lambda self, state: len(played) > 3 and success(self, state))
    monkeypatch.setattr(task, "time_limit_s", 6.0)
    assert record(tmp_path / "bags") == 0
    assert "1 episode, all solved; 1 start left out, not solved; " in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "bags" / "episode_000").iterdir()) == [
        "episode_000.mcap",
        "metadata.yaml",
    ]

    monkeypatch.setattr(task, "success", lambda self, state: False)
    monkeypatch.setattr(task, "time_limit_s", 0.1)
    assert record(tmp_path / "none") == 1
    assert "does not solve episode 0 of push_to_zone: 10 starts were tried" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_faults_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert record(tmp_path / "new", task="hand_over") == 1
    assert "ur5 cannot do the simulated task 'hand_over'" in capsys.readouterr().err
    assert main(["record", "--embodiment", "ur5", "--perturb", "0.1", "--output", str(tmp_path / "new")]) == 1
    assert "are for simulated tasks" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        record(tmp_path / "new", "--perturb", "1")
    assert stopped.value.code == 2
    assert not list(tmp_path.iterdir())
