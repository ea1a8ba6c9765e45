# SPDX-License-Identifier: Apache-2.0
"""The progress of a job, which the command line prints and a node shows on /diagnostics."""

from __future__ import annotations

from typing import Any


class Progress:
    """Receives a job's progress. The methods do nothing; a caller overrides those that it needs.

    A method may raise to cancel the job, which then removes its unfinished output.
    """

    def stage(self, title: str, unit: str = "") -> None:
        """A new stage begins.

        Args:
            title: Its name, e.g. ``calibrating``.
            unit: Unit of :meth:`advance`, e.g. ``frame``, ``B`` or ``s``; empty if :meth:`advance` is not called.
        """

    def advance(self, done: int, total: int) -> None:
        """``done`` of ``total`` units of the stage are done."""

    def note(self, text: str) -> None:
        """Receives a note for the user, one sentence."""

    def warn(self, text: str) -> None:
        """Receives a warning, one sentence."""

    def request(self, request: Any) -> None:
        """Receives the Request of a job that this job starts."""

    def result(self, result: Any) -> None:
        """Receives the Result of a job that this job has run."""


SILENT = Progress()
