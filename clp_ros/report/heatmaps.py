# SPDX-License-Identifier: Apache-2.0
"""Draws one image for each layer stack: the CKA of all layer pairs as in the paper's Figure 2, and the adjacent scores.

The upper part is the L×L matrix. Dark red means equal representations; the blocks of τ are outlined along the diagonal.
The lower part has the adjacent scores ``s_ℓ = CKA(H_{ℓ-1}, H_ℓ)`` on the same horizontal axis, with τ as a line. Layers
that would be removed have a cross and a hatched cell, so that the image can be read without colours.
"""

import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 150
WIDTH_IN, HEIGHT_IN = 7.8, 9.6
# Inches from the figure's left and bottom edge. The layout is fixed, so that both parts have equal columns and all
# images have one size.
_MATRIX = (0.95, 3.05, 5.6, 5.6)
_SCORES = (0.95, 0.95, 5.6, 1.45)
_COLOUR_BAR = (6.7, 3.05, 0.18, 5.6)
_COLOUR_MAP = "RdBu_r"
_REMOVED = "#b00020"
_KEPT = "#1f4e79"
_CROSS = "×"
# Larger scores are drawn here: further nines of a CKA are rounding errors.
_TOP = 1.0 - 1e-7


def draw_heatmap(
    matrix: np.ndarray,
    *,
    module: str,
    threshold: float | None,
    blocks: Sequence[Sequence[int]],
    removed: Collection[int],
    path: Path | None,
    scores: Sequence[float] | np.ndarray | None = None,
) -> "Figure":
    """Draws a layer stack's heatmap with its adjacent scores, and writes it as a PNG.

    Equal input gives equal bytes on one machine. matplotlib's global state is not used, so that it can run in any
    thread.

    Args:
        matrix: ``(L, L)`` float, CKA of layer i and layer j, finite.
        module: The layer stack's name, for the title.
        threshold: τ, or None if there is none.
        blocks: The 0-based, consecutive layers of each block; the first one is its anchor. Blocks of one layer are not
            outlined.
        removed: The 0-based layers that would be removed.
        path: The PNG to write, or None.
        scores: ``(L-1,)`` the scores of the selection, if they are not the stack's adjacent scores (for coupled stacks:
            the mean of the group). Both are drawn. NaN for a layer without a score.

    Returns:
        The matplotlib figure.

    Raises:
        ValueError: The matrix is not square or not finite, or a layer is outside it.
    """
    matrix, scores = _checked(matrix, blocks, removed, scores)
    figure = _figure(matrix, module, threshold, blocks, frozenset(removed), scores)
    if path is not None:
        # Without Software=None, matplotlib would write its version into the file.
        figure.savefig(path, format="png", dpi=DPI, metadata={"Software": None})
    return figure


def heatmap_rgb(
    matrix: np.ndarray,
    *,
    module: str,
    threshold: float | None,
    blocks: Sequence[Sequence[int]],
    removed: Collection[int],
    scores: Sequence[float] | np.ndarray | None = None,
) -> np.ndarray:
    """Returns the image of :func:`draw_heatmap` as ``(H, W, 3)`` uint8 RGB, C-contiguous, for a ROS Image."""
    figure = draw_heatmap(
        matrix,
        module=module,
        threshold=threshold,
        blocks=blocks,
        removed=removed,
        path=None,
        scores=scores,
    )
    canvas: Any = figure.canvas  # a FigureCanvasAgg: its base class has no buffer_rgba
    canvas.draw()
    return np.ascontiguousarray(np.asarray(canvas.buffer_rgba())[..., :3])


def colour_floor(matrix: np.ndarray) -> float:
    """Returns the start of the colour range: 1 minus the largest distance from 1, rounded up to one digit: 0.3, 0.95,
    0.998.

    The range ends at 1. If it started at 0, many stacks would be one red square, because their layers are similar. The
    range is at least 0.001, so that rounding errors do not look like structure.
    """
    distance = max(1.0 - float(np.min(matrix)), 1e-3)
    digit = math.floor(math.log10(distance) + 1e-9)
    # The small term prevents rounding up of 0.3, whose distance is 7.000…1 tenths.
    return round(1.0 - math.ceil(distance / 10**digit - 1e-9) * 10**digit, 3)


def format_threshold(threshold: float) -> str:
    """Returns τ with four decimals, or six from 0.999 on."""
    return f"{threshold:.4f}" if threshold < 0.999 else f"{threshold:.6f}"


