# SPDX-License-Identifier: Apache-2.0
"""Makes the pages in doc/reference/measurements from the recorded results.

    python benchmarks/make_pages.py            writes the pages
    python benchmarks/make_pages.py --check    writes nothing; returns 1 if a page differs

A page consists of the text in ``benchmarks/pages/NAME.md`` and a section for each file of ``benchmarks/results`` with
the ``benchmark`` NAME, sorted by machine and date. A table holds figures of one run on one machine.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS, TEXTS = ROOT / "benchmarks" / "results", ROOT / "benchmarks" / "pages"
PAGES = ROOT / "doc" / "reference" / "measurements"
NOTICE = "<!-- Made by benchmarks/make_pages.py of benchmarks/results and benchmarks/pages: edit those. -->"


def main() -> int:
    """Writes or checks the pages. Returns 1 if a check fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, and fail where a page differs")
    options = parser.parse_args()
    wanted = pages()
    there = {path.name: path.read_text(encoding="utf-8") for path in PAGES.glob("*.md")}
    if options.check:
        wrong = sorted(name for name in wanted.keys() | there.keys() if wanted.get(name) != there.get(name))
        for name in wrong:
            print(
                f"error: doc/reference/measurements/{name}: is not what benchmarks/make_pages.py makes (hint: run it)"
            )
        return 1 if wrong else 0
    PAGES.mkdir(parents=True, exist_ok=True)
    for name in there.keys() - wanted.keys():
        (PAGES / name).unlink()
    for name, text in wanted.items():
        (PAGES / name).write_text(text, encoding="utf-8")
    return 0


def pages() -> dict[str, str]:
    """Returns the text of every page, by file name."""
    runs: dict[str, list[dict[str, Any]]] = {path.stem: [] for path in TEXTS.glob("*.md") if path.stem != "README"}
    for path in sorted(RESULTS.glob("*.json")):
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["benchmark"] not in runs:
            raise SystemExit(f"error: {path}: there is no benchmarks/pages/{document['benchmark']}.md")
        runs[document["benchmark"]].append(document | {"file": path.name})
    made = {}
    for name, documents in runs.items():
        text = (TEXTS / f"{name}.md").read_text(encoding="utf-8").rstrip()
        made[f"{name}.md"] = "\n\n".join([NOTICE, text, *sections(documents)]) + "\n"
    index = [(TEXTS / "README.md").read_text(encoding="utf-8").rstrip()]
    index.append("\n".join(f"- [{title_of(text)}]({name})" for name, text in sorted(made.items())))
    return made | {"README.md": "\n\n".join([NOTICE, *index]) + "\n"}


def title_of(page: str) -> str:
    """Returns a page's first heading."""
    return next(line.removeprefix("# ") for line in page.splitlines() if line.startswith("# "))


def sections(documents: list[dict[str, Any]]) -> list[str]:
    """Returns a heading for each machine, followed by the results of its runs."""
    parts: list[str] = []
    machine = None
    for document in sorted(documents, key=lambda one: (machine_name(one["machine"]), one["date"] or "", one["file"])):
        if (name := machine_name(document["machine"])) != machine:
            machine = name
            parts.append(f"## {name}")
        parts.append(run_line(document))
        parts += [table(one) for one in document["tables"]]
        if document["notes"]:
            parts.append("\n".join(f"- {note}" for note in document["notes"]))
    return parts


def machine_name(machine: dict[str, Any] | None) -> str:
    """Returns the heading of a machine's figures."""
    if machine is None:
        return "Independent of the machine"
    parts = [machine["gpu"]] if machine["gpu"] else []
    if machine["processor"] or not parts:
        parts.append(machine["processor"] or "Processor not recorded")
    if machine["cores"]:
        parts.append(f"{machine['cores']} {'virtual ' if machine['virtual'] else ''}cores")
    if machine["memory_gib"]:
        parts.append(f"{machine['memory_gib']} GiB")
    parts += [feature for feature in machine["features"] or () if feature not in ("avx2", "avx512f")]
    return ", ".join(parts)


def run_line(document: dict[str, Any]) -> str:
    """Returns the date, versions and command of a run, and the file with its figures."""
    names = {"python": "Python", "torch": "torch", "lerobot": "lerobot", "clp_ros": "clp_ros commit"}
    versions = [f"{names[key]} {value}" for key, value in (document["versions"] or {}).items() if value]
    where = f"[{document['file']}](../../../benchmarks/results/{document['file']})"
    lines = [f"{', '.join([document['date'] or 'Date not recorded', *versions])} ({where}):"]
    if document["command"]:
        lines += ["", "```text", document["command"], "```"]
    return "\n".join(lines)


def table(one: dict[str, Any]) -> str:
    """Returns a table as Markdown."""
    heads = [f"{column} ({unit})" if unit else column for column, unit in one["units"].items()]
    rows = [[one["title"], *heads], ["---"] * (1 + len(heads))]
    rows += [[name, *(cell(values.get(column)) for column in one["units"])] for name, values in one["rows"].items()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def cell(value: float | int | str | None) -> str:
    """Returns a figure with five digits, or a count with all digits."""
    if value is None:
        return ""
    return f"{value:.5g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value


if __name__ == "__main__":
    sys.exit(main())
