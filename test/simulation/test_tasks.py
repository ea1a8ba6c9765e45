# SPDX-License-Identifier: Apache-2.0
"""Simulated tasks: the experts solve them, their success tests tell them apart, and a seed is a start."""

import importlib
import importlib.metadata
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from clp_ros.core.errors import ClpError
from clp_ros.robots.embodiment import load_embodiment

if not all(importlib.util.find_spec(package) for package in ("mujoco", "gym_aloha")):
    pytest.skip("the simulation's packages are in requirements-simulation.txt", allow_module_level=True)
from clp_ros.simulation import task_registry
from clp_ros.simulation.closed_loop import START_NS, ScheduledSender, ScheduleSettings
from clp_ros.simulation.episode import ExpertPolicy, play_episode, run_episode
from clp_ros.simulation.perturbation import Perturbation
from clp_ros.simulation.task_registry import simulated_task, simulated_tasks, tasks_for
from clp_ros.simulation.task_simulation import TaskSimulation

ROBOTS = ("ur5", "ur10e", "aloha_single", "aloha_bimanual")
CASES = [(robot, task) for robot in ROBOTS for task in tasks_for(robot)]


@pytest.fixture(scope="module")
def simulations() -> dict[str, TaskSimulation]:
    """One simulation of each robot, whose tasks all have one scene."""
    return {robot: TaskSimulation(load_embodiment(robot), next(iter(tasks_for(robot).values()))) for robot in ROBOTS}


def test_every_robot_has_three_tasks_of_one_scene() -> None:
    for robot in ROBOTS:
        tasks = tasks_for(robot)
        assert len(tasks) >= 3
        assert len({task.scene(robot) for task in tasks.values()}) == 1
        wordings = [wording for task in tasks.values() for wording in task.wordings]
        assert len(set(wordings)) == len(wordings)


@pytest.mark.parametrize(("robot", "name"), CASES)
def test_the_expert_solves_its_task_and_no_other(robot: str, name: str, simulations: dict[str, TaskSimulation]) -> None:
    simulation = simulations[robot]
    simulation.task = simulated_task(name, simulation.embodiment)
    expert = ExpertPolicy(simulation, 1.5)
    joints = simulation.embodiment.joints
    fastest = np.array([joint.velocity for joint in joints]) * simulation.embodiment.period_ns / 1e9
    for seed in (3, 4):
        others = dict.fromkeys((task for task in tasks_for(robot) if task != name), 0.0)
        actions = []
        for _, action in play_episode(simulation, expert, seed):
            if not actions:
                state = simulation.state()
                assert not any(task.success(state) for task in tasks_for(robot).values())
            actions.append(action)
            state = simulation.state()
            for other in others:
                done = simulated_tasks()[other].success(state)
                others[other] = others[other] + 0.02 if done else 0.0
                assert others[other] < simulated_tasks()[other].hold_s, f"{name} solves {other} too"
        assert simulation.success_s is not None, f"seed {seed}"
        assert (np.abs(np.diff(actions, axis=0)) <= fastest + 1e-9).all()


@pytest.mark.parametrize("robot", ["ur5", "aloha_bimanual"])
def test_a_seed_is_a_start_whatever_the_task(robot: str, simulations: dict[str, TaskSimulation]) -> None:
    simulation = simulations[robot]
    found = {}
    for task in tasks_for(robot).values():
        simulation.task = task
        for seed in (7, 8):
            simulation.reset(seed)
            start = (simulation.data.qpos.tobytes(), simulation.data.mocap_pos.tobytes())
            colours = tuple(placement.colour for placement in simulation.layout.values())
            assert found.setdefault(seed, (start, colours)) == (start, colours)
    assert found[7] != found[8]
    assert len({task.instruction(simulation.layout) for task in tasks_for(robot).values()}) == len(tasks_for(robot))
    many = []
    for seed in range(40):
        simulation.reset(seed)
        many.append(simulation.layout)
    assert len({layout["cube"].colour for layout in many}) == 4
    assert len({frozenset(layout) for layout in many}) > 1  # distractors


def test_an_episode_is_reproducible_and_pushes_are_recovered_from(simulations: dict[str, TaskSimulation]) -> None:
    simulation = simulations["ur5"]
    simulation.task = simulated_task("pick_and_lift", simulation.embodiment)
    pushed = ExpertPolicy(simulation, perturbation=Perturbation(0.05))
    first = run_episode(simulation, pushed, 5)
    assert first.success
    assert first.seconds == pytest.approx(len(first.states) * 0.02)
    # The same seed gives the same pushes. Actions are the expert's answers, from which pushed commands differ.
    actions, commands = [], []
    for _, action in play_episode(simulation, pushed, 5):
        commands.append(simulation.commanded_positions())
        actions.append(action)
    np.testing.assert_array_equal(first.actions, actions)
    gaps = np.abs(np.array(commands[1:]) - np.array(actions[:-1])).max(axis=1)
    assert 15 <= (gaps > 1e-9).sum() <= 0.5 * len(gaps)
    assert simulation.instruction() == first.instruction


