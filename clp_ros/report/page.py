# SPDX-License-Identifier: Apache-2.0
"""Writes the calibration as one HTML page: measurements, planned removal and next command.

The file includes styles and images, so that it can be mailed and read offline.
"""

import base64
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clp_ros.report.heatmaps import format_threshold
from clp_ros.report.tables import MISSING, format_block, format_score, layer_rows

_HERE = Path(__file__).parent  # with page.html.jinja and page.css
# These keys come first, in this order. Other keys of the meta follow in their own order.
_META_ORDER = ["checkpoint", "family", "embodiment", "task", "bags", "episodes"]
_META_ORDER += ["samples", "tokens", "seed", "dtype", "device", "versions"]


def write_report(folder: Path, report: Mapping[str, Any]) -> Path:
    """Writes ``report.html`` into ``folder``. Equal input gives equal bytes; every text is escaped.

    Args:
        folder: An existing folder that holds the modules' ``heatmap_<module>.png``.
        report: ``meta``: the settings of the calibration, a mapping of JSON values (``checkpoint``, ``family``,
            ``embodiment``, ``task``, ``bags``, ``samples``, ``tokens``, ``seed``, ``dtype``, ``device``, ``versions``,
            …; ``modules`` in it is left out, because it is shown below). ``command``: the next command, or None.
            ``modules``: a mapping for each, with ``name``, ``adjacent`` ``(L-1,)`` and, where known, ``mse`` and
            ``cosine`` ``(L-1,)``, ``group`` (modules of one group lose the same layers), ``period`` (of alternating
            layer kinds), ``dead_last`` (its last layer's output is not used), and the keys of
            :class:`~clp_ros.report.calibration_report.ModulePlan`.

    Returns:
        The file written.

    Raises:
        FileNotFoundError: A module's heatmap is not in the folder.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.get_template("page.html.jinja").render(
        meta=_ordered(report["meta"]),
        family=report["meta"].get("family"),
        modules=[_module(folder, module, report["modules"]) for module in report["modules"]],
        command=report.get("command"),
        style=(_HERE / "page.css").read_text(encoding="utf-8"),
    )
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8", newline="\n")
    return path


def _ordered(meta: Mapping[str, Any]) -> dict[str, Any]:
    keys = [key for key in _META_ORDER if key in meta]
    keys += [key for key in meta if key not in _META_ORDER and key != "modules"]
    return {key: meta[key] for key in keys}


def _module(folder: Path, module: Mapping[str, Any], modules: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the values of one layer stack for the template, with all numbers as text."""
    name, adjacent = module["name"], module["adjacent"]
    # Modules without a group are not coupled: None is not a common group.
    group = module.get("group", module["name"])
    scores = module.get("scores")
    blocks, removed = module.get("blocks") or (), module.get("removed") or ()
    threshold = module.get("threshold")
    picture = (folder / f"heatmap_{name}.png").read_bytes()
    rows = layer_rows(adjacent if scores is None else scores, blocks, removed)
    columns: list[tuple[str, Any, Any]] = [("CKA", adjacent, format_score)]
    if scores is not None:
        columns.append(("group mean", scores, format_score))
    columns += [
        (label, module[key], form)
        for key, label, form in (("mse", "MSE", _format_error), ("cosine", "cosine", format_score))
        if module.get(key) is not None
    ]
    for row in rows:
        row["values"] = [MISSING if row["layer"] == 0 else form(v[row["layer"] - 1]) for _, v, form in columns]
    return {
        "name": name,
        "coupled": [other["name"] for other in modules if other is not module and other.get("group") == group],
        "period": module.get("period", 1),
        "dead_last": bool(module.get("dead_last")),
        "layers": len(rows),
        "kept": len(rows) - len(removed),
        "removed": sorted(removed),
        "threshold": None if threshold is None else format_threshold(threshold),
        "candidates": [layer for block in blocks for layer in block[1:]],
        "blocks": [format_block(block) for block in blocks if len(block) > 1],
        "headers": [label for label, _, _ in columns],
        "rows": rows,
        "picture": base64.b64encode(picture).decode("ascii"),
    }


def _format_error(value: float | None) -> str:
    # Three significant digits instead of fixed decimals, because mean squared errors span decades.
    return MISSING if value is None or math.isnan(value) else f"{value:.3g}"
