# SPDX-License-Identifier: Apache-2.0
"""Plays blocks of episodes in one process: it keeps a loaded policy, and as many simulated robots as play together."""

from __future__ import annotations

import statistics
import time
from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from clp_ros.core.errors import ClpError
from clp_ros.evaluation.closed_loop import LoopObservation, LoopSettings, Seconds, Snapshots, play_chunks
from clp_ros.evaluation.outcome import EpisodeOutcome
from clp_ros.policies.base import Policy
from clp_ros.robots.embodiment import Embodiment
from clp_ros.simulation.task_registry import simulated_task
from clp_ros.simulation.task_simulation import TaskSimulation

# Number of chunks from which the latency of a policy is measured.
_TIMED_CHUNKS = 9


@dataclass(frozen=True)
class PolicySetting:
    """A checkpoint, and how it is loaded.

    Attributes:
        checkpoint: Its folder.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        mode: How its chunks are joined. In mode ``rtc``, it continues its last chunk.
        rtc_horizon: Least number of steps of the last chunk that guide the next, in mode ``rtc``.
    """

    checkpoint: Path
    device: str
    mode: str
    rtc_horizon: int


@dataclass(frozen=True)
class Block:
    """Episodes of one policy and one task that are played together.

    Attributes:
        policy: The policy.
        embodiment: The robot.
        task: Name of the task.
        seeds: The starts.
        settings: How the policy drives the robot.
        picture_every_s: Time between two pictures for people, in seconds; inf: the first and the last; None: none.
    """

    policy: PolicySetting
    embodiment: Embodiment
    task: str
    seeds: tuple[int, ...]
    settings: LoopSettings
    picture_every_s: float | None = None


@dataclass(frozen=True)
class BlockResult:
    """The outcomes of a block in the order of its seeds, where the time went, and pictures for people, by seed."""

    outcomes: list[EpisodeOutcome]
    seconds: Seconds
    pictures: dict[int, list[np.ndarray]] = field(default_factory=dict)


class Player:
    """Plays blocks. It holds one policy and the simulated robots of one task at a time."""

    def __init__(self) -> None:
        self._policy: tuple[PolicySetting, Policy] | None = None
        self._simulations: list[TaskSimulation] = []

    def close(self) -> None:
        """Frees the renderers and the policy."""
        self._policy = None
        for simulation in self._simulations:
            simulation.close()
        self._simulations = []

    def prepare(self, setting: PolicySetting, embodiment: Embodiment, is_timed: bool) -> float | None:
        """Loads a policy, checks that it fits the robot, and may measure the time of one chunk.

        Returns:
            The median time from images and state to the actions of one robot, in seconds; None: not measured.

        Raises:
            ClpError: The policy does not load or does not fit.
        """
        policy = self._loaded(setting, embodiment)
        if not is_timed:
            return None
        images = {name: np.zeros((*policy.camera_sizes[name], 3), dtype=np.uint8) for name in policy.cameras}
        state = np.zeros(policy.state_size, dtype=np.float32)
        policy.warm_up()
        times = []
        for _ in range(_TIMED_CHUNKS):
            begun = time.perf_counter()
            policy.predict_chunk(images, state, "measure the time")  # returns actions on the CPU, so the GPU is done
            times.append(time.perf_counter() - begun)
        return statistics.median(times)

    def play(self, block: Block) -> BlockResult:
        """Plays a block. The same block gives the same outcomes on one machine.

        Raises:
            ClpError: The policy does not load or does not fit, or rendering fails.
        """
        policy = self._loaded(block.policy, block.embodiment)
        sizes = {name: policy.camera_sizes[name] for name in policy.cameras}
        simulations = self._simulated(block)
        seconds = Seconds()
        shots: dict[int, Snapshots] = {}
        if block.picture_every_s is not None:
            shots = {seed: Snapshots(block.picture_every_s) for seed in block.seeds}
        episodes = {
            seed: play_chunks(simulation, seed, block.settings, sizes, seconds, shots.get(seed))
            for seed, simulation in zip(block.seeds, simulations, strict=True)
        }
        outcomes = _play_together(policy, episodes, block.settings.mode == "rtc", seconds)
        pictures = {seed: shot.taken for seed, shot in shots.items()}
        return BlockResult([outcomes[seed] for seed in block.seeds], seconds, pictures)

    def _loaded(self, setting: PolicySetting, embodiment: Embodiment) -> Policy:
        if self._policy is None or self._policy[0] != setting:
            from clp_ros.policies.loading import load_policy

            self._policy = None
            policy = load_policy(setting.checkpoint, setting.device)
            features = [camera.feature for camera in embodiment.cameras.values()]
            policy.check_features(features, embodiment.action_size, embodiment.name)
            policy.check_normalised()
            if setting.mode == "rtc":
                policy.enable_rtc(setting.rtc_horizon)
            self._policy = setting, policy
        return self._policy[1]

    def _simulated(self, block: Block) -> list[TaskSimulation]:
        """Returns a simulated robot for each of a block's episodes."""
        task = simulated_task(block.task, block.embodiment)
        try:
            for simulation in self._simulations:
                if simulation.embodiment != block.embodiment:
                    raise ClpError("another robot")
                simulation.task = task
        except ClpError:  # another robot or another scene
            for simulation in self._simulations:
                simulation.close()
            self._simulations = []
        while len(self._simulations) < len(block.seeds):
            self._simulations.append(TaskSimulation(block.embodiment, task))
        return self._simulations[: len(block.seeds)]


def _play_together(
    policy: Policy,
    episodes: dict[int, Generator[LoopObservation, np.ndarray, EpisodeOutcome]],
    is_rtc: bool,
    seconds: Seconds,
) -> dict[int, EpisodeOutcome]:
    """Plays episodes by seed. The policy runs once for the observations of all that wait for a chunk."""
    import torch

    outcomes: dict[int, EpisodeOutcome] = {}
    waiting: dict[int, LoopObservation] = {}
    chunks: dict[int, np.ndarray] = {}
    rounds, first = 0, min(episodes)
    while len(outcomes) < len(episodes):
        for seed, episode in episodes.items():
            if seed in outcomes:
                continue
            try:
                waiting[seed] = episode.send(chunks.pop(seed)) if seed in chunks else next(episode)
            except StopIteration as ended:
                outcomes[seed] = ended.value
        if not waiting:
            continue
        # The noise of a flow or diffusion depends on the starts and the time only.
        torch.manual_seed(int(np.random.SeedSequence([first, rounds]).generate_state(1)[0]))
        rounds += 1
        begun = time.perf_counter()
        if is_rtc:
            (seed, one), *others = waiting.items()
            if others:
                raise ClpError("real-time chunking plays one episode at a time", hint="give --batch 1")
            chunks = {
                seed: policy.predict_chunk(
                    one.images, one.state, one.task, elapsed_steps=one.elapsed_steps, delay_steps=one.delay_steps
                )
            }
        else:
            made = policy.predict_chunks([(one.images, one.state, one.task) for one in waiting.values()])
            chunks = dict(zip(waiting, made, strict=True))
        seconds.policy += time.perf_counter() - begun
        waiting = {}
    return outcomes
