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
        embodiment: The robot: a name under config/embodiments, or a YAML file. Not needed with ``merge``.
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
        shard: (i, n): convert the i-th of n shares of the bags, from 0, into the folder ``OUTPUT.shard-i-of-n``.
        merge: Datasets to merge into the output, instead of converting bags; empty: the shards beside the output.
        overwrite: Whether an output folder that is not empty is replaced.
    """

    bags: FilePaths = ()
    embodiment: str | FilePath | None = None
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
    shard: tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=1)]] | None = None
    merge: FilePaths | None = None
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
    from clp_ros.core.files import check_output_folder

    began = time.monotonic()
    output = request.output.absolute()
    check_output_folder(output, overwrite=True)  # a folder with content may be continued
    if request.merge is not None:
        return _merge(request, output, began, progress)
    from clp_ros.core.files import check_apart
    from clp_ros.datasets.conversion import ConversionSettings, Converter
    from clp_ros.datasets.dataset_features import FrameFormat
    from clp_ros.datasets.dataset_folder import shard_folder

    bags = _bags(request.bags)
    check_apart(output, bags)
    if request.shard is not None:
        output, bags = shard_folder(output, *request.shard), _share(bags, *request.shard)
    embodiment = _embodiment(request)
    frames = FrameFormat(embodiment, request.images == "video", request.resize, request.stamps)
    settings = ConversionSettings(frames, request.encoder, request.episodes_by)
    converter = Converter(output, settings, request.task, progress.advance)
    progress.stage("converting", "s")
    conversion = converter.run(bags, request.overwrite)
    log = conversion.log
    return ConvertResult(
        output=output,
        episodes=0 if log is None else len(log.episodes),
        frames=0 if log is None else log.frames,
        fps=round(embodiment.control_rate_hz),
        seconds=time.monotonic() - began,
        bytes_read=0 if log is None else log.bytes_read,
        left_out=[LeftOutBag(bag=bag, why=why) for bag, why in conversion.left_out.items()],
        added=[ConvertedBagEpisode(bag=Path(one.bag), task=one.task, frames=one.frames) for one in conversion.episodes],
        notes=conversion.notes,
    )


def _merge(request: ConvertRequest, output: Path, began: float, progress: Progress) -> ConvertResult:
    from clp_ros.core.files import check_apart, check_output_folder
    from clp_ros.datasets.dataset_folder import find_shards, merge_datasets

    check_output_folder(output, request.overwrite)
    if request.bags or request.shard is not None:
        raise ClpError("merging converts no bags", where="merge", hint="leave out the bags and the shard")
    sources = [source.absolute() for source in request.merge or find_shards(output)]
    check_apart(output, sources)
    progress.stage("merging")
    log = merge_datasets(sources, output, request.overwrite)
    return ConvertResult(
        output=output,
        episodes=len(log.episodes),
        frames=log.frames,
        fps=round(log.settings["embodiment"]["control_rate_hz"]),
        seconds=time.monotonic() - began,
        bytes_read=log.bytes_read,
        left_out=[],
        added=[ConvertedBagEpisode(bag=Path(one.bag), task=one.task, frames=one.frames) for one in log.episodes],
        notes=[],
    )


def _share(bags: list[Path], index: int, count: int) -> list[Path]:
    """Returns one of several shares of the bags. Shares are consecutive, so that merging keeps the order.

    Raises:
        ClpError: There is no such share.
    """
    if index >= count:
        raise ClpError(f"there is no shard {index} of {count}", where="shard", hint=f"shards are 0 to {count - 1}")
    if count > len(bags):
        raise ClpError(f"{len(bags)} bags cannot make {count} shards", where="shard", hint="take fewer")
    return bags[index * len(bags) // count : (index + 1) * len(bags) // count]


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

    if request.embodiment is None:
        raise ClpError("embodiment is missing", hint="give the robot's name or YAML file")
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
