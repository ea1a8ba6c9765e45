# SPDX-License-Identifier: Apache-2.0
"""Records demonstrations of a simulated robot as rosbag2 bags. No ROS, faster than real time, reproducible by seed."""

from __future__ import annotations

import heapq
import math
import operator
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clp_ros.bags.writer import write_bag
from clp_ros.core.errors import ClpError
from clp_ros.core.files import atomic_folder, check_output_folder
from clp_ros.robots.embodiment import JOINT_STATE_TYPE, Embodiment
from clp_ros.robots.trajectory import split_trajectory
from clp_ros.simulation.closed_loop import START_NS
from clp_ros.simulation.experts import demonstration, solved
from clp_ros.simulation.motion import Motion
from clp_ros.simulation.recorded_topics import APART_NS, DEFAULT_SETTINGS, EPOCH_NS, RecordedTopics, RecordingSettings
from clp_ros.simulation.robot import SimulatedRobot

# Largest random offset of the arm's initial pose, in rad, and time at rest after the task, in seconds.
_SPREAD, _REST_S = 0.1, 0.5
# Number of initial states that are tried for an episode.
_TRIES = 10


@dataclass(frozen=True)
class Episode:
    """One recording.

    Attributes:
        bag: The bag's folder.
        tries: Number of initial states that were tried. The last one was solved.
        seconds: Duration on the robot's clock, in seconds.
        messages: Number of messages by topic.
    """

    bag: Path
    tries: int
    seconds: float
    messages: dict[str, int]


def record(
    embodiment: Embodiment,
    output: Path,
    episodes: int | None = None,
    seed: int = 0,
    settings: RecordingSettings = DEFAULT_SETTINGS,
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Episode]:
    """Records episodes in which the scripted expert solves the robot's task.

    The seed and the number of the episode determine the position of the cube and the initial pose of the arm. If the
    expert does not solve the task from an initial state, another one is drawn.

    Args:
        embodiment: A robot that clp_ros ships.
        output: Folder for the bags ``episode_000``, …. Without ``episodes``, the folder of the only bag.
        episodes: Number of episodes; None: one, without a number.
        seed: Seed of all random numbers.
        settings: Rates, size and quality.
        overwrite: Whether an output folder that is not empty is replaced.
        progress: Called with the number of images done and in total.

    Returns:
        The episodes.

    Raises:
        ClpError: The robot has no simulation, a package is missing, rendering fails, the output folder is not empty, or
            the expert solves an episode from none of ten initial states.
    """
    check_output_folder(output, overwrite)
    recorder = _Recorder(embodiment, settings, seed, progress, episodes or 1)
    try:
        with atomic_folder(output, overwrite) as folder:
            if episodes is None:
                return [recorder.record(0, folder, output)]
            done = []
            for index in range(episodes):
                bag = folder / f"episode_{index:03d}"
                bag.mkdir()
                done.append(recorder.record(index, bag, output / bag.name))
            return done
    finally:
        recorder.robot.close()


class _Recorder:
    """Records episodes of one robot."""

    def __init__(
        self,
        embodiment: Embodiment,
        settings: RecordingSettings,
        seed: int,
        progress: Callable[[int, int], None],
        episodes: int,
    ) -> None:
        self.robot = SimulatedRobot(embodiment)
        self._embodiment = embodiment
        self._settings = settings
        self._seed = seed
        self._topics = RecordedTopics(self.robot, settings)
        self._progress, self._episodes = progress, episodes
        self._topics.picture(next(iter(embodiment.cameras)))  # raises now if rendering fails

    def record(self, index: int, folder: Path, final: Path) -> Episode:
        """Writes an episode into an empty folder, which is renamed to ``final`` later."""
        notes = {"made_by": "clp record", "seed": str(self._seed), "episode": str(index)}
        topics = {source.topic: source.kind for source in self._topics.sources}
        for attempt in range(_TRIES):
            self.robot.reset([self._seed, index, attempt], _SPREAD)
            try:
                motion = demonstration(self.robot)
            except ValueError:  # out of reach
                continue
            counts: Counter[str] = Counter()
            write_bag(folder, final.name, topics, self._messages(index, motion, counts), notes)
            if solved(self.robot):
                return Episode(final, attempt + 1, motion.seconds + _REST_S, dict(counts))
            for file in folder.iterdir():
                file.unlink()
        raise ClpError(
            f"the expert does not solve episode {index} in {_TRIES} starts",
            where=f"--seed {self._seed}",
            hint="take another --seed",
        )

    def _messages(self, index: int, motion: Motion, counts: Counter[str]) -> Iterator[tuple[int, str, Any]]:
        """Runs the motion, and yields receive time, topic and message in the order of a recorder."""
        seconds = motion.seconds + _REST_S
        pictures = len(self._embodiment.cameras) * round(seconds * self._settings.camera_rate)
        delay = np.random.default_rng([self._seed, index])
        waiting: list[tuple[int, int, str, Any]] = []  # a joint state may arrive before an earlier image
        self._begin(motion)
        for number, (time_ns, source) in enumerate(self._topics.due(seconds)):
            stamp_ns = EPOCH_NS + index * APART_NS + time_ns
            while waiting and waiting[0][0] <= stamp_ns:
                receive_ns, _, topic, message = heapq.heappop(waiting)
                yield receive_ns, topic, message
            self.robot.step(START_NS + time_ns)
            receive_ns = stamp_ns + round(delay.uniform(*source.delay_ms) * 1e6)
            heapq.heappush(waiting, (receive_ns, number, source.topic, self._topics.message(source, stamp_ns)))
            counts[source.topic] += 1
            if source.kind != JOINT_STATE_TYPE:
                done = index * pictures + sum(counts[camera.topic] for camera in self._embodiment.cameras.values())
                self._progress(done, self._episodes * pictures)
        for receive_ns, _, topic, message in sorted(waiting, key=operator.itemgetter(0, 1)):
            yield receive_ns, topic, message

    def _begin(self, motion: Motion) -> None:
        """Gives the motion to the robot's controllers."""
        self.robot.step(START_NS)
        period_s = self._embodiment.period_ns / 1e9
        times = np.arange(1, math.ceil(motion.seconds / period_s) + 1) * period_s
        for trajectory in split_trajectory(times, motion.at(times), self._embodiment):
            self.robot.receive(trajectory, START_NS)
