# SPDX-License-Identifier: Apache-2.0
"""Records demonstrations of simulated tasks as rosbag2 bags. No ROS, faster than real time, reproducible by seed."""

from __future__ import annotations

import csv
import heapq
import operator
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from clp_ros.bags.writer import STORE, header, write_bag
from clp_ros.core.errors import ClpError
from clp_ros.core.files import atomic_folder, check_output_folder
from clp_ros.robots.embodiment import JOINT_STATE_TYPE, Embodiment
from clp_ros.simulation.episode import ExpertPolicy, play_episode
from clp_ros.simulation.perturbation import UNPERTURBED, Perturbation
from clp_ros.simulation.recorded_topics import (
    APART_NS,
    DEFAULT_SETTINGS,
    EPOCH_NS,
    JOINT_DELAY_MS,
    RecordedTopics,
    RecordingSettings,
)
from clp_ros.simulation.task import SimulatedTask
from clp_ros.simulation.task_simulation import TaskSimulation

EMBODIMENT_FILE, EPISODES_FILE = "embodiment.yaml", "episodes.csv"
"""Files beside the bags: the robot with the recorded actions as its source of actions; and each bag's instruction."""
INSTRUCTION_TOPIC, STRING_TYPE = "/task", "std_msgs/msg/String"
"""Where the instruction is, once at the beginning of each bag."""

# Number of starts that are tried for an episode.
_TRIES = 10
# Marks the random numbers of recorded starts: no seed of an evaluation gives one of these starts.
_RECORDED = 0x5EC


@dataclass(frozen=True)
class TaskEpisode:
    """One recording of a task.

    Attributes:
        bag: The bag's folder.
        task: Name of the task.
        instruction: The instruction.
        tries: Number of starts that were tried. The last one was solved.
        seconds: Duration on the robot's clock, in seconds.
        messages: Number of messages by topic.
    """

    bag: Path
    task: str
    instruction: str
    tries: int
    seconds: float
    messages: dict[str, int]


@dataclass(frozen=True)
class Demonstrations:
    """How demonstrations of a task are made.

    Attributes:
        speed: Factor on the expert's speed.
        perturbation: Pushes off the way.
    """

    speed: float = 1.0
    perturbation: Perturbation = UNPERTURBED


DEFAULT_DEMONSTRATIONS = Demonstrations()
"""The expert's own speed, and no pushes."""


def command_topics(embodiment: Embodiment) -> dict[str, str]:
    """Returns the topic of the expert's actions, a JointState, by controller of the embodiment."""
    return {name: f"/expert/{name}/joint_states" for name in embodiment.controllers}


def with_recorded_actions(embodiment: Embodiment) -> Embodiment:
    """Returns the robot with the topics of :func:`command_topics` as its source of actions."""
    sync = {"policy": "asof", "tolerance_ms": 100, "stamp": "header"}
    topics = {
        name: {"topic": topic, "type": JOINT_STATE_TYPE, "controllers": [name], "sync": sync}
        for name, topic in command_topics(embodiment).items()
    }
    return Embodiment.model_validate(embodiment.model_dump() | {"actions": {"source": "topics", "topics": topics}})


