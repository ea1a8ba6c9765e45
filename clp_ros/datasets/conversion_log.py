# SPDX-License-Identifier: Apache-2.0
"""The file in a converted dataset that says from which recordings, and how, its episodes were made."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clp_ros import __version__
from clp_ros.core.errors import ClpError
from clp_ros.datasets.exact_statistics import PixelCounts

LOG_FILE = Path("meta", "clp_convert.json")
"""Its place in the dataset."""

_SCHEMA = 1


@dataclass(frozen=True)
class ConvertedEpisode:
    """Where an episode comes from.

    Attributes:
        bag: The recording's folder or file, as text.
        fingerprint: See :meth:`BagReader.fingerprint`.
        start_ns, end_ns: First and last control tick, nanoseconds.
        frames: Number of frames.
        task: The instruction.
    """

    bag: str
    fingerprint: str
    start_ns: int
    end_ns: int
    frames: int
    task: str

    @property
    def key(self) -> tuple[str, int]:
        """Identifies the episode, wherever its recording is."""
        return self.fingerprint, self.start_ns


@dataclass
class ConversionLog:
    """How a dataset was made.

    Attributes:
        settings: All that decides what is stored of a recording.
        episodes: In the dataset's order.
        complete: Fingerprints of the recordings of which all episodes are in the dataset.
        pixels: Counted pixels, by camera feature.
        bytes_read: Size of the recordings.
    """

    settings: dict[str, Any]
    episodes: list[ConvertedEpisode] = field(default_factory=list)
    complete: list[str] = field(default_factory=list)
    pixels: dict[str, PixelCounts] = field(default_factory=dict)
    bytes_read: int = 0

    @property
    def frames(self) -> int:
        """Number of frames of all episodes."""
        return sum(episode.frames for episode in self.episodes)

    def write(self, root: Path) -> None:
        """Writes the file into a dataset."""
        document = {
            "schema_version": _SCHEMA,
            "clp_ros_version": __version__,
            "settings": self.settings,
            "bytes_read": self.bytes_read,
            "complete": self.complete,
            "episodes": [vars(episode) for episode in self.episodes],
            "pixels": {
                name: {"frames": counts.frames, "counts": counts.counts.tolist()}
                for name, counts in self.pixels.items()
            },
        }
        (root / LOG_FILE).write_text(json.dumps(document) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, root: Path) -> ConversionLog:
        """Reads a dataset's file.

        Raises:
            ClpError: The file is missing, damaged, or of another version.
        """
        path = root / LOG_FILE
        hint = "give another --output, or add --overwrite"
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            if document["schema_version"] != _SCHEMA:
                raise ClpError(f"its version is {document['schema_version']}, not {_SCHEMA}", where=path, hint=hint)
            return cls(
                document["settings"],
                [ConvertedEpisode(**episode) for episode in document["episodes"]],
                document["complete"],
                {name: PixelCounts(**counts) for name, counts in document["pixels"].items()},
                document["bytes_read"],
            )
        except OSError as error:
            raise ClpError("the folder was not written by clp convert", where=root, hint=hint) from error
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, ClpError):
                raise
            raise ClpError("the file is damaged", where=path, hint=hint) from error

    @classmethod
    def merged(cls, logs: Iterable[ConversionLog]) -> ConversionLog:
        """Returns the log of a dataset with all episodes of several, in their order. Their settings are the same."""
        first, *others = logs
        merged = cls(first.settings, [*first.episodes], [*first.complete], dict(first.pixels), first.bytes_read)
        for log in others:
            merged.episodes += log.episodes
            merged.complete += log.complete
            merged.bytes_read += log.bytes_read
            merged.pixels = {name: merged.pixels[name] + counts for name, counts in log.pixels.items()}
        return merged
