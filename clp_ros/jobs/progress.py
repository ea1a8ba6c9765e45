# SPDX-License-Identifier: Apache-2.0
"""What a job reports while it works: the command line prints it, a node puts it on /diagnostics."""

from __future__ import annotations

from typing import Any


class Progress:
    """Receives what a job reports. Each method does nothing; a caller overrides those that it shows.

    A method may raise to cancel the job, which then removes what it has begun to write.
    """

    def stage(self, title: str, unit: str = "") -> None:
        """A new stage begins.

        Args:
            title: What is done in it, e.g. ``calibrating``.
            unit: What :meth:`advance` counts, e.g. ``frame``, ``B`` or ``s``; empty where it is not called.
        """

    def advance(self, done: int, total: int) -> None:
        """``done`` of ``total`` units of the stage are done."""

    def note(self, text: str) -> None:
        """A sentence that the user should know."""

    def warn(self, text: str) -> None:
        """A sentence about something that works, but perhaps not as the user meant."""

    def request(self, request: Any) -> None:
        """The Request of a job that is now run as a part of this one."""

    def result(self, result: Any) -> None:
        """The Result of a job that was run as a part of this one."""


SILENT = Progress()
