# SPDX-License-Identifier: Apache-2.0
"""Converts bags into a LeRobotDataset."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from clp_ros.core.errors import ClpError
from clp_ros.jobs.progress import SILENT, Progress
from clp_ros.jobs.request import FilePath, FilePaths, Request, Result

if TYPE_CHECKING:
    from clp_ros.robots.embodiment import Embodiment

_Pixels = Annotated[int, Field(ge=16, le=4096)]


class ConvertRequest(Request):
    """Asks for a dataset.

    Attributes:
        bags: rosbag2 recordings, or folders of them.
        embodiment: The robot: a name under config/embodiments, or a YAML file.
        output: The dataset's folder. If an earlier conversion with the same settings wrote it, or was interrupted, the
            recordings that are missing in it are added.
        task: The instruction: a name under config/tasks, a YAML file, or the sentence itself; ``topic:NAME``, a
            std_msgs/String; or ``FILE.csv`` or ``FILE.csv:COLUMN``, with a line for each bag. None: the column
            ``instruction`` of the file ``episodes.csv`` beside each bag.
        episodes_by: ``bag``: one episode each; or ``topic:NAME``, ``silence:SECONDS``, ``times:S1,S2,…`` or
            ``times:FILE.csv``.
        action: ``next_state``, or ``topics``, those that the embodiment declares; None: as the embodiment says.
        fps: Frames per second; None: the embodiment's control rate.
        images: ``video``, or ``png``.
        resize: Width and height of the pictures in the dataset, pixels; None: as recorded.
        stamps: Whether to store the original stamps, in the feature ``stamps``.
        encoder: Options of LeRobot's video encoder (``RGBEncoderConfig``).
        tf_prefix: Prefix for the name of every joint.
        topics: Other topic names, by their entry in the embodiment.
        overwrite: Whether an output folder that is not empty is replaced.
    """

    bags: FilePaths
    embodiment: str | FilePath
    output: FilePath
    task: str | None = None
    episodes_by: str = "bag"
    action: Literal["next_state", "topics"] | None = None
    fps: Annotated[int, Field(ge=1, le=1000)] | None = None
    images: Literal["video", "png"] = "video"
    resize: tuple[_Pixels, _Pixels] | None = None
    stamps: bool = False
    encoder: dict[str, Any] = Field(default_factory=dict)
    tf_prefix: str = ""
    topics: dict[str, str] = Field(default_factory=dict)
    overwrite: bool = False


class LeftOutBag(Result):
    """A recording that was left out.

    Attributes:
        bag: The recording.
        why: The reason.
    """

    bag: Path
    why: str


class ConvertedBagEpisode(Result):
    """An episode that was added.

    Attributes:
        bag: Its recording.
        task: The instruction.
        frames: Number of frames.
    """

    bag: Path
    task: str
    frames: int


class ConvertResult(Result):
    """The dataset.

    Attributes:
        output: Its folder, absolute.
        episodes: Number of episodes in it.
        frames: Number of frames in it.
        fps: Frames per second.
        seconds: Time that the conversion took.
        bytes_read: Size of the recordings in it.
        left_out: Recordings that are not in it.
        added: Episodes that this conversion added.
        notes: Sentences for the user.
    """

    output: Path
    episodes: int
    frames: int
    fps: int
    seconds: float
    bytes_read: int
    left_out: list[LeftOutBag]
    added: list[ConvertedBagEpisode]
    notes: list[str]


def run(request: ConvertRequest, progress: Progress = SILENT) -> ConvertResult:
    """Converts the bags. A bag that cannot be converted is left out.

    Raises:
        ClpError: A setting is wrong, or the output folder has other content.
    """
    from clp_ros.core.files import check_apart, check_output_folder
    from clp_ros.datasets.conversion import ConversionSettings, Converter
    from clp_ros.datasets.dataset_features import FrameFormat

    began = time.monotonic()
    bags = _bags(request.bags)
    check_apart(request.output, bags)
    check_output_folder(request.output, overwrite=True)  # a folder with content may be continued
    embodiment = _embodiment(request)
    frames = FrameFormat(embodiment, request.images == "video", request.resize, request.stamps)
    settings = ConversionSettings(frames, request.encoder, request.episodes_by)
    progress.stage("converting", "s")
    converter = Converter(request.output.absolute(), settings, request.task, progress.advance)
    conversion = converter.run(bags, request.overwrite)
    log = conversion.log
    return ConvertResult(
        output=request.output.absolute(),
        episodes=0 if log is None else len(log.episodes),
        frames=0 if log is None else log.frames,
        fps=round(embodiment.control_rate_hz),
        seconds=time.monotonic() - began,
        bytes_read=0 if log is None else log.bytes_read,
        left_out=[LeftOutBag(bag=bag, why=why) for bag, why in conversion.left_out.items()],
        added=[ConvertedBagEpisode(bag=Path(one.bag), task=one.task, frames=one.frames) for one in conversion.episodes],
        notes=conversion.notes,
    )


def _bags(paths: tuple[Path, ...]) -> list[Path]:
    """Returns the recordings: those given, and those in the folders given.

    Raises:
        ClpError: There is none.
    """
    found = []
    for path in paths:
        inside = sorted(path.glob("*/metadata.yaml")) if path.is_dir() and not (path / "metadata.yaml").exists() else []
        found += [file.parent for file in inside] or [path]
    if not found:
        raise ClpError("no recording is given", where="bags", hint="give --bag")
    return found


def _embodiment(request: ConvertRequest) -> Embodiment:
    from clp_ros.robots.embodiment import load_embodiment

    embodiment = load_embodiment(request.embodiment, request.tf_prefix, request.topics)
    if request.action is not None:
        embodiment = embodiment.with_action_source(request.action)
    if request.fps is not None:
        embodiment = embodiment.model_copy(update={"control_rate_hz": float(request.fps)})
    if not float(embodiment.control_rate_hz).is_integer():
        raise ClpError(
            f"the control rate is {embodiment.control_rate_hz:g} Hz, but a dataset's frame rate is a whole number",
            where=embodiment.name,
            hint="give --fps",
        )
    return embodiment
