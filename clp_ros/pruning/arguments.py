# SPDX-License-Identifier: Apache-2.0
"""Reads budgets and removals from the command line and the node's parameters."""

from __future__ import annotations

from clp_ros.core.errors import ClpError


def parse_budgets(texts: list[str]) -> dict[str, int]:
    """Reads budgets written as ``MODULE=K``.

    Raises:
        ClpError: One is not of that form, or a module is there twice.
    """
    budgets: dict[str, int] = {}
    for text in texts:
        name, _, count = text.partition("=")
        if not name or not count.isdecimal() or name in budgets:
            raise ClpError(
                f"{text!r} is not MODULE=K, once for each module", where="budget", hint="write it as in vlm=6"
            )
        budgets[name] = int(count)
    return budgets


def parse_removals(texts: list[str]) -> dict[str, tuple[int, ...]]:
    """Reads removals written as ``MODULE=1,2,5``.

    Raises:
        ClpError: One is not of that form, or a module is there twice.
    """
    removals: dict[str, tuple[int, ...]] = {}
    for text in texts:
        name, _, layers = text.partition("=")
        numbers = layers.split(",")
        if not name or not all(number.strip().isdecimal() for number in numbers) or name in removals:
            raise ClpError(
                f"{text!r} is not MODULE=1,2,5, once for each module",
                where="remove",
                hint="write it as in vlm=1,2,5,6",
            )
        removals[name] = tuple(int(number) for number in numbers)
    return removals
