# SPDX-License-Identifier: Apache-2.0
"""Records demonstrations of a simulated robot, without ROS."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from clp_ros.jobs.progress import SILENT, Progress
from clp_ros.jobs.request import FilePath, Request, Result, Seed

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


class RecordedBag(Result):
    """One episode's recording: ``bag`` (its folder), ``tries`` (starts drawn), ``seconds``, ``messages`` by topic."""

    bag: Path
    tries: int
    seconds: float
    messages: dict[str, int]


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
    """

    output: Path
    embodiment: str
    seed: int
    solved: int
    tries: int
    bytes: int
    episodes: list[RecordedBag]


def run(request: RecordRequest, progress: Progress = SILENT) -> RecordResult:
    """Records the episodes.

    Raises:
        ClpError: The robot cannot be simulated, the output folder is not empty, or an episode is not solved.
    """
    from clp_ros.robots.embodiment import load_embodiment
    from clp_ros.simulation.recording import RecordingSettings, record

    embodiment = load_embodiment(request.embodiment)
    output = request.output or Path(f"recorded_{embodiment.name}")
    settings = RecordingSettings(request.camera_rate, request.joint_state_rate, request.size, request.quality)
    progress.stage("recording", "picture")
    episodes = record(embodiment, output, request.episodes, request.seed, settings, request.overwrite, progress.advance)
    bags: list[dict[str, Any]] = [
        {"bag": one.bag.absolute(), "tries": one.tries, "seconds": one.seconds, "messages": one.messages}
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
    )
