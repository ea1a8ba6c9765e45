# SPDX-License-Identifier: Apache-2.0
"""Prints lines, tables, JSON and progress for the commands."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any, Self

from clp_ros.jobs.progress import Progress

if TYPE_CHECKING:
    from rich.console import Console


def print_line(text: str) -> None:
    """Prints a line."""
    # rich is not used, because it would wrap paths and interpret brackets as markup.
    print(text)  # noqa: T201


def print_warning(text: str) -> None:
    """Prints a warning on stderr."""
    print(f"warning: {text}", file=sys.stderr)  # noqa: T201


def counted(number: int, noun: str) -> str:
    """Returns number and noun, such as ``1 frame`` or ``2 frames``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def print_json(document: Any) -> None:
    """Prints one JSON object on one line."""
    print(json.dumps(document, allow_nan=False))  # noqa: T201


def print_plan(plan: Any) -> None:
    """Prints which layers would be removed, and their scores."""
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
    """Prints the notes of a plan."""
    for note in plan.notes:
        print_line(f"note: {note}")


def stdout_console() -> Console:
    """Returns the console for tables, on stdout."""
    from rich.console import Console

    return Console()


class Bars(Progress):
    """Shows each stage with a unit as a progress bar on stderr, if stderr is a terminal.

    Args:
        notes: Whether to print notes immediately.
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
        """Closes the bar of the previous stage, and opens one if the stage has a unit."""
        from tqdm import tqdm

        self._close()
        if unit:
            # With disable=None, tqdm shows no bar if stderr is not a terminal.
            self._bar = tqdm(desc=title, unit=unit, unit_scale=unit == "B", disable=None, leave=False)

    def advance(self, done: int, total: int) -> None:
        """Moves the bar."""
        if self._bar is not None:
            self._bar.total = total
            self._bar.update(done - self._bar.n)

    def note(self, text: str) -> None:
        """Prints the note."""
        if self._notes:
            print_line(f"note: {text}")

    def warn(self, text: str) -> None:
        """Prints the warning on stderr."""
        print_warning(text)


class Status(Progress):
    """Shows the current stage as a line on stderr, if stderr is a terminal."""

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
        """Shows the stage."""
        if self._status is not None:
            self._status.update(title)
