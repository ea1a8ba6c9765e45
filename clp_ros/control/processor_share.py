# SPDX-License-Identifier: Apache-2.0
"""Whether a policy that runs on the CPU gets the processor."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# A chunk that takes so many times its thread's processor time has waited for most of it.
RATIO = 2.0
# So many in a row: one may have waited for a page of its weights.
IN_A_ROW = 3
# Seconds below which the clocks say little.
_SHORTEST_S = 0.02


class ProcessorShare:
    """Tells once when chunks take a multiple of the processor time of the thread that makes them.

    Not for a policy on a GPU, whose thread waits for the GPU and not for the processor. The processor time is the
    thread's own: that of the whole process grows with each of torch's threads, and while they spin.

    Args:
        tell: Called once, with a sentence.
        wall: Seconds, on any clock that never goes back.
        cpu: Processor seconds of the calling thread.
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
        self._notified = False

    @contextmanager
    def measured(self) -> Iterator[None]:
        """For the block in which a chunk is made; a block that raises does not count."""
        wall, cpu = self._wall(), self._cpu()
        yield
        took, had = self._wall() - wall, self._cpu() - cpu
        self._starved = self._starved + 1 if took >= _SHORTEST_S and took >= RATIO * had else 0
        if self._starved == IN_A_ROW and not self._notified:
            self._notified = True
            self._notify(
                f"the policy waits for the processor: a chunk took {took:.2f} s, its thread ran for {had:.2f} s of it; "
                "other programs, or more threads than free cores, slow it down "
                "(hint: set the parameter threads to the number of free cores, see doc/how-to/threads.md)"
            )
