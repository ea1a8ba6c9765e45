# SPDX-License-Identifier: Apache-2.0
"""What commands print: lines, tables, one JSON object, and how far long work has come."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

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


@contextmanager
def progress_bar(title: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr, where that is a terminal, fed with (done, total)."""
    from tqdm import tqdm

    from clp_ros.core import processes

    hidden = True if processes.rank() > 0 else None  # None: where it is no terminal
    with tqdm(desc=title, unit=unit, unit_scale=unit == "B", disable=hidden, leave=False) as bar:

        def advance(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield advance


@contextmanager
def status_line() -> Iterator[Callable[[str], None]]:
    """A line on stderr, where that is a terminal, that says what is being done."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda _: None
        return
    with console.status("starting") as status:
        yield status.update
