# SPDX-License-Identifier: Apache-2.0
"""Counts and latencies of a running policy."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass

import numpy as np

from clp_ros.robots.embodiment import Embodiment

# A minute at 30 Hz. A first, slow run (a model warming up) is forgotten after as many more.
WINDOW = 2000


@dataclass(frozen=True)
class Spread:
    """How a quantity was spread over the latest values: median, 99th percentile, and largest; and how many they are."""

    p50: float
    p99: float
    maximum: float
    count: int


class Statistics:
    """Thread-safe counters, and windows over the latest values of named quantities."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._windows: dict[str, _Window] = {}

    def count(self, name: str, number: int = 1) -> None:
        """Adds to a counter."""
        with self._lock:
            self._counts[name] += number

    def record(self, name: str, value: float) -> None:
        """Adds a value to a window."""
        with self._lock:
            if name not in self._windows:
                self._windows[name] = _Window()
            self._windows[name].add(value)

    def counts(self) -> Counter[str]:
        """All counters."""
        with self._lock:
            return Counter(self._counts)

    def spreads(self) -> dict[str, Spread]:
        """All windows, in the order of their first values."""
        with self._lock:
            windows = {name: window.values() for name, window in self._windows.items()}
        return {name: _spread(values) for name, values in windows.items()}


def largest_by_unit(values: np.ndarray, embodiment: Embodiment) -> dict[str, float]:
    """The largest of joints' values, (joints,) in rad or m, by what the policy sees: rad, m or normalised."""
    largest: dict[str, float] = {}
    for value, joint in zip(values, embodiment.joints, strict=True):
        share = float(abs(value / joint.scale))  # 1 but for normalised ones
        largest[joint.unit] = max(share, largest.get(joint.unit, 0.0))
    return largest


class _Window:
    """The latest values."""

    def __init__(self) -> None:
        self._values = np.empty(WINDOW)
        self._count = 0

    def add(self, value: float) -> None:
        self._values[self._count % WINDOW] = value
        self._count += 1

    def values(self) -> np.ndarray:
        """Those it holds, in no order."""
        return self._values[: self._count].copy()


def _spread(values: np.ndarray) -> Spread:
    # As np.percentile, which takes ten times as long: a report of all windows would delay a chunk a second by 4 ms.
    ordered, last = np.sort(values), len(values) - 1
    p50, p99 = np.interp((0.50 * last, 0.99 * last), np.arange(len(values)), ordered).tolist()
    return Spread(p50, p99, float(ordered[-1]), len(values))
