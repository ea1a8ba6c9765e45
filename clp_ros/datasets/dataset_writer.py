# SPDX-License-Identifier: Apache-2.0
"""Writes a LeRobotDataset with LeRobot's own writer: no frame is dropped, and the statistics are exact."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from lerobot.datasets import LeRobotDataset, compute_stats, video_utils
from lerobot.utils.utils import SuppressProgressBars

from clp_ros.core.compat.lerobot import is_in_video_encoder, is_video_queue_full, replace_video_encoder
from clp_ros.core.errors import ClpError
from clp_ros.datasets.dataset_features import FrameFormat
from clp_ros.datasets.encoder_options import encoder_arguments
from clp_ros.datasets.exact_statistics import PixelCounts
from clp_ros.policies.quiet import quiet

# Pictures that wait for a camera's encoder, or for the threads that write PNG files.
_WAITING = 32
_PNG_THREADS = 2
# Seconds between two looks at a full queue.
_PAUSE_S = 0.002


class _NoStatistics:
    """Takes the place of LeRobot's statistics in its encoder's threads, where they take half as long as encoding."""

    def update(self, batch: np.ndarray) -> None:
        """Does nothing."""

    def get_statistics(self) -> None:
        """Returns None."""


def _running_statistics(*arguments: Any, **options: Any) -> Any:
    return _NoStatistics() if is_in_video_encoder() else _RunningQuantileStats(*arguments, **options)


_RunningQuantileStats = compute_stats.RunningQuantileStats


class _WaitingEncoder(video_utils.StreamingVideoEncoder):
    """LeRobot's encoder, but a full queue is waited for. LeRobot's drops the picture after 0.1 s, and keeps the row.

    Attributes:
        pixels: Counted pixels of the episode by camera, for its statistics.
    """

    pixels: Mapping[str, PixelCounts]

    def feed_frame(self, video_key: str, image: np.ndarray) -> None:
        """Adds a picture of a camera when the encoder has room for it.

        Raises:
            RuntimeError: The encoder has failed.
        """
        while is_video_queue_full(self, video_key):
            time.sleep(_PAUSE_S)
        super().feed_frame(video_key, image)

    def finish_episode(self) -> dict[str, tuple[Path, dict[str, np.ndarray] | None]]:
        """Ends the episode, and returns each camera's file and exact statistics, from 0 to 255."""
        files = super().finish_episode()
        statistics = {camera: self.pixels[camera].statistics() for camera in files}
        return {
            camera: (path, {k: v if k == "count" else v.ravel() * 255 for k, v in statistics[camera].items()})
            for camera, (path, _) in files.items()
        }


@dataclass
class EpisodeEnds:
    """The pictures by which an episode is verified.

    Attributes:
        frames: Number of frames.
        first, second, before_last, last: Pictures by camera feature.
    """

    frames: int = 0
    first: dict[str, np.ndarray] = field(default_factory=dict)
    second: dict[str, np.ndarray] = field(default_factory=dict)
    before_last: dict[str, np.ndarray] = field(default_factory=dict)
    last: dict[str, np.ndarray] = field(default_factory=dict)

    def add(self, pictures: Mapping[str, np.ndarray]) -> None:
        """Adds the next frame's pictures."""
        if self.frames == 0:
            self.first = dict(pictures)
        elif self.frames == 1:
            self.second = dict(pictures)
        self.before_last, self.last = self.last or dict(pictures), dict(pictures)
        self.frames += 1


