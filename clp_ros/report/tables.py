# SPDX-License-Identifier: Apache-2.0
"""Creates tables for the terminal (rich), and the same tables as Markdown. The caller prints them."""

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

MISSING = "–"
_REMOVED = "× removed"


def layers_table(
    module: str,
    scores: Sequence[float],
    *,
    blocks: Sequence[Sequence[int]] = (),
    removed: Collection[int] = (),
    threshold: float | None = None,
) -> "Table":
    """Returns a table of a stack's layers: score, block, and whether the layer would be removed.

    Args:
        module: The layer stack's name.
        scores: ``(L-1,)``, ``scores[i]`` belongs to layer i+1. NaN for a layer without a score.
        blocks: The 0-based layers of each block; the first one is its anchor.
        removed: The 0-based layers that would be removed.
        threshold: τ, for the title.
    """
    from rich.table import Table
    from rich.text import Text

    title = Text(module, style="bold")
    if threshold is not None:
        title.append(f"  τ = {threshold:.6f}", style="not bold")
    table = Table(title=title, title_justify="left")
    table.add_column("layer", justify="right")
    table.add_column("score", justify="right")
    table.add_column("block", justify="left")
    table.add_column("", justify="left")
    for row in layer_rows(scores, blocks, removed):
        is_removed = row["fate"] == _REMOVED
        cells = (str(row["layer"]), row["score"], row["block"], row["fate"])
        table.add_row(*(Text(cell) for cell in cells), style="bold red" if is_removed else None)
    return table


def layer_rows(
    scores: Sequence[float], blocks: Sequence[Sequence[int]], removed: Collection[int]
) -> list[dict[str, Any]]:
    """Returns the rows of :func:`layers_table` and the HTML page: ``layer``, ``score``, ``block``, ``fate``."""
    block_of = {layer: block for block in blocks if len(block) > 1 for layer in block}
    rows = []
    for layer in range(len(scores) + 1):
        block = block_of.get(layer)
        standing = MISSING if block is None else format_block(block) + (" anchor" if layer == block[0] else "")
        if layer in removed:
            fate = _REMOVED
        elif block is not None and layer != block[0]:
            fate = "candidate, stays"
        else:
            fate = "stays"
        score = MISSING if layer == 0 else format_score(scores[layer - 1])
        rows.append({"layer": layer, "score": score, "block": standing, "fate": fate})
    return rows


def comparison_table(rows: Sequence[Mapping[str, Any]], *, title: str | None = None) -> "Table":
    """Returns benchmark results, one column for each checkpoint, compared with the first ("1.46× faster").

    Args:
        rows: One mapping for each checkpoint: ``path`` (or ``name``, which is shown instead), and any of
            ``parameters``, ``parameters_tied``, ``trainable``, ``gflops``, ``latency_ms``, ``latency_p90_ms``,
            ``train_step_ms``, ``peak_memory``, ``bytes``. A value that one checkpoint lacks (no key, None, NaN) is
            shown as ``–``. A measure that all lack is left out.
        title: A title above the table.

    Raises:
        ValueError: There is no row.
    """
    from rich.table import Table
    from rich.text import Text

    if not rows:
        raise ValueError("there is nothing to compare")
    table = Table(title=Text(title) if title is not None else None, title_justify="left")
    table.add_column("")
    for name in _names(rows):
        table.add_column(Text(name, overflow="fold"), justify="right")
    for key, label, form, words in _MEASURES:
        if any(key in row for row in rows):
            first = rows[0].get(key)
            cells = [_measure(row.get(key), None if row is rows[0] else first, form, words) for row in rows]
            table.add_row(Text(label), *(Text(cell) for cell in cells))
    return table


def paper_table(rows: Sequence[Mapping[str, Any]]) -> "Table":
    """Returns the results as Table 1 of a paper: one column for each checkpoint, and the ratio to the first after the
    others.

    Args:
        rows: As in :func:`comparison_table`.

    Raises:
        ValueError: There is no row.
    """
    from rich.table import Table

    if not rows:
        raise ValueError("there is nothing to compare")
    table = Table()
    table.add_column("")
    base, *others = _names(rows)
    table.add_column(base, justify="right")
    for name in others:
        table.add_column(name, justify="right")
        table.add_column(f"{base} ÷ {name}", justify="right")
    for key, label, form, _ in _MEASURES:
        if any(key in row for row in rows):
            exact = _EXACT.get(form, form)
            values = [_known(row.get(key)) for row in rows]
            cells = [MISSING if value is None else exact(value) for value in values]
            first = values[0]
            for place, value in reversed(list(enumerate(values[1:], start=1))):
                cells.insert(place + 1, f"{first / value:.2f}" if first is not None and value else MISSING)
            table.add_row(label, *cells)
    return table


