# SPDX-License-Identifier: Apache-2.0
"""Verifies a written LeRobotDataset: each episode's first and last picture of each camera is the right one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow.parquet as pq
from lerobot.datasets import LeRobotDatasetMetadata
from lerobot.datasets.video_utils import decode_video_frames

from clp_ros.datasets.dataset_writer import EpisodeEnds, library_output_hidden

# LeRobot's tolerance between a wanted and a found time in a video, seconds.
_TOLERANCE_S = 1e-4
# Mean difference of a decoded picture from the source, of 255, above which it is another picture: the strongest
# compression of noise stays below it, and a grey or a foreign picture does not.
_MAX_DIFFERENCE = 70.0
# By how much a picture's neighbour may look more like it, of 255, because of compression.
_SLACK = 1.0


class DatasetReader:
    """Decodes single pictures of a LeRobotDataset, as LeRobot does, without loading the dataset.

    Args:
        root: The dataset.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        with library_output_hidden():
            self.meta = LeRobotDatasetMetadata(root.name, root=root)
            self.episodes: Any = self.meta.episodes
        self._starts: dict[Path, np.ndarray] = {}

    @property
    def lengths(self) -> list[int]:
        """Number of frames of each episode."""
        return [int(length) for length in self.episodes["length"]]

    def picture(self, episode: int, index: int, camera: str) -> np.ndarray:
        """Returns a picture: (height, width, 3) uint8.

        Args:
            episode: Its episode.
            index: Its frame within the episode.
            camera: Its feature.

        Raises:
            ValueError: There is no such picture.
        """
        entry = self.episodes[episode]
        if camera in self.meta.video_keys:
            time = entry[f"videos/{camera}/from_timestamp"] + index / self.meta.fps
            with library_output_hidden():
                path = self.root / self.meta.get_video_file_path(episode, camera)
                decoded = decode_video_frames(path, [time], _TOLERANCE_S)[0]
            return (decoded.numpy() * 255).round().astype(np.uint8).transpose(1, 2, 0)
        path = self.root / self.meta.get_data_file_path(episode)
        stored = np.frombuffer(self._stored(path, camera, int(entry["dataset_from_index"]) + index), dtype=np.uint8)
        decoded = cv2.imdecode(stored, cv2.IMREAD_COLOR)
        if decoded is None:
            raise ValueError(f"frame {index} of episode {episode} has no picture of {camera}")
        return np.ascontiguousarray(decoded[..., ::-1])

    def _stored(self, path: Path, camera: str, row: int) -> bytes:
        """Returns the PNG file of a row of the dataset, from the row group that has it."""
        if path not in self._starts:
            with pq.ParquetFile(path) as file:
                sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
                first = int(file.read_row_group(0, columns=["index"]).column("index")[0].as_py())
            self._starts[path] = first + np.cumsum([0, *sizes])
        starts = self._starts[path]
        group = int(np.searchsorted(starts, row, side="right")) - 1
        with pq.ParquetFile(path) as file:
            column = file.read_row_group(group, columns=[camera]).column(camera)
        stored: bytes = column[row - int(starts[group])].as_py()["bytes"]
        return stored


def check_dataset(reader: DatasetReader, ends: Sequence[EpisodeEnds]) -> None:
    """Verifies lengths, and the first and last picture of each camera, of all episodes.

    Raises:
        RuntimeError: An episode is not what was written.
    """
    if reader.lengths != [one.frames for one in ends]:
        raise RuntimeError(f"the episodes of {reader.root} have {reader.lengths} frames, not those that were written")
    for episode, one in enumerate(ends):
        for camera in reader.meta.camera_keys:
            pairs = ((0, one.first, one.second), (one.frames - 1, one.last, one.before_last))
            for index, right, neighbour in pairs:
                where = f"episode {episode}, frame {index}, {camera}"
                found = reader.picture(episode, index, camera)
                fault = _fault(found, right[camera], neighbour[camera], exact=camera in reader.meta.image_keys)
                if fault:
                    raise RuntimeError(f"{where} of {reader.root}: {fault}")


def check_merged(reader: DatasetReader, sources: Sequence[DatasetReader]) -> None:
    """Verifies that a merged dataset has its sources' episodes in their order, by their first and last pictures.

    Raises:
        RuntimeError: An episode differs from its source.
    """
    lengths = [length for source in sources for length in source.lengths]
    if reader.lengths != lengths:
        raise RuntimeError(f"the episodes of {reader.root} have {reader.lengths} frames, not {lengths}")
    episode = 0
    for source in sources:
        for index, length in enumerate(source.lengths):
            for camera in reader.meta.camera_keys:
                for frame in (0, length - 1):
                    found, right = reader.picture(episode, frame, camera), source.picture(index, frame, camera)
                    if not np.array_equal(found, right):
                        where = f"episode {episode}, frame {frame}, {camera}"
                        raise RuntimeError(f"{where} of {reader.root} is not the picture in {source.root}")
            episode += 1


def _fault(found: np.ndarray, right: np.ndarray, neighbour: np.ndarray, exact: bool) -> str | None:
    if found.shape != right.shape:
        return f"the picture has the shape {found.shape}, not {right.shape}"
    if exact:
        return None if np.array_equal(found, right) else "the picture differs"
    difference = _difference(found, right)
    if difference > _MAX_DIFFERENCE:
        return f"the picture differs by {difference:.0f} of 255 on average"
    if difference > _difference(found, neighbour) + _SLACK:
        return "the picture is that of the frame beside"
    return None


def _difference(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one.astype(np.int16) - other).mean())
