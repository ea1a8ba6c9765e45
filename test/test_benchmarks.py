# SPDX-License-Identifier: Apache-2.0
"""The results of record: their form, the pages made of them, and the record of chunk control against its raw rows."""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
KEYS = {"schema_version", "benchmark", "date", "command", "machine", "versions", "tables", "notes"}
MACHINE = {"processor", "cores", "memory_gib", "features", "gpu", "virtual"}
VERSIONS = {"python", "torch", "lerobot", "clp_ros"}


def run_script(name: str, *arguments: str | Path) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "benchmarks" / name, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def test_measurement_pages_are_what_the_script_makes() -> None:
    made = run_script("make_pages.py", "--check")
    assert made.returncode == 0, made.stdout + made.stderr


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_a_result_of_record_is_complete(path: Path) -> None:
    document = read(path)
    assert document.keys() == KEYS
    assert document["schema_version"] == 1
    if document["date"] is not None:
        datetime.date.fromisoformat(document["date"])
    assert document["machine"] is None or document["machine"].keys() == MACHINE
    assert document["versions"] is None or document["versions"].keys() == VERSIONS
    assert document["tables"]
    for table in document["tables"]:
        assert table["rows"]
        assert all(row.keys() <= table["units"].keys() for row in table["rows"].values())


@pytest.mark.parametrize(("record", "lag"), [("chunk_control", "0"), ("chunk_control_lag", "40")])
def test_the_record_of_chunk_control_is_the_summary_of_its_raw_rows(record: str, lag: str, tmp_path: Path) -> None:
    rows, output = RESULTS / "chunk_control.jsonl", tmp_path / "record.json"
    done = run_script("chunk_control.py", "--summary", "--worst", "--lag", lag, "--results", rows, "--output", output)
    assert output.exists(), done.stderr
    made = read(output)
    assert made["tables"] == read(RESULTS / f"{record}.json")["tables"]
    assert made["command"].startswith("python benchmarks/chunk_control.py --summary")
    assert str(tmp_path) not in output.read_text()
