# SPDX-License-Identifier: Apache-2.0
"""Where the episodes of a recording begin and end."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

MIN_FRAMES = 2
"""Number of frames in the shortest episode."""


@dataclass(frozen=True)
class PlannedEpisode:
    """An episode of a recording.

    Attributes:
        ticks: Its control ticks, one period apart: nanoseconds, int64.
        task: The instruction.
    """

    ticks: np.ndarray
    task: str

    @property
    def start_ns(self) -> int:
        """The first tick, nanoseconds."""
        return int(self.ticks[0])

    @property
    def end_ns(self) -> int:
        """The last tick, nanoseconds."""
        return int(self.ticks[-1])


def split_at_gaps(ticks: np.ndarray, period_ns: int) -> list[np.ndarray]:
    """Splits ticks into runs of consecutive ones, because a dataset's frames are equally spaced in time."""
    if not len(ticks):
        return []
    return np.split(ticks, np.flatnonzero(np.diff(ticks) != period_ns) + 1)