def _checked(
    matrix: np.ndarray,
    blocks: Sequence[Sequence[int]],
    removed: Collection[int],
    scores: Sequence[float] | np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray | None]:
    matrix = np.asarray(matrix, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or matrix.shape[0] == 0:
        raise ValueError(f"a CKA matrix is square, not of shape {matrix.shape}")
    if not np.isfinite(matrix).all():
        raise ValueError("a CKA matrix is finite")
    num_layers = len(matrix)
    for layer in [*removed, *(layer for block in blocks for layer in block)]:
        if not 0 <= layer < num_layers:
            raise ValueError(f"layer {layer} is not one of {num_layers}")
    for block in blocks:
        if list(block) != list(range(block[0], block[0] + len(block))):
            raise ValueError(f"a block's layers are consecutive, not {list(block)}")
    if scores is not None:
        scores = np.asarray(scores, dtype=np.float64)
        if scores.shape != (num_layers - 1,):
            raise ValueError(f"{num_layers} layers have {num_layers - 1} adjacent scores, not {scores.shape}")
    return matrix, scores


def _figure(
    matrix: np.ndarray,
    module: str,
    threshold: float | None,
    blocks: Sequence[Sequence[int]],
    removed: frozenset[int],
    scores: np.ndarray | None,
) -> "Figure":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH_IN, HEIGHT_IN), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    upper = figure.add_axes(_fractions(_MATRIX), label="matrix")
    lower = figure.add_axes(_fractions(_SCORES), label="scores")
    bar = figure.add_axes(_fractions(_COLOUR_BAR), label="colour bar")

    floor = colour_floor(matrix)
    image = upper.imshow(
        matrix, cmap=_COLOUR_MAP, vmin=floor, vmax=1.0, origin="upper", interpolation="nearest", aspect="equal"
    )
    colour_bar = figure.colorbar(image, cax=bar)
    colour_bar.set_label(f"CKA (colours from {floor:g} to 1)", fontsize=10)
    bar.tick_params(labelsize=9)

    num_layers = len(matrix)
    _draw_blocks(upper, blocks)
    _draw_removed_cells(upper, removed)
    _label_layers(upper, num_layers, removed, vertical=True)
    upper.set_ylabel("layer (0 at the top)", fontsize=10)
    _draw_scores(lower, np.diag(matrix, 1), threshold, blocks, removed, scores)
    _label_layers(lower, num_layers, removed, vertical=False)

    figure.text(0.125, 0.972, module, fontsize=15, fontweight="bold", va="top", parse_math=False)
    figure.text(0.125, 0.944, _subtitle(num_layers, threshold, removed), fontsize=10.5, va="top")
    _draw_legend(figure, blocks, removed, scores)
    return figure


