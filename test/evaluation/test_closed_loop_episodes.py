# SPDX-License-Identifier: Apache-2.0
"""Episodes in closed loop, driven by a policy that looks ahead with the scripted expert."""

import importlib.util

import numpy as np
import pytest

from clp_ros.evaluation.closed_loop import LoopObservation, LoopSettings, play_chunks
from clp_ros.evaluation.outcome import EpisodeOutcome
from clp_ros.robots.embodiment import load_embodiment
from clp_ros.robots.trajectory import Trajectory
from clp_ros.simulation.closed_loop import START_NS
from clp_ros.simulation.episode import ExpertPolicy
from clp_ros.simulation.task_registry import simulated_task
from clp_ros.simulation.task_simulation import TaskSimulation

if not all(importlib.util.find_spec(package) for package in ("mujoco", "gym_aloha")):
    pytest.skip("the simulation needs requirements-simulation.txt", allow_module_level=True)


def chunk_of_expert(simulation: TaskSimulation, ahead: TaskSimulation, expert: ExpertPolicy, steps: int) -> np.ndarray:
    """What the scripted expert would do from the state that the simulation is in: (steps, joints), policy's units."""
    ahead.reset(0)
    for part in ("qpos", "qvel", "mocap_pos", "mocap_quat", "ctrl"):
        getattr(ahead.data, part)[:] = getattr(simulation.data, part)
    ahead.layout = simulation.layout
    ahead._command = simulation.commanded_positions()
    ahead._mujoco.mj_forward(ahead.mujoco_model, ahead.data)
    expert.reset(ahead, 0)
    rows = []
    for _ in range(steps):
        action, executed = expert.act(ahead)
        rows.append(action)
        ahead.act(executed)
    joints = simulation.embodiment.joints
    return (np.array(rows) - [joint.offset for joint in joints]) / [joint.scale for joint in joints]


def play(seed: int, settings: LoopSettings, change=lambda chunk: chunk) -> tuple[EpisodeOutcome, list[LoopObservation]]:
    embodiment = load_embodiment("ur5")
    task = simulated_task("pick_and_lift", embodiment)
    simulation, ahead = TaskSimulation(embodiment, task), TaskSimulation(embodiment, task)
    expert = ExpertPolicy(ahead)
    sizes = {"observation.images.cam_front": (24, 32)}
    episode, chunk, seen = play_chunks(simulation, seed, settings, sizes), None, []
    try:
        while True:
            seen.append(episode.send(chunk))
            chunk = change(chunk_of_expert(simulation, ahead, expert, 40))
    except StopIteration as ended:
        return ended.value, seen
    finally:
        simulation.close()


@pytest.mark.parametrize("settings", [LoopSettings(latency_s=0.0), LoopSettings(latency_s=0.09, mode="ensemble")])
def test_expert_solves_the_task_through_chunk_control(settings: LoopSettings) -> None:
    outcome, seen = play(3, settings)
    assert outcome.success
    assert outcome.seconds < 12
    assert (outcome.late, outcome.refused) == (0, 0)
    assert outcome.smoothness is not None
    assert outcome.chunks in (len(seen), len(seen) - 1)
    assert seen[0].task == outcome.instruction
    assert {name: image.shape for name, image in seen[0].images.items()} == {
        "observation.images.cam_front": (24, 32, 3)
    }
    assert seen[0].state.shape == (7,)


def test_chunks_that_must_not_be_sent_end_the_episode() -> None:
    """As the node stops after as many faults. The arm has not moved."""
    outcome, seen = play(3, LoopSettings(), lambda chunk: chunk + np.nan)
    assert not outcome.success
    assert (outcome.refused, outcome.chunks, len(seen)) == (20, 0, 20)
    assert outcome.seconds < 10


def test_latency_passes_on_the_robots_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk reaches the controllers when the latency has passed since its observation, between two control steps."""
    received: list[int] = []
    receive = TaskSimulation.receive

    def record(self: TaskSimulation, trajectory: Trajectory, now_ns: int) -> None:
        received.append(now_ns)
        receive(self, trajectory, now_ns)

    monkeypatch.setattr(TaskSimulation, "receive", record)
    outcome, seen = play(5, LoopSettings(latency_s=0.213))
    assert outcome.success
    sent_s = np.unique((np.array(received) - START_NS) / 1e9)
    assert len(sent_s) == outcome.chunks
    steps = (sent_s - 0.213) / 0.02
    assert steps == pytest.approx(np.round(steps), abs=1e-6)
    assert sent_s[0] == pytest.approx(0.213)
    # In mode replace, a slow policy observes when the robot follows its last chunk.
    assert np.diff(sent_s).min() >= 0.213 + 0.1
    assert len(seen) - outcome.chunks in (0, 1)
