# SPDX-License-Identifier: Apache-2.0
"""The table of success rates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table


def success_table(result: Mapping[str, Any]) -> Table:
    """Returns a table with a row for each checkpoint and task.

    Args:
        result: The JSON of an ``EvaluateResult``.
    """
    from rich.table import Table

    steps = "" if result["replan_steps"] is None else f", {result['replan_steps']} steps of each chunk"
    title = f"{result['embodiment']}, mode {result['mode']}{steps}"
    table = Table(title=title)
    table.add_column("checkpoint", overflow="fold")
    table.add_column("task", overflow="fold")
    for name in ("solved", "success", "95 %", "time", "latency"):
        table.add_column(name, justify="right", no_wrap=True)
    names = short_names([row["path"] for row in result["checkpoints"]])
    for name, row in zip(names, result["checkpoints"], strict=True):
        latency = "-" if row["latency_ms"] is None else f"{row['latency_ms']:.0f} ms"
        several = len(row["tasks"]) > 1
        for task in row["tasks"]:
            table.add_row(name, task["task"], *_rate(task), "" if several else latency)
        if several:
            table.add_row(name, "all", *_rate(row), latency, end_section=True)
    return table


def motion_lines(result: Mapping[str, Any]) -> list[str]:
    """Returns a sentence about the motion for each checkpoint."""
    lines = []
    for name, row in zip(
        short_names([row["path"] for row in result["checkpoints"]]), result["checkpoints"], strict=True
    ):
        if row["latency_ms"] is None:  # played without chunk control
            continue
        smoothness = "" if row["smoothness"] is None else f"; log dimensionless jerk {row['smoothness']:.2f}"
        lines.append(
            f"{name}: {row['chunks']} chunks, {row['late']} late, {row['refused']} refused, "
            f"{row['limits_hit']} positions clipped to limits{smoothness}"
        )
    return lines


def short_names(paths: Sequence[str]) -> list[str]:
    """Returns the last parts of some paths, as few as tell them apart."""
    for depth in range(1, max((len(PurePath(path).parts) for path in paths), default=1)):
        names = ["/".join(PurePath(path).parts[-depth:]) for path in paths]
        if len(set(names)) == len(set(paths)):
            return names
    return list(paths)


def paired_lines(result: Mapping[str, Any]) -> list[str]:
    """Returns a sentence for each pair of checkpoints."""
    paths = [row["path"] for row in result["checkpoints"]]
    short = dict(zip(paths, short_names(paths), strict=True))
    return [
        f"{short[pair['b']]} against {short[pair['a']]}: {100 * pair['difference']:+.1f} points "
        f"(95 %: {100 * pair['interval'][0]:+.1f} to {100 * pair['interval'][1]:+.1f}); solved only by the first "
        f"{pair['only_b']}, only by the second {pair['only_a']}; McNemar p = {pair['p_value']:.3g}"
        for pair in result["paired"]
    ]


def _rate(row: Mapping[str, Any]) -> tuple[str, ...]:
    low, high = row["interval"]
    mean = "-" if row["mean_time_s"] is None else f"{row['mean_time_s']:.1f} s"
    solved = f"{row['successes']}/{row['episodes']}"
    return solved, f"{100 * row['success_rate']:.1f} %", f"{100 * low:.0f} to {100 * high:.0f} %", mean