def benchmark_setting(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns the machine and settings of benchmark results in one line."""
    settings = []
    for row in rows:
        words = [row.get("device_name") or row.get("device"), row.get("device")]
        words.append(f"{row['threads']} threads" if row.get("threads") else None)
        words += [row.get("dtype"), "denoising step compiled" if row.get("compile_s") is not None else None]
        settings.append(", ".join(dict.fromkeys(word for word in words if word)))
    return "; ".join(dict.fromkeys(settings))


def inspection_table(found: Mapping[str, Any]) -> "Group":
    """Returns the output of ``clp inspect``: facts, then the layer stacks of a checkpoint or the scores of a
    calibration.

    Args:
        found: The JSON of a result of :mod:`clp_ros.jobs.inspect`.
    """
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    facts = Table.grid(padding=(0, 2))
    for label, value in _facts(found):
        facts.add_row(Text(label, style="dim"), Text(value, overflow="fold"))
    modules = found["modules"]
    if any("adjacent" in module for module in modules):
        return Group(facts, *(_scores_table(module) for module in modules))
    table = Table()
    for header in ("module", "coupled with"):
        table.add_column(header)
    for header in ("layers", "kinds", "parameters"):
        table.add_column(header, justify="right")
    manifest = found.get("manifest")
    if manifest:
        table.add_column("removed")
    for module in modules:
        coupled = [other["name"] for other in modules if other is not module and other["group"] == module["group"]]
        cells = [module["name"], ", ".join(coupled) or MISSING, str(module["layers"]), str(module["period"])]
        cells.append(format_count(module["parameters"]))
        if manifest:
            record = manifest["modules"].get(module["name"])
            removed = ", ".join(map(str, record["removed"])) if record else ""
            cells.append(f"{removed or MISSING} of {record['original_layers']}" if record else MISSING)
        table.add_row(*(Text(cell) for cell in cells))
    return Group(facts, table)


def conversion_table(added: Sequence[tuple[str, int, str]], left_out: Sequence[tuple[str, str]]) -> "Table":
    """Returns a table of the bags of a conversion: the episodes and frames that were added, or why there are none.

    Args:
        added: Bag, frames and task of each episode.
        left_out: Bag and reason of each bag that was left out.
    """
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for name, justify in (("bag", "left"), ("episodes", "right"), ("frames", "right"), ("task", "left")):
        table.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for bag in dict.fromkeys(name for name, _, _ in added):
        episodes = [(frames, task) for name, frames, task in added if name == bag]
        tasks = " / ".join(dict.fromkeys(task for _, task in episodes))
        cells = (bag, str(len(episodes)), str(sum(frames for frames, _ in episodes)), tasks)
        table.add_row(*(Text(cell) for cell in cells))
    for bag, why in left_out:
        table.add_row(*(Text(cell) for cell in (bag, "0", "0", f"left out: {why}")), style="bold red")
    return table


def to_markdown(table: "Table") -> str:
    """Converts a table of this module to a Markdown pipe table, without its title."""

    def line(cells: Sequence[Any]) -> str:
        texts = (str(cell).replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ") for cell in cells)
        return "| " + " | ".join(texts) + " |"

    columns = [list(column.cells) for column in table.columns]
    rule = ["---:" if column.justify == "right" else "---" for column in table.columns]
    body = [line(cells) for cells in zip(*columns, strict=True)]
    return "\n".join([line([column.header for column in table.columns]), line(rule), *body]) + "\n"


def format_score(score: float | None) -> str:
    """Returns a score with six decimals, because many are near 1; ``–`` for None."""
    known = _known(score)
    return MISSING if known is None else f"{known:.6f}"


def format_block(block: Sequence[int]) -> str:
    """Returns a block's first and last layer: 3–9."""
    return f"{block[0]}–{block[-1]}"


def format_count(count: float) -> str:
    """Returns a number of parameters as in papers: 450.0 M, 3.50 B."""
    for size, unit, decimals in ((1e9, "B", 2), (1e6, "M", 1), (1e3, "k", 1)):
        if count >= 0.99995 * size:  # 999 960 is 1.0 M, not 1000.0 k
            return f"{count / size:.{decimals}f} {unit}"
    return f"{count:.0f}"


def format_bytes(size: float) -> str:
    """Returns a file size in powers of 1000, like ``ls --si``: 907.1 MB."""
    for unit in ("B", "kB", "MB"):
        if size < 999.95:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"


def _exact_count(count: float) -> str:
    return f"{count / 1e9:.3f} B" if count >= 0.9999995e9 else f"{count / 1e6:.2f} M"


def _format_figure(value: float) -> str:
    # The 0.031 GFLOPs of a tiny checkpoint must not become 0.0.
    return f"{value:.1f}" if value >= 10 else f"{value:.3g}"


def _facts(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns the scalar values of an inspection as text, in their order."""
    facts = []
    for key, value in found.items():
        if key in ("modules", "manifest"):
            continue
        if key == "parameters":
            text = f"{format_count(value)} ({value})"
        elif key == "bytes":
            text = f"{format_bytes(value)} ({value})"
        elif key == "checkpoint":
            text = f"{value['path']} ({value['fingerprint']})"
        elif key == "bags":
            text = "\n".join(f"{bag['path']} ({bag['samples']} samples)" for bag in value)
        elif isinstance(value, Mapping):
            text = ", ".join(f"{name} {inner}" for name, inner in value.items())
        else:
            text = MISSING if value is None else str(value)
        facts.append((key, text))
    manifest = found.get("manifest")
    if manifest:
        before = manifest["parameters"]["before"]
        facts.append(("pruned from", f"{manifest['source']['path']} ({manifest['source']['fingerprint']})"))
        facts.append(("criterion", manifest["criterion"]))
        facts.append(("parameters before", f"{format_count(before)} ({before})"))
    return facts


def _scores_table(module: Mapping[str, Any]) -> "Table":
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(f"{module['name']}: adjacent scores"), title_justify="left")
    for header in ("layer", "CKA", "MSE", "cosine"):
        table.add_column(header, justify="right")
    series = zip(module["adjacent"], module["mse"], module["cosine"], strict=True)
    for layer, (cka, mse, cosine) in enumerate(series, start=1):
        table.add_row(str(layer), format_score(cka), f"{mse:.3g}", format_score(cosine))
    return table


def _names(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns a label for each checkpoint: its name; or its folder's name if all differ, otherwise the path."""
    paths = [str(row.get("path", MISSING)) for row in rows]
    short = [Path(path).name or path for path in paths]
    if len(set(short)) < len(short):
        short = paths
    return [str(row.get("name") or name) for row, name in zip(rows, short, strict=True)]


def _measure(value: float | None, first: float | None, form: Callable[[float], str], words: tuple[str, str]) -> str:
    value, first = _known(value), _known(first)
    if value is None:
        return MISSING
    if not first or not value:
        return form(value)
    # With a word, because 0.79× and 1.27× could both be the ratio of the same two numbers.
    ratio = f"{first / value:.2f}× {words[0]}" if value < first else f"{value / first:.2f}× {words[1]}"
    return f"{form(value)}  ({'same' if ratio.startswith('1.00×') else ratio})"


def _known(value: float | None) -> float | None:
    """Returns the value; None for None and NaN."""
    return value if value == value else None


# Words for a value below and a value above the first one.
_SIZE, _WORK, _TIME = ("smaller", "larger"), ("less", "more"), ("faster", "slower")
_MEASURES: tuple[tuple[str, str, Callable[[float], str], tuple[str, str]], ...] = (
    ("parameters", "parameters", format_count, _SIZE),
    ("parameters_tied", "parameters, tied ones once", format_count, _SIZE),
    ("trainable", "trainable", format_count, _SIZE),
    ("gflops", "GFLOPs a chunk", _format_figure, _WORK),
    ("latency_ms", "latency of a chunk, ms", _format_figure, _TIME),
    ("latency_p90_ms", "90th percentile, ms", _format_figure, _TIME),
    ("train_step_ms", "training step, ms", _format_figure, _TIME),
    ("peak_memory", "peak memory", format_bytes, _SIZE),
    ("bytes", "checkpoint", format_bytes, _SIZE),
)
# For the paper's table, with enough digits for comparisons with other papers.
_EXACT: dict[Callable[[float], str], Callable[[float], str]] = {format_count: _exact_count}