class DatasetWriter:
    """Writes one LeRobotDataset, episode by episode.

    Args:
        root: Folder to create.
        name: Name of the dataset.
        frames: How frames are stored.
        first: The first frame's values; they give the pictures' sizes.
        encoder: Options of LeRobot's video encoder (``RGBEncoderConfig``).

    Attributes:
        root: As the argument.
        features: By name, as in info.json.
        ends: Of each episode written.
        pixels: Counted pixels of each camera, of the episodes written.
        picture_bytes: Size of the pictures written, uncompressed.
    """

    def __init__(
        self, root: Path, name: str, frames: FrameFormat, first: Mapping[str, Any], encoder: Mapping[str, Any]
    ) -> None:
        fps = round(frames.embodiment.control_rate_hz)
        os.environ.setdefault("SVT_LOG", "1")  # errors only: otherwise SVT-AV1 prints its settings for each video
        video_utils.av.logging.set_libav_level(video_utils.av.logging.ERROR)
        compute_stats.RunningQuantileStats = _running_statistics
        self.root, self._frames = root, frames
        self.ends: list[EpisodeEnds] = []
        self.pixels = {camera: PixelCounts() for camera in frames.cameras}
        self.picture_bytes = 0
        self._ends, self._pixels = EpisodeEnds(), {camera: PixelCounts() for camera in frames.cameras}
        with library_output_hidden():
            self._dataset = LeRobotDataset.create(
                name,
                fps,
                frames.features(first),
                root=root,
                robot_type=frames.embodiment.name,
                use_videos=frames.video,
                image_writer_threads=0 if frames.video else _PNG_THREADS,
                streaming_encoding=frames.video,
                **encoder_arguments(encoder),
            )
        self.features: dict[str, Any] = self._dataset.meta.features
        self._writer: Any = self._dataset.writer
        self._encoder: Any = None
        if frames.video:
            self._encoder, settings = replace_video_encoder(
                self._writer, lambda rgb, depth, threads: _WaitingEncoder(fps, rgb, depth, _WAITING, threads)
            )
            try:
                self._try_encoder(settings, first)
            except ClpError:
                self.abandon()
                raise

    @property
    def open_frames(self) -> int:
        """Number of frames of the episode begun."""
        return self._ends.frames

    def fits(self, values: Mapping[str, Any]) -> str | None:
        """Returns how a frame's pictures differ in size from the dataset's, or None."""
        for camera in self._frames.cameras:
            height, width = self.features[camera]["shape"][:2]
            if values[camera].shape[:2] != (height, width):
                found = "x".join(map(str, values[camera].shape[1::-1]))
                return f"the pictures of {camera} are {found}, those of the dataset {width}x{height}"
        return None

    def add(self, values: Mapping[str, Any], task: str) -> None:
        """Adds a frame to the episode, when the writers of pictures have room for it."""
        images: Any = self._writer.image_writer
        while images is not None and images.queue.qsize() >= _WAITING * len(self._frames.cameras):
            time.sleep(_PAUSE_S)
        self._dataset.add_frame({**values, "task": task})
        pictures = {camera: values[camera] for camera in self._frames.cameras}
        for camera, picture in pictures.items():
            self._pixels[camera].add(picture)
            self.picture_bytes += picture.nbytes
        self._ends.add(pictures)

    def save_episode(self) -> None:
        """Ends the episode."""
        if self._encoder is not None:
            self._encoder.pixels = self._pixels
        with library_output_hidden():
            self._dataset.save_episode()
        self.ends.append(self._ends)
        for camera, counts in self._pixels.items():
            self.pixels[camera] += counts
        self._begin()

    def discard_episode(self) -> None:
        """Removes the frames added since the last episode."""
        with library_output_hidden():
            self._dataset.clear_episode_buffer()
        self._begin()

    def finish(self) -> None:
        """Completes the files."""
        with library_output_hidden():
            self._dataset.finalize()
        shutil.rmtree(self.root / "images", ignore_errors=True)  # LeRobot leaves the empty folders

    def abandon(self) -> None:
        """Stops the threads, because the dataset is given up."""
        with contextlib.suppress(Exception), library_output_hidden():
            self._writer.cancel_pending_videos()
            self._writer.stop_image_writer()
            self._dataset.finalize()

    def _try_encoder(self, config: Any, first: Mapping[str, Any]) -> None:
        """Encodes each camera's first picture, because encoders have limits that only they know.

        Raises:
            ClpError: The encoder does not take pictures of this size, or its options.
        """
        for camera in self._frames.cameras:
            height, width = first[camera].shape[:2]
            try:
                with video_utils.av.open(io.BytesIO(), "w", format="mp4") as container:
                    stream = container.add_stream(
                        config.vcodec, self._encoder.fps, options=config.get_codec_options(None, as_strings=True)
                    )
                    stream.pix_fmt, stream.width, stream.height = config.pix_fmt, width, height
                    container.mux(stream.encode(video_utils.av.VideoFrame.from_ndarray(first[camera], "rgb24")))
                    container.mux(stream.encode())
            except (video_utils.av.FFmpegError, ValueError) as error:
                raise ClpError(
                    f"the encoder {config.vcodec} does not take pictures of {width}x{height} ({error})",
                    where=camera,
                    hint="give --resize, --images png, or other --encoder options",
                ) from error

    def _begin(self) -> None:
        self._ends, self._pixels = EpisodeEnds(), {camera: PixelCounts() for camera in self.pixels}


@contextlib.contextmanager
def library_output_hidden() -> Iterator[None]:
    """Hides LeRobot's log lines, and the progress bars of the datasets library."""
    with SuppressProgressBars(), quiet():
        yield