def _fractions(inches: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
    left, bottom, width, height = inches
    return left / WIDTH_IN, bottom / HEIGHT_IN, width / WIDTH_IN, height / HEIGHT_IN


def _subtitle(num_layers: int, threshold: float | None, removed: Collection[int]) -> str:
    parts = [f"{num_layers} layer{'s' if num_layers > 1 else ''}"]
    if removed:
        parts[0] = f"{num_layers} → {num_layers - len(removed)} layers"
    if threshold is not None:
        parts.append(f"τ = {format_threshold(threshold)}")
    parts.append(f"{len(removed)} to remove" if removed else "none to remove")
    return "  ·  ".join(parts)


def _draw_blocks(axes: "Axes", blocks: Sequence[Sequence[int]]) -> None:
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import Normal, Stroke

    for block in blocks:
        if len(block) < 2:
            continue
        outline = Rectangle((block[0] - 0.5, block[0] - 0.5), len(block), len(block), fill=False, edgecolor="black")
        outline.set(linewidth=2.2, gid=f"block {block[0]}-{block[-1]}", zorder=4, clip_on=False)
        # A white and a black line, visible on dark red and on dark blue.
        outline.set_path_effects([Stroke(linewidth=4.6, foreground="white"), Normal()])
        axes.add_patch(outline)


def _draw_removed_cells(axes: "Axes", removed: Collection[int]) -> None:
    from matplotlib.patches import Rectangle

    for layer in sorted(removed):
        cell = Rectangle((layer - 0.5, layer - 0.5), 1, 1, facecolor="none", edgecolor="white", hatch="////")
        cell.set(linewidth=1.0, gid=f"removed {layer}", zorder=3)
        axes.add_patch(cell)


def _label_layers(axes: "Axes", num_layers: int, removed: Collection[int], vertical: bool) -> None:
    """Labels every layer's index on the horizontal axis and, if asked, the vertical one; removed layers bold and red
    with a cross."""
    size = 10 if num_layers <= 20 else 8 if num_layers <= 28 else 6.8
    marked = [f"{layer}\n{_CROSS}" if layer in removed else str(layer) for layer in range(num_layers)]
    axes.set_xticks(range(num_layers), marked, fontsize=size)
    labels = list(axes.get_xticklabels())
    if vertical:
        marked = [f"{_CROSS} {layer}" if layer in removed else str(layer) for layer in range(num_layers)]
        axes.set_yticks(range(num_layers), marked, fontsize=size)
        labels += axes.get_yticklabels()
    for label in labels:
        if _CROSS in label.get_text():
            label.set(color=_REMOVED, fontweight="bold")
        label.set_linespacing(0.9)
    axes.set_xlim(-0.5, num_layers - 0.5)
    axes.tick_params(length=2)


def _draw_scores(
    axes: "Axes",
    adjacent: np.ndarray,
    threshold: float | None,
    blocks: Sequence[Sequence[int]],
    removed: Collection[int],
    scores: np.ndarray | None,
) -> None:
    adjacent = np.minimum(adjacent, _TOP)
    selecting = adjacent if scores is None else np.minimum(scores, _TOP)
    layers = np.arange(1, len(adjacent) + 1)
    is_removed = np.isin(layers, list(removed))
    for block in blocks:
        if len(block) >= 2:
            axes.axvspan(block[0] - 0.44, block[-1] + 0.44, color="0.92", zorder=0, linewidth=0)
    if scores is not None:
        axes.plot(layers, adjacent, color="0.55", linewidth=1.0, linestyle=":", marker=".", zorder=2)
    axes.plot(layers, selecting, color="0.45", linewidth=1.0, zorder=2)
    axes.plot(
        layers[~is_removed], selecting[~is_removed], "o", color=_KEPT, markersize=5.5, zorder=3, gid="kept scores"
    )
    axes.plot(
        layers[is_removed],
        selecting[is_removed],
        "x",
        color=_REMOVED,
        markersize=7,
        markeredgewidth=2.2,
        zorder=3,
        gid="removed scores",
    )
    if threshold is not None:
        axes.axhline(threshold, color="black", linewidth=1.2, linestyle="--", zorder=1, gid="threshold")
        axes.annotate(
            f"τ = {format_threshold(threshold)}",
            (1.0, threshold),
            xycoords=("axes fraction", "data"),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )
    shown = np.concatenate([adjacent, selecting, [] if threshold is None else [threshold]])
    shown = shown[np.isfinite(shown)]
    _stretch_towards_one(axes, shown if len(shown) else np.array([0.0]))
    axes.tick_params(axis="y", labelsize=8.5)
    axes.grid(axis="y", color="0.88", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    title = "adjacent CKA" if scores is None else "mean of the group"
    axes.set_ylabel("score s(ℓ)", fontsize=10)
    title += ": s(ℓ), CKA of layer ℓ and the one before; axis stretched towards 1"
    axes.set_title(title, fontsize=9.5, loc="left", pad=5)
    axes.set_xlabel("layer ℓ", fontsize=10, labelpad=2)


def _stretch_towards_one(axes: "Axes", shown: np.ndarray) -> None:
    """Scales the vertical axis by the number of nines: the distance from 0.99 to 0.999 equals that from 0.9 to 0.99.

    Most scores are near 1. On a linear axis, scores of removed and kept layers could not be distinguished.
    """

    def nines(score: np.ndarray | float) -> np.ndarray:
        return -np.log10(np.maximum(1.0 - np.asarray(score, dtype=np.float64), 1e-12))

    def score_of(nines: np.ndarray | float) -> np.ndarray:
        return 1.0 - 10.0 ** -np.asarray(nines, dtype=np.float64)

    axes.set_yscale("function", functions=(nines, score_of))
    low, high = float(nines(shown.min())), float(nines(min(float(shown.max()), _TOP)))
    margin = 0.12 * max(high - low, 0.5)
    low, high = low - margin, high + margin
    axes.set_ylim(float(score_of(low)), float(score_of(high)))
    decades = range(round(float(nines(_TOP))))
    for within in ((0.0, 0.5, 0.8), (0.0, 0.5), (0.0,)):
        ticks = [1.0 - (1.0 - first) * 10.0**-decade for decade in decades for first in within]
        ticks = [tick for tick in ticks if low <= nines(tick) <= high]
        if len(ticks) <= 6:
            break
    if low <= nines(_TOP) <= high:
        ticks.append(_TOP)
    axes.set_yticks(ticks, [f"{tick:.8g}" if tick < _TOP else "1" for tick in ticks], minor=False)
    axes.set_yticks([], minor=True)


def _draw_legend(
    figure: "Figure", blocks: Sequence[Sequence[int]], removed: Collection[int], scores: np.ndarray | None
) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    cross: dict[str, Any] = {"color": _REMOVED, "marker": "x", "markeredgewidth": 2.2, "linestyle": "none"}
    handles: list[Line2D | Patch] = [Line2D([], [], color=_KEPT, marker="o", linestyle="none", label="kept")]
    if removed:
        handles.append(Line2D([], [], label="to remove (× ▨)", **cross))
    if any(len(block) > 1 for block in blocks):
        label = "block: anchor, then s(ℓ) ≥ τ"
        handles.append(Patch(facecolor="0.92", edgecolor="black", linewidth=1.6, label=label))
    if scores is not None:
        handles.append(Line2D([], [], color="0.55", linestyle=":", marker=".", label="this module alone"))
    place: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0.115, 0.005), "ncols": len(handles)}
    figure.legend(handles=handles, fontsize=9, frameon=False, **place)
