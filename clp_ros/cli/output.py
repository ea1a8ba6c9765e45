# SPDX-License-Identifier: Apache-2.0
"""What commands print: lines, tables, one JSON object, and how far long work has come."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any, Self

from clp_ros.jobs.progress import Progress

if TYPE_CHECKING:
    from rich.console import Console


def print_line(text: str) -> None:
    """Prints a line."""
    # Not through rich, which would break paths over lines and take brackets in them for its own.
    print(text)  # noqa: T201


def print_warning(text: str) -> None:
    """Prints a line on stderr about what works, but perhaps not as it was meant."""
    print(f"warning: {text}", file=sys.stderr)  # noqa: T201


def counted(number: int, noun: str) -> str:
    """``1 frame``, ``2 frames``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def print_json(document: Any) -> None:
    """Prints one JSON object on one line."""
    print(json.dumps(document, allow_nan=False))  # noqa: T201


def print_plan(plan: Any) -> None:
    """Prints what would be removed, and why."""
    from clp_ros.report.tables import layers_table

    console = stdout_console()
    for group in plan.groups:
        console.print(
            layers_table(
                " + ".join(group.modules),
                group.scores,
                blocks=group.blocks,
                removed=group.removed,
                threshold=group.threshold,
            )
        )
    print_notes(plan)


def print_notes(plan: Any) -> None:
    """Prints what is to be known of a plan."""
    for note in plan.notes:
        print_line(f"note: {note}")


def stdout_console() -> Console:
    """Where tables go."""
    from rich.console import Console

    return Console()


class Bars(Progress):
    """Shows each stage that counts something as a progress bar on stderr, where that is a terminal.

    Args:
        notes: Whether notes are printed, as they come.
    """

    def __init__(self, notes: bool = False) -> None:
        self._bar: Any = None
        self._notes = notes

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._bar = None

    def stage(self, title: str, unit: str = "") -> None:
        """Closes the bar of the stage before, and opens one where the stage counts something."""
        from tqdm import tqdm

        self._close()
        if unit:
            # disable=None: where stderr is no terminal.
            self._bar = tqdm(desc=title, unit=unit, unit_scale=unit == "B", disable=None, leave=False)

    def advance(self, done: int, total: int) -> None:
        """Moves the bar."""
        if self._bar is not None:
            self._bar.total = total
            self._bar.update(done - self._bar.n)

    def note(self, text: str) -> None:
        """Prints it."""
        if self._notes:
            print_line(f"note: {text}")

    def warn(self, text: str) -> None:
        """Prints it on stderr."""
        print_warning(text)


class Status(Progress):
    """Shows what is being done as a line on stderr, where that is a terminal."""

    def __init__(self) -> None:
        from rich.console import Console

        console = Console(stderr=True)
        self._status = console.status("starting") if console.is_terminal else None

    def __enter__(self) -> Self:
        if self._status is not None:
            self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._status is not None:
            self._status.stop()

    def stage(self, title: str, unit: str = "") -> None:
        """Shows it."""
        if self._status is not None:
            self._status.update(title)
