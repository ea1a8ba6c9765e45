# SPDX-License-Identifier: Apache-2.0
"""Detects a policy on the CPU that waits for the processor."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# A chunk has waited for the processor if its duration is this many times its thread's processor time.
RATIO = 2.0
# Number of consecutive chunks that must have waited. A single chunk may have waited for a page of its weights.
IN_A_ROW = 3
# Durations below this are too short for the resolution of the clocks, in seconds.
_SHORTEST_S = 0.02


class ProcessorShare:
    """Notifies once when chunks take a multiple of the processor time of the thread that makes them.

    This is not meant for a policy on a GPU, because its thread waits for the GPU. Only the thread's own processor time
    counts. The time of the whole process would include torch's other threads, also while they spin.

    Args:
        notify: Called once, with a text for the user.
        wall: Returns the time of a monotonic clock, in seconds.
        cpu: Returns the processor time of the calling thread, in seconds.
    """

    def __init__(
        self,
        notify: Callable[[str], None],
        wall: Callable[[], float] = time.perf_counter,
        cpu: Callable[[], float] = time.thread_time,
    ) -> None:
        self._notify = notify
        self._wall = wall
        self._cpu = cpu
        self._starved = 0
        self._has_notified = False

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Measures the ``with`` block in which a chunk is made. A block that raises does not count."""
        wall, cpu = self._wall(), self._cpu()
        yield
        took, had = self._wall() - wall, self._cpu() - cpu
        self._starved = self._starved + 1 if took >= _SHORTEST_S and took >= RATIO * had else 0
        if self._starved == IN_A_ROW and not self._has_notified:
            self._has_notified = True
            self._notify(
                f"the policy waits for the processor: a chunk took {took:.2f} s, its thread ran for {had:.2f} s of it; "
                "other programs, or more threads than free cores, slow it down "
                "(hint: set the parameter threads to the number of free cores, see doc/how-to/threads.md)"
            )
