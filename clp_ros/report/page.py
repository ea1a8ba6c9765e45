# SPDX-License-Identifier: Apache-2.0
"""The calibration as one HTML page: what was measured, what it suggests, and what to type next.

Everything is in the one file (styles, pictures), so it can be mailed, and it asks no other machine for anything.
"""

import base64
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clp_ros.report.heatmaps import format_threshold
from clp_ros.report.tables import MISSING, format_block, format_score, layer_rows

# In this order first; what else the meta holds follows in its own order.
_META_ORDER = ["checkpoint", "family", "embodiment", "task", "bags", "episodes"]
_META_ORDER += ["samples", "tokens", "seed", "dtype", "device", "versions"]


def write_report(folder: Path, report: Mapping[str, Any]) -> Path:
    """Writes ``report.html`` into ``folder``. Equal input gives equal bytes; every text is escaped.

    Args:
        folder: An existing folder that holds the modules' ``heatmap_<module>.png``.
        report: ``meta``: what was calibrated, a mapping of JSON values (``checkpoint``, ``family``, ``embodiment``,
            ``task``, ``bags``, ``samples``, ``tokens``, ``seed``, ``dtype``, ``device``, ``versions``, …; ``modules``
            in it is left out, being shown below). ``command``: the line to type next, or None. ``modules``: a mapping
            for each, with ``name``, ``adjacent`` ``(L-1,)`` and, where known, ``mse`` and ``cosine`` ``(L-1,)``,
            ``group`` (modules of one group lose the same layers), ``period`` (of alternating layer kinds),
            ``dead_last`` (its last layer's output reaches nothing), and the keys of
            :class:`~clp_ros.report.calibration_report.ModulePlan`.

    Returns:
        The file written.

    Raises:
        FileNotFoundError: A module's heatmap is not in the folder.
    """
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(_TEMPLATE).render(
        meta=_ordered(report["meta"]),
        family=report["meta"].get("family"),
        modules=[_module(folder, module, report["modules"]) for module in report["modules"]],
        command=report.get("command"),
        style=_STYLE,
    )
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8", newline="\n")
    return path


def _ordered(meta: Mapping[str, Any]) -> dict[str, Any]:
    keys = [key for key in _META_ORDER if key in meta]
    keys += [key for key in meta if key not in _META_ORDER and key != "modules"]
    return {key: meta[key] for key in keys}


