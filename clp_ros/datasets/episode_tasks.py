# SPDX-License-Identifier: Apache-2.0
"""The task of each episode: given, or from a column of a file."""

from __future__ import annotations

import csv
from functools import lru_cache
from pathlib import Path

from clp_ros.core.errors import ClpError
from clp_ros.core.settings import did_you_mean

EPISODES_FILE, COLUMN = "episodes.csv", "instruction"
"""Beside the bags, as ``clp record --task`` writes it; and the column with the instruction."""


def task_of_bag(bag: Path, file: Path | None = None, column: str = COLUMN) -> str:
    """Returns a bag's instruction from a CSV file with the columns ``bag`` and ``column``.

    Args:
        bag: The bag.
        file: The file; None: ``episodes.csv`` in the folder that the bag is in.
        column: The column with the instruction.

    Raises:
        ClpError: The file is missing, or has no such column, or no instruction for the bag.
    """
    path = bag.absolute().parent / EPISODES_FILE if file is None else file
    if not path.is_file():
        hint = "give --task, or write episodes.csv with the columns bag and instruction beside the bags"
        raise ClpError("the bag has no task", where=bag, hint=hint)
    tasks = _column(path, column)
    name = bag.absolute().name
    if not tasks.get(name, "").strip():
        raise ClpError(f"it has no {column} for the bag {name}", where=path, hint=did_you_mean(name, list(tasks)))
    return tasks[name].strip()


@lru_cache(maxsize=64)
def _column(path: Path, column: str) -> dict[str, str]:
    """Returns a column of a CSV file by bag. The file is read once."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            names = list(reader.fieldnames or [])
            for needed in ("bag", column):
                if needed not in names:
                    hint = did_you_mean(needed, names) if names else "write a header line"
                    raise ClpError(f"it has no column {needed!r}", where=path, hint=hint)
            return {row["bag"].rstrip("/").rpartition("/")[2]: row[column] or "" for row in reader if row["bag"]}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ClpError(f"the file cannot be read ({error})", where=path, hint="write CSV in UTF-8") from error
