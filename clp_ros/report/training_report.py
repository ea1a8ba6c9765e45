# SPDX-License-Identifier: Apache-2.0
"""The page of a fine-tuning: its loss curve, which weights were trained, and its settings."""

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

_HERE = Path(__file__).parent
_STEP, _MEAN, _HELD_OUT = "#9fb8d1", "#1f4e79", "#b35900"
# The running mean is over one of so many parts of the steps.
_PARTS = 50


def write_training_page(path: Path, record: Mapping[str, Any]) -> None:
    """Writes the page as one file, which includes style and picture.

    Args:
        path: The HTML file.
        record: ``training.json``: ``request``, ``result``, ``losses`` and ``versions``.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.get_template("training.html.jinja").render(
        result=record["result"],
        request=record["request"],
        versions=record["versions"],
        picture=base64.b64encode(draw_losses(record["losses"])).decode("ascii"),
        style=(_HERE / "page.css").read_text(encoding="utf-8"),
    )
    path.write_text(page, encoding="utf-8", newline="\n")


def draw_losses(rows: Sequence[Mapping[str, float]]) -> bytes:
    """Draws the loss of every step, its running mean, the loss on the held-out episodes, and the learning rate.

    Args:
        rows: ``step`` with ``loss`` and ``learning_rate``, or with ``held_out``.

    Returns:
        A PNG.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    trained = [row for row in rows if "loss" in row]
    held_out = [row for row in rows if "held_out" in row]
    steps = np.array([row["step"] for row in trained])
    losses = np.array([row["loss"] for row in trained])
    figure = Figure(figsize=(9.0, 5.2), dpi=120, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    upper.plot(steps, losses, color=_STEP, linewidth=0.8, label="each step", marker="." if len(steps) < 40 else "")
    width = max(len(losses) // _PARTS, 1)
    if width > 1:
        mean = np.convolve(losses, np.ones(width) / width, mode="valid")
        upper.plot(steps[width - 1 :], mean, color=_MEAN, linewidth=1.8, label=f"mean of {width} steps")
    if held_out:
        upper.plot(
            [row["step"] for row in held_out],
            [row["held_out"] for row in held_out],
            color=_HELD_OUT,
            marker="o",
            markersize=4,
            linewidth=1.2,
            label="held-out episodes",
        )
    shown = [*losses, *(row["held_out"] for row in held_out)]
    if min(shown) > 0 and max(shown) > 5 * min(shown):
        upper.set_yscale("log")
    upper.set_ylabel("loss")
    upper.legend(frameon=False)
    lower.plot(steps, [row["learning_rate"] for row in trained], color=_MEAN, linewidth=1.2)
    lower.set_ylim(bottom=0)
    lower.set_ylabel("learning rate")
    lower.ticklabel_format(axis="y", scilimits=(-2, 2))
    lower.set_xlabel("training step")
    lower.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (upper, lower):
        axes.grid(color="#e3e5e8", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()