def record_task(
    embodiment: Embodiment,
    task: SimulatedTask,
    output: Path,
    episodes: int = 1,
    seed: int = 0,
    settings: RecordingSettings = DEFAULT_SETTINGS,
    demonstrations: Demonstrations = DEFAULT_DEMONSTRATIONS,
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[TaskEpisode]:
    """Records episodes in which the scripted expert solves a task.

    The output folder gets the bags ``episode_000``, …, and the files :data:`EMBODIMENT_FILE` and :data:`EPISODES_FILE`.
    If the expert does not solve an episode, its bag is removed, and another start is drawn.

    Args:
        embodiment: A robot that clp_ros ships, and that can do the task.
        task: The task.
        output: Folder for the bags.
        episodes: Number of episodes.
        seed: Seed of all random numbers.
        settings: Rates, size and quality.
        demonstrations: Speed of the expert, and pushes. Recorded actions are the expert's, without the pushes.
        overwrite: Whether an output folder that is not empty is replaced.
        progress: Called with the number of episodes done and in total.

    Returns:
        The episodes.

    Raises:
        ClpError: The robot cannot do the task, a package is missing, rendering fails, the output folder is not empty,
            or the expert solves an episode from none of ten starts.
    """
    check_output_folder(output, overwrite)
    recorder = _TaskRecorder(embodiment, task, settings, demonstrations, seed)
    try:
        with atomic_folder(output, overwrite) as folder:
            done = []
            for index in range(episodes):
                bag = folder / f"episode_{index:03d}"
                bag.mkdir()
                done.append(recorder.record(index, bag, output / bag.name))
                progress(index + 1, episodes)
            document = with_recorded_actions(embodiment).model_dump(exclude_none=True)
            (folder / EMBODIMENT_FILE).write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
            with (folder / EPISODES_FILE).open("w", newline="", encoding="utf-8") as file:
                columns = ["bag", "task", "instruction", "tries", "seconds"]
                writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
                writer.writeheader()
                writer.writerows(asdict(one) | {"bag": one.bag.name} for one in done)
            return done
    finally:
        recorder.simulation.close()


class _TaskRecorder:
    """Records episodes of one robot and task."""

    def __init__(
        self,
        embodiment: Embodiment,
        task: SimulatedTask,
        settings: RecordingSettings,
        demonstrations: Demonstrations,
        seed: int,
    ) -> None:
        self.simulation = TaskSimulation(embodiment, task)
        self._settings, self._demonstrations, self._seed = settings, demonstrations, seed
        self._topics = RecordedTopics(self.simulation, settings)
        self._commands = command_topics(embodiment)
        self._expert = ExpertPolicy(self.simulation, demonstrations.speed, demonstrations.perturbation)
        self._topics.picture(next(iter(embodiment.cameras)))  # raises now if rendering fails

    def record(self, index: int, folder: Path, final: Path) -> TaskEpisode:
        """Writes an episode into an empty folder, which is renamed to ``final`` later."""
        simulation = self.simulation
        topics = {source.topic: source.kind for source in self._topics.sources}
        topics |= dict.fromkeys(self._commands.values(), JOINT_STATE_TYPE) | {INSTRUCTION_TOPIC: STRING_TYPE}
        notes = {
            "made_by": "clp record",
            "task": simulation.task.name,
            "seed": str(self._seed),
            "episode": str(index),
            "speed": str(self._demonstrations.speed),
            "perturb": str(self._demonstrations.perturbation.distance),
        }
        for attempt in range(_TRIES):
            counts: Counter[str] = Counter()
            write_bag(folder, final.name, topics, self._messages(index, attempt, counts), notes)
            if simulation.success_s is not None:
                instruction = simulation.instruction()
                return TaskEpisode(
                    final, simulation.task.name, instruction, attempt + 1, simulation.time_s, dict(counts)
                )
            for file in folder.iterdir():
                file.unlink()
        raise ClpError(
            f"the expert does not solve episode {index} of {simulation.task.name}: {_TRIES} starts were tried",
            where=f"--seed {self._seed}",
            hint="take another --seed, or a smaller --perturb",
        )

    def _messages(self, index: int, attempt: int, counts: Counter[str]) -> Iterator[tuple[int, str, Any]]:
        """Plays the episode, and yields receive time, topic and message in the order of a recorder."""
        simulation, start_ns = self.simulation, EPOCH_NS + index * APART_NS
        delay = np.random.default_rng([self._seed, index, attempt, _RECORDED, 1])
        waiting: list[tuple[int, int, str, Any]] = []
        due = self._topics.due()
        following = [next(due)]

        def send(time_ns: int, delay_ms: tuple[float, float], topic: str, message: Any) -> None:
            receive_ns = start_ns + time_ns + round(delay.uniform(*delay_ms) * 1e6)
            heapq.heappush(waiting, (receive_ns, sum(counts.values()), topic, message))
            counts[topic] += 1

        def watch(time_ns: int) -> None:
            """Sends what is due before the next step of the model."""
            while following[0][0] < time_ns + simulation.step_ns:
                due_ns, source = following[0]
                message = self._topics.message(source, start_ns + due_ns)
                send(due_ns, source.delay_ms, source.topic, message)
                following[0] = next(due)

        seed = [self._seed, index, attempt, _RECORDED]
        said = False
        for _, action in play_episode(simulation, self._expert, seed, watch):
            now_ns = round(simulation.time_s * 1e9)
            if not said:
                send(0, JOINT_DELAY_MS, INSTRUCTION_TOPIC, STORE.types[STRING_TYPE](simulation.instruction()))
                said = True
            first = 0
            for name, controller in simulation.embodiment.controllers.items():
                names = [joint.name for joint in controller.joints]
                positions = action[first : first + len(names)]
                first += len(names)
                message = STORE.types[JOINT_STATE_TYPE](
                    header(start_ns + now_ns), names, positions, np.empty(0), np.empty(0)
                )
                send(now_ns, JOINT_DELAY_MS, self._commands[name], message)
            # All that is sent later is received later than this.
            while waiting and waiting[0][0] <= start_ns + now_ns:
                receive_ns, _, topic, message = heapq.heappop(waiting)
                yield receive_ns, topic, message
        for receive_ns, _, topic, message in sorted(waiting, key=operator.itemgetter(0, 1)):
            yield receive_ns, topic, message