def test_pictures_of_an_episode(simulations: dict[str, TaskSimulation]) -> None:
    simulation = simulations["ur5"]
    simulation.task = simulated_task("put_into_bin", simulation.embodiment)
    try:
        found = run_episode(
            simulation, ExpertPolicy(simulation), 1, size=(96, 72), picture_every=10, time_limit_s=0.5, rest_s=0
        )
    except ClpError as error:
        pytest.skip(str(error))
    assert not found.success
    assert found.success_s is None
    assert found.picture_steps.tolist() == [0, 10, 20]
    assert set(found.pictures) == set(simulation.embodiment.cameras)
    for pictures in found.pictures.values():
        assert pictures.shape == (3, 72, 96, 3)
        assert (pictures[0] != pictures[-1]).any()
    # The cube is seen in the colour that the instruction may name.
    colour = np.array(simulation.layout["cube"].rgba[:3])
    front = found.pictures["cam_front"][0].reshape(-1, 3) / 255
    front = front[front.max(axis=1) > 0.3]
    cosines = front @ colour / np.linalg.norm(front, axis=1) / np.linalg.norm(colour)
    assert (cosines > 0.97).sum() >= 8


def test_it_is_driven_by_chunks_too(simulations: dict[str, TaskSimulation]) -> None:
    """By trajectories through the policy node's schedule and the controllers' rules, as an evaluation does."""
    simulation = simulations["ur5"]
    simulation.task = simulated_task("pick_and_lift", simulation.embodiment)
    actions = np.array([action for _, action in play_episode(simulation, ExpertPolicy(simulation), 2)])
    simulation.reset(2)
    settings = ScheduleSettings(send_lead_time_s=0.0)
    sender = ScheduledSender(simulation, settings, replan_steps=25, latency_s=0.0)
    period = simulation.embodiment.period_ns
    for tick in range(len(actions) + 25):
        now = START_NS + tick * period
        simulation.step(now)
        if tick % 25 == 0 and tick < len(actions):
            sender.chunk(actions[tick : tick + 50], now, now, simulation.measured())
    assert sender.counts["chunks"] > 5
    assert not sender.counts["refused"]
    assert simulation.success_s is not None


def test_a_file_in_another_package_is_a_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "other_tasks"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "lift_higher.py").write_text(
        "from clp_ros.simulation.tasks.pick_and_lift import PickAndLift\n"
        "class LiftHigher(PickAndLift):\n"
        "    name = 'lift_higher'\n"
        "    robots = ('ur5',)\n"
        "    wordings = ('Lift the cube higher.',)\n"
        "TASK = LiftHigher()\n"
    )
    information = tmp_path / "other_tasks-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: other_tasks\nVersion: 1.0\n")
    entries = f"[{task_registry.GROUP}]\nothers = other_tasks\nmissing = no_such_package\n"
    (information / "entry_points.txt").write_text(entries)
    monkeypatch.syspath_prepend(str(tmp_path))
    simulated_tasks.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match="missing .* is left out: ModuleNotFoundError"):
            assert "lift_higher" in tasks_for("ur5")
        assert "lift_higher" not in tasks_for("ur10e")
        simulation = TaskSimulation(load_embodiment("ur5"), simulated_task("lift_higher", load_embodiment("ur5")))
        assert simulation.instruction() == "Lift the cube higher."
    finally:
        simulated_tasks.cache_clear()
        sys.modules.pop("other_tasks", None)


def test_other_tasks_are_refused(simulations: dict[str, TaskSimulation]) -> None:
    embodiment = load_embodiment("ur5")
    with pytest.raises(ClpError, match=r"unknown simulated task 'push_to_zon'.*push_to_zone"):
        simulated_task("push_to_zon", embodiment)
    with pytest.raises(ClpError, match=r"ur5 cannot do the simulated task 'hand_over'.*pick_and_lift"):
        simulated_task("hand_over", embodiment)
    with pytest.raises(ClpError, match="ur5 cannot do"):
        TaskSimulation(embodiment, simulated_tasks()["hand_over"])
    with pytest.raises(ClpError, match="another scene"):
        simulations["ur5"].task = simulated_tasks()["hand_over"]
