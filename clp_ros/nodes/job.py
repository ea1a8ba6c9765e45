# SPDX-License-Identifier: Apache-2.0
"""A node's long piece of work: done on one thread of the executor, told of on /diagnostics, ended by a shutdown."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from rclpy.node import Node

from clp_ros.core.errors import ClpError
from clp_ros.jobs.progress import Progress
from clp_ros.nodes.diagnostics import Diagnostics, Level, Report


class CancelledError(Exception):
    """The node shuts down. Raised in the thread that works, so that what it has begun to write is removed."""


class Job:
    """At most one piece of work at a time. Its steps, progress and faults are the node's diagnostics.

    Args:
        node: The node.
        idle: What it says of itself before the first.
    """

    def __init__(self, node: Node, idle: str) -> None:
        self._node = node
        self._report = Report(Level.OK, idle)  # replaced whole: other threads read it without a lock
        self._started = time.monotonic()
        self._busy = threading.Lock()
        self._cancelled = threading.Event()
        self._diagnostics = Diagnostics(node, self.report)

    @property
    def running(self) -> bool:
        """Whether there is work going on."""
        return self._busy.locked()

    def report(self) -> Report:
        """How it stands, for /diagnostics."""
        report = self._report
        if not self.running:
            return report
        return replace(report, values={**report.values, "running for (s)": time.monotonic() - self._started})

    @contextmanager
    def work(self, step: str) -> Iterator[None]:
        """The block of the work.

        A ClpError, or any other exception of it but :class:`CancelledError`, becomes the report; it is raised again.

        Args:
            step: What is done first.

        Raises:
            ClpError: There is work going on already.
            CancelledError: The node shuts down.
        """
        if not self._busy.acquire(blocking=False):
            raise ClpError("already running", fix="wait until it is done")
        try:
            self._started = time.monotonic()
            self.step(step)
            yield
        except CancelledError:
            raise
        except (Exception, SystemExit) as error:  # libraries raise the latter, too
            fault = str(error) if isinstance(error, ClpError) else f"{type(error).__name__}: {error}"
            self._tell(Report(Level.ERROR, fault))
            raise
        finally:
            self._busy.release()

    def step(self, message: str, **values: object) -> None:
        """Says what is done from here on.

        Raises:
            CancelledError: The node shuts down.
        """
        self.check()
        self._tell(Report(Level.OK, message, values))

    def progress(self, done: int, total: int) -> None:
        """Says how far the step is; what it is called with has no unit.

        Raises:
            CancelledError: The node shuts down.
        """
        self.check()
        report = self._report
        self._report = replace(report, values={**report.values, "done": done, "total": total})

    @property
    def job_progress(self) -> Progress:
        """Where a job of :mod:`clp_ros.jobs` reports: stages become steps, notes and warnings the node's log."""
        return _JobProgress(self, self._node)

    def check(self) -> None:
        """Raises :class:`CancelledError` when the node shuts down."""
        # A signal ends the context first, and nothing can be published from then on.
        if self._cancelled.is_set() or not self._node.context.ok():
            raise CancelledError

    def cancel(self) -> None:
        """Ends the work, if there is any, and waits until it has ended. No other begins after that."""
        self._cancelled.set()
        with self._busy:
            pass

    def _tell(self, report: Report) -> None:
        self._report = report
        if self._node.context.ok():
            self._diagnostics.publish()


class _JobProgress(Progress):
    def __init__(self, job: Job, node: Node) -> None:
        self._job = job
        self._logger = node.get_logger()

    def stage(self, title: str, unit: str = "") -> None:
        self._job.step(title)

    def advance(self, done: int, total: int) -> None:
        self._job.progress(done, total)

    def note(self, text: str) -> None:
        self._logger.info(text)

    def warn(self, text: str) -> None:
        self._logger.warning(text)
