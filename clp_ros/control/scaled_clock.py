# SPDX-License-Identifier: Apache-2.0
"""Trajectory time: a controller that scales its speed passes through a trajectory as much more slowly."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import deque

# Below this the robot stands still: it is paused, or in a protective stop.
PAUSED_BELOW = 0.01
# Smaller changes of the scaling are noise of its measurement.
_CHANGE = 1e-3
# Changes that are remembered: at 500 a second, those of the last eight seconds.
_MOST = 4096


class ScaledClock:
    """Maps the robot's clock to trajectory time, the integral of the speed scaling. Thread-safe.

    Until a scaling is set both are the same.

    Attributes:
        scaling: The speed scaling at present; 1: full speed.
    """

    def __init__(self) -> None:
        self.scaling = 1.0
        self._lock = threading.Lock()
        # From each time on the robot's clock: the trajectory time then, and the scaling since.
        self._changes: deque[tuple[int, int, float]] = deque([(0, 0, 1.0)], maxlen=_MOST)

    @property
    def is_paused(self) -> bool:
        """Whether the robot stands still."""
        return self.scaling < PAUSED_BELOW

    def at(self, time_ns: int) -> int:
        """Trajectory time at a time of the robot's clock, nanoseconds; the future goes on at the present scaling."""
        with self._lock:
            return self._at(time_ns)

    def set(self, scaling: float, time_ns: int) -> None:
        """The scaling from a time on."""
        with self._lock:
            changed_ns, _, last = self._changes[-1]
            if abs(scaling - last) < _CHANGE and (scaling < PAUSED_BELOW) == (last < PAUSED_BELOW):
                self.scaling = last
                return
            self.scaling = scaling
            if time_ns >= changed_ns:  # else the clock has jumped back, and whoever notices calls shift() or restart()
                self._changes.append((time_ns, self._at(time_ns), scaling))

    def restart(self, time_ns: int) -> None:
        """Trajectory time is the robot's clock now; it goes on at the present scaling."""
        with self._lock:
            first = (0, 0, 1.0) if self.scaling == 1.0 else (time_ns, time_ns, self.scaling)
            self._changes = deque([first], maxlen=_MOST)

    def shift(self, offset_ns: int, now_ns: int) -> None:
        """The robot's clock has jumped by so much, and all trajectory times are moved by as much.

        Args:
            offset_ns: By how much.
            now_ns: The time after it. Changes since the jump, which came before it was noticed, count from now on.
        """
        with self._lock:
            changes = [(real + offset_ns, scaled + offset_ns, scaling) for real, scaled, scaling in self._changes]
            while len(changes) > 1 and changes[-1][0] > now_ns:
                changes.pop()
            self._changes = deque(changes, maxlen=_MOST)
            if changes[-1][2] != self.scaling:
                self._changes.append((now_ns, self._at(now_ns), self.scaling))

    def _at(self, time_ns: int) -> int:
        index = max(0, bisect_right(self._changes, time_ns, key=lambda change: change[0]) - 1)
        real_ns, scaled_ns, scaling = self._changes[index]
        return scaled_ns + (time_ns - real_ns if scaling == 1.0 else round(scaling * (time_ns - real_ns)))
