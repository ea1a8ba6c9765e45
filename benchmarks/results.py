# SPDX-License-Identifier: Apache-2.0
"""Writes recorded results: one JSON file for each run, with machine, versions, command and figures.

Every benchmark takes ``--output FILE.json``. ``benchmarks/make_pages.py`` makes doc/reference/measurements of all files
in ``benchmarks/results``.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SCHEMA_VERSION = 1
# Instructions that determine the speed of matrix products.
FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16")

Value = float | int | str | None


@dataclass(frozen=True)
class Table:
    """Figures of one run.

    Attributes:
        title: Heading of the first column.
        units: The unit of each column, None where it has none.
        rows: Figures by row and column. A missing figure is shown as an empty cell.
    """

    title: str
    units: dict[str, str | None]
    rows: dict[str, dict[str, Value]] = field(default_factory=dict)


def add_output_argument(parser: argparse.ArgumentParser) -> None:
    """Adds ``--output`` to a benchmark's options."""
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write the results to this file")


def write_results(
    output: Path | None, tables: list[Table], notes: list[str] | None = None, *, on_machine: bool = True
) -> None:
    """Writes the results of this run; does nothing without an output.

    Args:
        output: The file to write. An existing one is replaced.
        tables: The figures.
        notes: Sentences that are needed to understand the figures.
        on_machine: Whether the figures depend on the machine; counts and simulated time do not.
    """
    if output is None:
        return
    script, *arguments = sys.argv
    document = {
        "schema_version": SCHEMA_VERSION,
        "benchmark": Path(script).stem,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": shlex.join(["python", f"benchmarks/{Path(script).name}", *given(arguments)]),
        "machine": machine() if on_machine else None,
        "versions": versions(),
        "tables": [asdict(table) for table in tables],
        "notes": notes or [],
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def given(arguments: list[str]) -> list[str]:
    """Returns a command's arguments without ``--output FILE``, with the last part of absolute paths."""
    kept, skip = [], False
    for argument in arguments:
        if not skip and argument != "--output" and not argument.startswith("--output="):
            kept.append(Path(argument).name if argument.startswith("/") else argument)
        skip = argument == "--output"
    return kept


def machine() -> dict[str, Any]:
    """Returns the processor, its cores and features, the memory (GiB), the GPU, and whether it is a virtual machine."""
    fields: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    processor = fields.get("model name", platform.machine())
    if "cpu family" in fields:  # a virtual machine's model name may be of all generations
        processor += f" (family {fields['cpu family']}, model {fields['model']})"
    return {
        "processor": processor,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "features": [name for name in FEATURES if name in flags],
        "gpu": gpu(),
        "virtual": "hypervisor" in flags,
    }


def gpu() -> str | None:
    """Returns the name of the first CUDA device, if there is one."""
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None


def versions() -> dict[str, str | None]:
    """Returns the versions of python, torch and lerobot, and the commit of clp_ros (with ``+`` for changed files)."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("torch", "lerobot"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found | {"clp_ros": commit()}


def commit() -> str | None:
    """Returns the commit of the benchmark's files; None outside a git checkout."""
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], check=True, capture_output=True, text=True).stdout
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"], check=True, capture_output=True, text=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.strip() + "+" * bool(changed.strip())
