# SPDX-License-Identifier: Apache-2.0
"""A picture of episodes: the beginning and the end of successes and failures, with their names."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from clp_ros.core.errors import ClpError

# Largest number of successes, and of failures, that are shown of each checkpoint and task.
_SHOWN = 4
_COLUMNS = 4
# Height of the pictures, of their frame and of a line of text, in pixels.
_HEIGHT, _MARGIN, _TEXT = 120, 4, 30
_GREEN, _RED = (40, 160, 60), (200, 50, 50)


class _Episode(Protocol):
    @property
    def task(self) -> str: ...
    @property
    def seed(self) -> int: ...
    @property
    def success(self) -> bool: ...
    @property
    def seconds(self) -> float: ...


def write_contact_sheet(file: Path, episodes: Sequence[tuple[str, _Episode, Path]]) -> bool:
    """Writes a PNG with the first successes and failures of each checkpoint and task.

    Args:
        file: The PNG.
        episodes: The checkpoint's name, the episode, and the file of its pictures, side by side. An episode without a
            file is left out.

    Returns:
        Whether there was anything to show. If not, no file is written.
    """
    import cv2

    groups: dict[tuple[str, str], list[tuple[_Episode, Path]]] = defaultdict(list)
    for checkpoint, episode, pictures in episodes:
        if pictures.is_file():
            groups[checkpoint, episode.task].append((episode, pictures))
    rows: list[np.ndarray] = []
    for (checkpoint, task), found in groups.items():
        shown = [
            one for success in (True, False) for one in [pair for pair in found if pair[0].success is success][:_SHOWN]
        ]
        successes = sum(one.success for one, _ in found)
        tiles = [_tile(episode, _read(pictures)) for episode, pictures in shown]
        wide, high = (max(tile.shape[axis] for tile in tiles) for axis in (1, 0))
        title = f"{Path(checkpoint).name}: {task}, {successes} of {len(found)}"
        rows.append(_text(title, wide * _COLUMNS, 0.55, (0, 0, 0)))
        for first in range(0, len(tiles), _COLUMNS):
            row = np.full((high, wide * _COLUMNS, 3), 255, dtype=np.uint8)
            for index, tile in enumerate(tiles[first : first + _COLUMNS]):
                row[: tile.shape[0], index * wide : index * wide + tile.shape[1]] = tile
            rows.append(row)
    if not rows:
        return False
    widest = max(row.shape[1] for row in rows)
    padded = [np.pad(row, ((0, 0), (0, widest - row.shape[1]), (0, 0)), constant_values=255) for row in rows]
    temporary = file.with_name(f".{file.stem}.partial.png")
    cv2.imwrite(str(temporary), np.concatenate(padded)[..., ::-1])
    temporary.replace(file)
    return True


def _read(file: Path) -> np.ndarray:
    import cv2

    pictures = cv2.imread(str(file))
    if pictures is None:
        raise ClpError(
            "the pictures cannot be read", where=file, hint="remove the file and its block, and run it again"
        )
    return pictures[..., ::-1]


def _tile(episode: _Episode, pictures: np.ndarray) -> np.ndarray:
    """Returns an episode's pictures in a frame of its outcome's colour, with a line of text."""
    import cv2

    share = _HEIGHT / pictures.shape[0]
    pictures = cv2.resize(pictures, (round(pictures.shape[1] * share), _HEIGHT), interpolation=cv2.INTER_AREA)
    colour = _GREEN if episode.success else _RED
    word = "solved" if episode.success else "not solved"
    frame = np.empty((pictures.shape[0] + 2 * _MARGIN, pictures.shape[1] + 2 * _MARGIN, 3), dtype=np.uint8)
    frame[:] = colour
    frame[_MARGIN:-_MARGIN, _MARGIN:-_MARGIN] = pictures
    text = _text(f"seed {episode.seed}: {word}, {episode.seconds:.1f} s", frame.shape[1], 0.45, colour)
    return np.pad(np.concatenate([text, frame]), ((0, 6), (0, 6), (0, 0)), constant_values=255)


def _text(text: str, width: int, scale: float, colour: tuple[int, int, int]) -> np.ndarray:
    import cv2

    line = np.full((_TEXT, width, 3), 255, dtype=np.uint8)
    cv2.putText(line, text, (4, _TEXT - 9), cv2.FONT_HERSHEY_SIMPLEX, scale, colour, 1, cv2.LINE_AA)
    return line
