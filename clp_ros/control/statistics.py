# SPDX-License-Identifier: Apache-2.0
"""Counts and latencies of a running policy."""

from __future__ import annotations

import threading
from collections import Counter, deque
from dataclasses import dataclass

import numpy as np

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
        self._windows: dict[str, deque[float]] = {}

    def count(self, name: str, number: int = 1) -> None:
        """Adds to a counter."""
        with self._lock:
            self._counts[name] += number

    def record(self, name: str, value: float) -> None:
        """Adds a value to a window."""
        with self._lock:
            self._windows.setdefault(name, deque(maxlen=WINDOW)).append(value)

    def counts(self) -> Counter[str]:
        """All counters."""
        with self._lock:
            return Counter(self._counts)

    def spreads(self) -> dict[str, Spread]:
        """All windows, in the order of their first values."""
        with self._lock:
            windows = {name: list(values) for name, values in self._windows.items()}
        return {name: _spread(values) for name, values in windows.items()}


def _spread(values: list[float]) -> Spread:
    p50, p99 = np.percentile(values, (50, 99)).tolist()
    return Spread(p50, p99, max(values), len(values))
