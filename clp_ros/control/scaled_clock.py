# SPDX-License-Identifier: Apache-2.0
"""Trajectory time, which passes more slowly while a robot scales down its speed."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import deque

# Below this scaling the robot stands still: it is paused, or in a protective stop.
PAUSED_BELOW = 0.01
# Smaller changes of the scaling are measurement noise.
_CHANGE = 1e-3
# Number of changes that are kept: those of the last eight seconds at 500 per second.
_MOST = 4096


class ScaledClock:
    """Maps the robot's clock to trajectory time, which is the integral of the speed scaling. Thread-safe.

    Both times are equal until a scaling is set. All times are in nanoseconds.

    Attributes:
        scaling: The present speed scaling; 1: full speed.
    """

    def __init__(self) -> None:
        self.scaling = 1.0
        self._lock = threading.Lock()
        # For each change: its time on the robot's clock, the trajectory time then, and the new scaling.
        self._changes: deque[tuple[int, int, float]] = deque([(0, 0, 1.0)], maxlen=_MOST)

    @property
    def is_paused(self) -> bool:
        """Whether the robot stands still."""
        return self.scaling < PAUSED_BELOW

    def at(self, time_ns: int) -> int:
        """Returns the trajectory time at a time of the robot's clock. The present scaling is assumed for the future."""
        with self._lock:
            return self._at(time_ns)

    def set(self, scaling: float, time_ns: int) -> None:
        """Sets the scaling from a time of the robot's clock on."""
        with self._lock:
            changed_ns, _, last = self._changes[-1]
            if abs(scaling - last) < _CHANGE and (scaling < PAUSED_BELOW) == (last < PAUSED_BELOW):
                self.scaling = last
                return
            self.scaling = scaling
            if time_ns >= changed_ns:  # else the clock has jumped back, and shift() or restart() follows
                self._changes.append((time_ns, self._at(time_ns), scaling))

    def restart(self, time_ns: int) -> None:
        """Sets the trajectory time to the robot's clock now, and keeps the scaling."""
        with self._lock:
            first = (0, 0, 1.0) if self.scaling == 1.0 else (time_ns, time_ns, self.scaling)
            self._changes = deque([first], maxlen=_MOST)

    def shift(self, offset_ns: int, now_ns: int) -> None:
        """Moves all times, after a jump of the robot's clock.

        Args:
            offset_ns: Size of the jump.
            now_ns: The time after the jump. Changes that were received between the jump and this call take effect now.
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
