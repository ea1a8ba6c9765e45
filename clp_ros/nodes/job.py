# SPDX-License-Identifier: Apache-2.0
"""A node's long-running work: runs on one thread of the executor, reports on /diagnostics, ends on shutdown."""

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
    """The node shuts down. This is raised in the working thread, which then removes its half-written output."""


class Job:
    """Runs at most one piece of work at a time, and reports its steps, progress and faults on /diagnostics.

    Args:
        node: The node.
        idle: The report's message before the first work.
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
        """Whether work is in progress."""
        return self._busy.locked()

    def report(self) -> Report:
        """Returns the report for /diagnostics."""
        report = self._report
        if not self.running:
            return report
        return replace(report, values={**report.values, "running for (s)": time.monotonic() - self._started})

    @contextmanager
    def work(self, step: str) -> Iterator[None]:
        """Runs the ``with`` block as the work.

        Every exception of the block except :class:`CancelledError` becomes the report, and is raised again.

        Args:
            step: Message of the first step.

        Raises:
            ClpError: Other work is in progress.
            CancelledError: The node shuts down.
        """
        if not self._busy.acquire(blocking=False):
            raise ClpError("earlier work is still running", where=self._node.get_name(), hint="wait until it is done")
        try:
            self._started = time.monotonic()
            self.step(step)
            yield
        except CancelledError:
            raise
        except (Exception, SystemExit) as error:  # libraries also raise SystemExit
            fault = str(error) if isinstance(error, ClpError) else f"{type(error).__name__}: {error}"
            self._publish(Report(Level.ERROR, fault))
            raise
        finally:
            self._busy.release()

    def step(self, message: str, **values: object) -> None:
        """Reports the next step.

        Args:
            message: What the step does.
            **values: Values for /diagnostics.

        Raises:
            CancelledError: The node shuts down.
        """
        self.check()
        self._publish(Report(Level.OK, message, values))

    def progress(self, done: int, total: int) -> None:
        """Records the progress of the step.

        Args:
            done: Amount of work done, in any unit.
            total: Total amount of work, in the same unit.

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
        """Ends the work in progress, and waits until it has ended. No other work begins after that."""
        self._cancelled.set()
        with self._busy:
            pass

    def _publish(self, report: Report) -> None:
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
