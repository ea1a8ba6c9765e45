# SPDX-License-Identifier: Apache-2.0
"""Counts and latencies of a running policy."""

from __future__ import annotations

import threading
from collections import Counter, defaultdict, deque
from dataclasses import dataclass
from functools import partial

import numpy as np

from clp_ros.robots.embodiment import Embodiment

# Number of values in a window: about a minute at 30 Hz. So the first, slow chunks of a run are forgotten after that.
WINDOW = 2000


@dataclass(frozen=True)
class Spread:
    """Statistics of a quantity's latest values.

    Attributes:
        p50: The median.
        p99: The 99th percentile.
        maximum: The largest value.
        count: The number of values.
    """

    p50: float
    p99: float
    maximum: float
    count: int


class Statistics:
    """Counters, and windows of the latest values of named quantities. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._windows: defaultdict[str, deque[float]] = defaultdict(partial(deque, maxlen=WINDOW))

    def count(self, name: str, number: int = 1) -> None:
        """Adds ``number`` to a counter."""
        with self._lock:
            self._counts[name] += number

    def record(self, name: str, value: float) -> None:
        """Adds a value to a quantity's window."""
        with self._lock:
            self._windows[name].append(value)

    def counts(self) -> Counter[str]:
        """Returns all counters by name."""
        with self._lock:
            return Counter(self._counts)

    def spreads(self) -> dict[str, Spread]:
        """Returns the statistics of all windows by name, in the order of their first values."""
        with self._lock:
            windows = {name: list(window) for name, window in self._windows.items()}
        return {name: _spread(values) for name, values in windows.items()}


def largest_by_unit(values: np.ndarray, embodiment: Embodiment) -> dict[str, float]:
    """Returns the largest absolute value of the joints of each unit.

    Args:
        values: (joints,), rad or m.
        embodiment: The robot.

    Returns:
        The largest value by the policy's unit: ``rad``, ``m`` or ``normalised``, in that unit.
    """
    largest: dict[str, float] = {}
    for value, joint in zip(values, embodiment.joints, strict=True):
        share = float(abs(value / joint.scale))  # 1 but for normalised ones
        largest[joint.unit] = max(share, largest.get(joint.unit, 0.0))
    return largest


def _spread(values: list[float]) -> Spread:
    p50, p99, maximum = np.quantile(values, (0.50, 0.99, 1.0)).tolist()
    return Spread(p50, p99, maximum, len(values))
