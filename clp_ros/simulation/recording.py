# SPDX-License-Identifier: Apache-2.0
"""Records demonstrations of a simulated robot as rosbag2 bags. No ROS, faster than real time, reproducible by seed."""

from __future__ import annotations

import heapq
import itertools
import math
import operator
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clp_ros.bags.writer import STORE, header, write_bag
from clp_ros.core.errors import ClpError
from clp_ros.core.files import atomic_folder, check_output_folder
from clp_ros.messages.images import JPEG_FORMAT, encode_jpeg
from clp_ros.robots.embodiment import JOINT_STATE_TYPE, Embodiment
from clp_ros.robots.trajectory import split_trajectory
from clp_ros.simulation.closed_loop import START_NS
from clp_ros.simulation.experts import demonstration, solved
from clp_ros.simulation.motion import Motion
from clp_ros.simulation.robot import SimulatedRobot

EPOCH_NS = 1_750_000_000 * 10**9
"""Beginning of a simulation on the clock of the bags: 2025-06-15 15:06:40 UTC."""
JOINT_DELAY_MS, CAMERA_DELAY_MS = (0.4, 1.6), (4.0, 10.0)
"""Smallest and largest delay from the stamp to the reception, in ms. Images are exposed, compressed and sent first."""

# Largest random offset of the arm's initial pose, in rad, and time at rest after the task, in seconds.
_SPREAD, _REST_S = 0.1, 0.5
# Time between the beginnings of two episodes, so that no two recordings overlap in time.
_APART_NS = 60 * 10**9
# Time of the first image, and offset of each further robot's joint states: nothing is synchronised on a real robot.
_FIRST_PICTURE_NS, _JOINT_PHASE_NS = 7_300_000, 3_100_000
# Number of initial states that are tried for an episode.
_TRIES = 10


@dataclass(frozen=True)
class RecordingSettings:
    """Settings of a recording.

    Attributes:
        camera_rate: Images per second, on each topic.
        joint_state_rate: Joint states per second, on each topic.
        size: Width and height of the images; None: those of the embodiment.
        quality: Quality of the JPEGs, 1 to 100.
    """

    camera_rate: float = 30.0
    joint_state_rate: float = 100.0
    size: tuple[int, int] | None = None
    quality: int = 80


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
    settings: RecordingSettings = RecordingSettings(),
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
        self._sources = _sources(embodiment, settings)
        self._progress, self._episodes = progress, episodes
        self._picture(next(iter(embodiment.cameras)))  # raises now if rendering fails

    def record(self, index: int, folder: Path, final: Path) -> Episode:
        """Writes an episode into an empty folder, which is renamed to ``final`` later."""
        notes = {"made_by": "clp record", "seed": str(self._seed), "episode": str(index)}
        topics = {source.topic: source.kind for source in self._sources}
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
        for number, (time_ns, source) in enumerate(_due(self._sources, seconds)):
            stamp_ns = EPOCH_NS + index * _APART_NS + time_ns
            while waiting and waiting[0][0] <= stamp_ns:
                receive_ns, _, topic, message = heapq.heappop(waiting)
                yield receive_ns, topic, message
            self.robot.step(START_NS + time_ns)
            receive_ns = stamp_ns + round(delay.uniform(*source.delay_ms) * 1e6)
            heapq.heappush(waiting, (receive_ns, number, source.topic, self._message(source, stamp_ns)))
            counts[source.topic] += 1
            if source.kind != JOINT_STATE_TYPE:
                done = index * pictures + sum(counts[camera.topic] for camera in self._embodiment.cameras.values())
                self._progress(done, self._episodes * pictures)
        for receive_ns, _, topic, message in sorted(waiting, key=operator.itemgetter(0, 1)):
            yield receive_ns, topic, message

    def _message(self, source: _Source, stamp_ns: int) -> Any:
        head = header(stamp_ns, source.frame)
        if source.kind == JOINT_STATE_TYPE:
            names, positions, speeds = self.robot.joint_states(source.name)
            return STORE.types[source.kind](head, names, np.array(positions), np.array(speeds), np.empty(0))
        picture = self._picture(source.name)
        if source.kind.endswith("CompressedImage"):
            return STORE.types[source.kind](head, JPEG_FORMAT, encode_jpeg(picture, self._settings.quality))
        height, width, channels = picture.shape
        return STORE.types[source.kind](head, height, width, "rgb8", 0, width * channels, picture.reshape(-1))

    def _picture(self, camera: str) -> np.ndarray:
        settings = self._embodiment.cameras[camera]
        width, height = self._settings.size or (settings.width, settings.height)
        return self.robot.picture(camera, height, width)

    def _begin(self, motion: Motion) -> None:
        """Gives the motion to the robot's controllers."""
        self.robot.step(START_NS)
        period_s = self._embodiment.period_ns / 1e9
        times = np.arange(1, math.ceil(motion.seconds / period_s) + 1) * period_s
        for trajectory in split_trajectory(times, motion.at(times), self._embodiment):
            self.robot.receive(trajectory, START_NS)


@dataclass(frozen=True)
class _Source:
    """A topic. ``name`` is the camera, or the entry of ``joint_states``."""

    name: str
    topic: str
    kind: str
    frame: str
    rate: float
    phase_ns: int
    delay_ms: tuple[float, float]


def _sources(embodiment: Embodiment, settings: RecordingSettings) -> list[_Source]:
    found = [
        _Source(
            name, states.topic, JOINT_STATE_TYPE, "", settings.joint_state_rate, index * _JOINT_PHASE_NS, JOINT_DELAY_MS
        )
        for index, (name, states) in enumerate(embodiment.joint_states.items())
    ]
    between_ns = round(1e9 / settings.camera_rate / len(embodiment.cameras))
    for index, (name, camera) in enumerate(embodiment.cameras.items()):
        phase_ns = _FIRST_PICTURE_NS + index * between_ns
        frame = f"{name}_color_optical_frame"
        found.append(_Source(name, camera.topic, camera.type, frame, settings.camera_rate, phase_ns, CAMERA_DELAY_MS))
    return found


def _due(sources: list[_Source], seconds: float) -> Iterator[tuple[int, _Source]]:
    """Yields time (nanoseconds from the beginning) and topic of each message, in the order of time."""

    def of(source: _Source) -> Iterator[tuple[int, _Source]]:
        for number in itertools.count():
            time_ns = source.phase_ns + round(number * 1e9 / source.rate)
            if time_ns >= seconds * 1e9:
                return
            yield time_ns, source

    return heapq.merge(*map(of, sources), key=operator.itemgetter(0))
