# SPDX-License-Identifier: Apache-2.0
"""Players in processes of their own, or one in this process."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType
from typing import Self

from clp_ros.core.errors import ClpError
from clp_ros.core.threads import using_threads
from clp_ros.evaluation.measurement import end_with_parent
from clp_ros.evaluation.player import Block, BlockResult, Player, PolicySetting
from clp_ros.robots.embodiment import Embodiment

_player: Player | None = None  # in a worker's process


class Workers:
    """Plays blocks in several processes.

    Args:
        number: Number of processes; 0: in this process.
    """

    def __init__(self, number: int) -> None:
        self._number = number
        self._pool: ProcessPoolExecutor | None = None
        self._own: Player | None = None

    def __enter__(self) -> Self:
        if self._number:
            # Spawned: a forked process would share this one's threads, and could not use CUDA.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self._number, context, initializer=end_with_parent)
        else:
            self._own = Player()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=error is None, cancel_futures=True)
        if self._own is not None:
            self._own.close()

    def prepare(self, setting: PolicySetting, embodiment: Embodiment, is_timed: bool) -> float | None:
        """See :meth:`Player.prepare`. No other worker runs meanwhile."""
        if self._own is not None:
            return self._own.prepare(setting, embodiment, is_timed)
        assert self._pool is not None
        return self._result(self._pool.submit(_prepare, setting, embodiment, is_timed))

    def play(self, blocks: Sequence[Block]) -> Iterator[tuple[Block, BlockResult]]:
        """Plays blocks, and yields each with its result when it is done, in any order."""
        if self._own is not None:
            for block in blocks:
                yield block, self._own.play(block)
            return
        assert self._pool is not None
        # Several workers share the machine's cores, so each computes with one thread.
        with using_threads(1 if self._number > 1 else 0):
            futures = {self._pool.submit(_play, block, self._number > 1): block for block in blocks}
            while futures:
                done, _ = wait(futures, return_when=FIRST_COMPLETED)
                for future in done:
                    yield futures.pop(future), self._result(future)

    def _result[T](self, future: Future[T]) -> T:
        try:
            return future.result()
        except BrokenProcessPool as error:
            raise ClpError(
                "a process that played episodes was killed, by a signal or for lack of memory",
                where="workers",
                hint="run it again with fewer --workers or a smaller --batch: it continues where it was",
            ) from error


def _prepare(setting: PolicySetting, embodiment: Embodiment, is_timed: bool) -> float | None:
    return _own_player().prepare(setting, embodiment, is_timed)


def _play(block: Block, is_one_of_several: bool) -> BlockResult:
    import torch

    if is_one_of_several:
        torch.set_num_threads(1)  # a process that measured a latency did so with all threads
    return _own_player().play(block)


def _own_player() -> Player:
    global _player
    if _player is None:
        _player = Player()
    return _player