def _module(folder: Path, module: Mapping[str, Any], modules: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the template shows of one module, every number already as text."""
    name, adjacent = module["name"], module["adjacent"]
    # A module that names no group is in none: None must not couple it with another.
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
    # Mean squared errors span decades: three significant digits, not fixed decimals.
    return MISSING if value is None or math.isnan(value) else f"{value:.3g}"


_STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1f; --soft: #5c5f66; --ground: #ffffff; --card: #f5f6f8; --line: #d9dce1;
  --gone: #b00020; --gone-ground: #fdecee; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e7ea; --soft: #a2a6ae; --ground: #16181c; --card: #1f2228; --line: #363a42;
    --gone: #ff8a9a; --gone-ground: #3a1d23; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1.25rem 4rem; max-width: 80rem; background: var(--ground); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .25rem; }
h2 { font-size: 1.3rem; margin: 2.5rem 0 .5rem; border-top: 1px solid var(--line); padding-top: 1.5rem; }
h3 { font-size: 1rem; margin: 0 0 .5rem; }
p { max-width: 46rem; margin: .5rem 0; }
.soft { color: var(--soft); }
.command { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .8rem 1rem;
  white-space: pre-wrap; overflow-wrap: anywhere; user-select: all; font-size: .9rem; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .22rem .7rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
thead th { color: var(--soft); font-weight: 600; white-space: nowrap; }
td.number, th.number { text-align: right; white-space: nowrap; }
td { overflow-wrap: anywhere; }
table.layers { font-size: .85rem; }
table.layers td { white-space: nowrap; }
table.layers th, table.layers td { padding: .2rem .5rem; }
tr.gone td { color: var(--gone); background: var(--gone-ground); font-weight: 600; }
.scroll { overflow-x: auto; }
.module { display: flex; flex-wrap: wrap; gap: 1.5rem; align-items: flex-start; margin-top: 1rem; }
.module > figure { flex: 1 1 26rem; max-width: 36rem; margin: 0; }
.module > .scroll { flex: 1 1 36rem; }
img { width: 100%; height: auto; display: block; background: #fff; border: 1px solid var(--line); border-radius: 8px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; margin: 0; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
ul { max-width: 46rem; padding-left: 1.2rem; }
li { margin: .35rem 0; }
@media print { body { max-width: none; } .module { break-inside: avoid; } }
"""

_TEMPLATE = """\
{% macro show(value, depth=0) %}
{% if value is none %}–
{% elif value is mapping and depth < 2 %}
<dl>{% for key, inner in value.items() %}
<dt>{{ key }}</dt><dd>{{ show(inner, depth + 1) }}</dd>
{% endfor %}</dl>
{% elif value is mapping %}
{% for key, inner in value.items() %}
{{ key }}: {{ show(inner, depth + 1) | trim }}{{ ", " if not loop.last }}
{% endfor %}
{% elif value is string or value is number %}{{ value }}
{% elif value is iterable %}
{% if value and value[0] is mapping %}
{% for inner in value %}{{ show(inner, depth) }}{% if not loop.last %}<br>{% endif %}{% endfor %}
{% else %}{{ value | join(", ") or "–" }}{% endif %}
{% else %}{{ value }}{% endif %}
{% endmacro %}
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Layer redundancy{% if family %} of {{ family }}{% endif %}</title>
<style>{{ style | safe }}</style>
</head>
<body>
<h1>Layer redundancy{% if family %} of {{ family }}{% endif %}</h1>
<p class="soft">How much each layer's hidden tokens differ from the layer before, on the demonstrations below, and the
layers that could therefore go before fine-tuning.</p>

<div class="scroll"><table>
<thead><tr><th>module</th><th class="number">layers</th><th>would go (0-based)</th><th class="number">left</th>
<th class="number">τ</th></tr></thead>
<tbody>
{% for module in modules %}
<tr><td>{{ module.name }}</td><td class="number">{{ module.layers }}</td>
<td>{{ module.removed | join(", ") or "–" }}</td><td class="number">{{ module.kept }}</td>
<td class="number">{{ module.threshold or "–" }}</td></tr>
{% endfor %}
</tbody></table></div>

{% if command %}
<p>To write the checkpoint without them:</p>
<pre class="command">{{ command }}</pre>
{% endif %}

{% for module in modules %}
<h2 id="module-{{ loop.index }}">{{ module.name }}</h2>
<p>
{% if module.removed %}
Of {{ module.layers }} layers, {{ module.removed | length }} would go:
<strong>{{ module.removed | join(", ") }}</strong>. {{ module.kept }} stay.
{% else %}
None of the {{ module.layers }} layers would go.
{% endif %}
{% if module.threshold %}
At τ = {{ module.threshold }} the candidates are
{{ module.candidates | join(", ") or "none" }}{% if module.blocks %} (blocks {{ module.blocks | join(", ") }}; the first
layer of a block is its anchor and stays){% endif %}.
{% endif %}
{% if module.coupled %}
It loses the same layers as {{ module.coupled | join(", ") }}, by the mean of their scores{% if module.dead_last %}, in
which its last layer takes no part: that layer's output reaches nothing{% endif %}.
{% endif %}
{% if module.period > 1 %}
Its layers are of {{ module.period }} kinds that alternate with the index. Those that stay must alternate too, so a
candidate of high score may have to stay.
{% endif %}
</p>
<div class="module">
<figure><img alt="CKA of all layer pairs of {{ module.name }} with the adjacent scores below"
src="data:image/png;base64,{{ module.picture }}"></figure>
<div class="scroll">
<table class="layers">
<thead><tr><th class="number">layer</th><th></th><th>block</th>
{% for header in module.headers %}<th class="number">{{ header }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in module.rows %}
<tr{% if row.layer in module.removed %} class="gone"{% endif %}><td class="number">{{ row.layer }}</td>
<td>{{ row.fate }}</td><td>{{ row.block }}</td>
{% for value in row["values"] %}<td class="number">{{ value }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table>
<p class="soft">Each row compares a layer with the one before it. CKA and cosine: 1 is the same; MSE: 0 is the same.</p>
</div>
</div>
{% endfor %}

<h2>What was calibrated</h2>
<div class="scroll"><table><tbody>
{% for key, value in meta.items() %}
<tr><th>{{ key | replace("_", " ") }}</th><td>{{ show(value) }}</td></tr>
{% endfor %}
</tbody></table></div>

<h2>How to read it, and its limits</h2>
<ul>
<li>Linear CKA of the column-centred hidden tokens after each layer, all calibration tokens together. Adjacent scores
select; the full matrix is for looking at.</li>
<li>Consecutive layers with a score of at least τ form a block. Its first layer, the anchor, stays; the others are
candidates, and those of largest total score that the model's structure allows would go. Coupled modules share one set,
scored by the mean of their members.</li>
<li>One criterion for all tokens: it does not tell image, language, state and action tokens apart. How many
layers go is given, not found per task.</li>
<li>High similarity alone does not promise a good policy. The pruned checkpoint has to be fine-tuned, and verified on
the task after that: before fine-tuning its actions are not those of the original.</li>
<li>The scores belong to these demonstrations and this checkpoint. Method: arXiv 2606.20246.</li>
</ul>
</body>
</html>
"""
