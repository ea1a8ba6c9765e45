# SPDX-License-Identifier: Apache-2.0
"""Records demonstrations of a simulated robot, without ROS."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from clp_ros.core.errors import ClpError
from clp_ros.jobs.progress import SILENT, Progress
from clp_ros.jobs.request import FilePath, Request, Result, Seed

if TYPE_CHECKING:
    from clp_ros.robots.embodiment import Embodiment
    from clp_ros.simulation.recorded_topics import RecordingSettings
    from clp_ros.simulation.recording import Episode
    from clp_ros.simulation.task_recording import TaskEpisode

_Rate = Annotated[float, Field(ge=1, le=1000)]
_Pixels = Annotated[int, Field(ge=16, le=4096)]


class RecordRequest(Request):
    """Asks for recordings.

    Attributes:
        embodiment: A robot that can be simulated: a name or a YAML file.
        output: Folder to write; None: ``recorded_`` and the robot's name.
        episodes: Number of episodes, one bag each in the output folder; None: one episode, whose bag is the output
            folder.
        seed: Seed of starts and delays.
        camera_rate, joint_state_rate: Messages a second, Hz.
        size: Width and height of the images, pixels; None: the embodiment's.
        quality: JPEG quality, 1 to 100.
        overwrite: Whether an output folder that is not empty is replaced.
        task: Name of a simulated task; None: the robot's own demonstration.
        speed: Factor on the expert's speed, with ``task``; None: 1.
        perturb: Largest distance by which the tool is pushed off its way, with ``task``, metres; None: no pushes.
    """

    embodiment: str | FilePath
    output: FilePath | None = None
    episodes: Annotated[int, Field(ge=1)] | None = None
    seed: Seed = 0
    camera_rate: _Rate = 30.0
    joint_state_rate: _Rate = 100.0
    size: tuple[_Pixels, _Pixels] | None = None
    quality: Annotated[int, Field(ge=1, le=100)] = 80
    overwrite: bool = False
    task: str | None = None
    speed: Annotated[float, Field(ge=0.2, le=3)] | None = None
    perturb: Annotated[float, Field(ge=0, le=0.1)] | None = None


class RecordedBag(Result):
    """One episode's recording.

    Attributes:
        bag: Its folder.
        tries: Number of starts drawn.
        seconds: Duration on the robot's clock, seconds.
        messages: Number of messages by topic.
        instruction: The instruction; None without a simulated task.
    """

    bag: Path
    tries: int
    seconds: float
    messages: dict[str, int]
    instruction: str | None = None


class RecordResult(Result):
    """The recordings.

    Attributes:
        output: The folder, absolute.
        embodiment: The robot's name.
        seed: The seed.
        solved: Number of recorded episodes; all are solved.
        tries: Number of starts drawn. Unsolved ones are not recorded.
        bytes: Size of all bags.
        episodes: Each episode's recording.
        task: Name of the simulated task, if one was given.
    """

    output: Path
    embodiment: str
    seed: int
    solved: int
    tries: int
    bytes: int
    episodes: list[RecordedBag]
    task: str | None = None


def run(request: RecordRequest, progress: Progress = SILENT) -> RecordResult:
    """Records the episodes.

    Raises:
        ClpError: The robot cannot be simulated or cannot do the task, the output folder is not empty, or an episode is
            not solved.
    """
    from clp_ros.robots.embodiment import load_embodiment
    from clp_ros.simulation.recorded_topics import RecordingSettings
    from clp_ros.simulation.recording import record

    if request.task is None and not (request.speed is None and request.perturb is None):
        raise ClpError("speed and perturb are for simulated tasks", where="record", hint="give --task too")
    embodiment = load_embodiment(request.embodiment)
    settings = RecordingSettings(request.camera_rate, request.joint_state_rate, request.size, request.quality)
    episodes: Sequence[Episode | TaskEpisode]
    if request.task is None:
        output = request.output or Path(f"recorded_{embodiment.name}")
        progress.stage("recording", "picture")
        episodes = record(
            embodiment, output, request.episodes, request.seed, settings, request.overwrite, progress.advance
        )
    else:
        output = request.output or Path(f"recorded_{embodiment.name}_{request.task}")
        episodes = _record_task(request, request.task, embodiment, output, settings, progress)
    bags: list[dict[str, Any]] = [
        {
            "bag": one.bag.absolute(),
            "tries": one.tries,
            "seconds": one.seconds,
            "messages": one.messages,
            "instruction": getattr(one, "instruction", None),
        }
        for one in episodes
    ]
    return RecordResult(
        output=output.absolute(),
        embodiment=embodiment.name,
        seed=request.seed,
        solved=len(episodes),
        tries=sum(one.tries for one in episodes),
        bytes=sum(file.stat().st_size for one in episodes for file in one.bag.iterdir()),
        episodes=[RecordedBag(**bag) for bag in bags],
        task=request.task,
    )


def _record_task(
    request: RecordRequest,
    name: str,
    embodiment: Embodiment,
    output: Path,
    settings: RecordingSettings,
    progress: Progress,
) -> list[TaskEpisode]:
    from clp_ros.simulation.perturbation import Perturbation
    from clp_ros.simulation.task_recording import Demonstrations, record_task
    from clp_ros.simulation.task_registry import simulated_task

    task = simulated_task(name, embodiment)
    how = Demonstrations(request.speed or 1.0, Perturbation(request.perturb or 0.0))
    progress.stage("recording", "episode")
    return record_task(
        embodiment,
        task,
        output,
        request.episodes or 1,
        request.seed,
        settings,
        how,
        request.overwrite,
        progress.advance,
    )
