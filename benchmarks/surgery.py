# SPDX-License-Identifier: Apache-2.0
"""Compares pruning a full-size checkpoint with `cp` of as many bytes: wall time and peak memory.

    python benchmarks/surgery.py [CHECKPOINT] [--family smolvla] [--runs 9] [--scratch FOLDER]

Without a checkpoint, a full-size one of the family with random weights is made first. For SmolVLA, it has 0.9 GB; with
its two copies, the scratch folder needs 2.3 GB. All are removed at the end. The layers of the paper's Table 5 are
pruned. For a family or a depth that is not in the table, the last layers are pruned, as many as the default share and
the structure allow.

Each run times the following in turn, with the input in the page cache and no data left to write back:
  prune   a fresh interpreter that imports clp_ros.pruning.surgery and prunes, from its start to its exit
  inside  the call of prune_checkpoint alone, within that process
  cp      `cp -r` of a folder of as many bytes: the pruned checkpoint itself
Memory is the process's peak resident set minus that of an idle interpreter.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from results import Table, Value, add_output_argument, write_results

from clp_ros.checkpoints.layer_stack import group_units
from clp_ros.core.files import atomic_folder
from clp_ros.policies.checkpoint import Checkpoint
from clp_ros.pruning.selection import allowed_budgets, criterion_scores, select_units
from clp_ros.pruning.surgery import plan_surgery

# arXiv 2606.20246v2, Table 5: the layers each stack has, and those that go. π0.5 is not in it: π0's.
TABLE_5 = {
    "smolvla": {"expert": (16, [1, 2, 5, 6, 14, 15])},
    "pi0": {"expert": (18, [1, 2, 4, 6, 8, 9])},
    "pi05": {"expert": (18, [1, 2, 4, 6, 8, 9])},
    "groot": {
        "llm": (12, [3, 4, 5, 6, 7, 8, 9]),
        "vl_self_attention": (4, [2]),
        "dit": (16, [1, 2, 4, 5, 6, 7, 10, 11]),
    },
}

_PRUNE = """
import json, sys, time
from pathlib import Path
from clp_ros.pruning.surgery import prune_checkpoint
start = time.perf_counter()
manifest = prune_checkpoint(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
seconds = time.perf_counter() - start
# Not getrusage: its maximum is handed down by the process that started this one.
peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
print(json.dumps({"seconds": seconds, "peak": peak, "parameters": manifest["parameters"]}))
"""
_BARE = """
print(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
"""


def _timed(target: Path, repeat: int, *command: str | Path) -> tuple[float, str]:
    """Returns the seconds of a command that makes the folder ``target``, and its output.

    The last of ``repeat`` runs counts. The first run allocates the memory, because a virtual machine receives memory
    from its host at the first use.
    """
    # With cached bytecode, as in an installed package.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    for _ in range(repeat):
        shutil.rmtree(target, ignore_errors=True)
        os.sync()
        start = time.perf_counter()
        output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
        seconds = time.perf_counter() - start
    return seconds, output


def _evict(folder: Path) -> None:
    """Removes all files from the page cache."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _warm(folder: Path, ranges: Iterable[tuple[str, int, int]]) -> None:
    """Loads only these byte ranges of a folder's files into the page cache.

    They are read from the disk, because pages that were just written are arranged differently.
    """
    _evict(folder)
    for name, start, end in ranges:
        with (folder / name).open("rb", buffering=0) as file:
            file.seek(start)
            while start < end:
                start += len(file.read(min(end - start, 2**24)))


def _whole(folder: Path) -> list[tuple[str, int, int]]:
    return [(name, 0, size) for name, size in Checkpoint.open(folder).files.items()]


def _available() -> int:
    return int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]) * 1024


def _removal(checkpoint: Checkpoint) -> dict[str, list[int]]:
    table = TABLE_5.get(checkpoint.family.name, {})
    if table and all(checkpoint.layers[name] == layers for name, (layers, _) in table.items()):
        return {name: removed for name, (_, removed) in table.items()}
    # Not in Table 5: the last layers, as many as the default share.
    removal: dict[str, list[int]] = {}
    budgets = checkpoint.family.default_budget(checkpoint.config)
    for group, units in group_units(checkpoint.layer_stacks).items():
        budget = max(size for size in allowed_budgets(units) if size <= budgets[group])
        removed, _ = select_units(criterion_scores("keep-first", units.count), budget, units)
        removal[next(stack.name for stack in checkpoint.layer_stacks if stack.group == group)] = list(removed)
    return removal


def _make_checkpoint(family: str, folder: Path) -> None:
    from clp_ros.policies.features import LIBERO
    from clp_ros.policies.registry import family_named

    with atomic_folder(folder) as temporary:
        family_named(family).make_checkpoint("full", temporary, folder, LIBERO, 0)


def measure(source: Path, scratch: Path, runs: int) -> dict[str, Any]:
    """Measures pruning and copying.

    Args:
        source: A checkpoint folder.
        scratch: An empty folder on the same disk.
        runs: Number of runs of each.

    Returns:
        Seconds, ratios, memory in MiB, bytes and parameters.
    """
    prune = (sys.executable, "-c", _PRUNE, source)
    removal = _removal(Checkpoint.open(source))
    given = json.dumps(removal)
    pruned, copied, reference = scratch / "pruned", scratch / "copied", scratch / "reference"
    subprocess.run([*prune, reference, given], check=True, stdout=subprocess.DEVNULL)
    kept = [piece[:3] for piece in plan_surgery(Checkpoint.open(source), removal).pieces()]
    roomy = (
        6 * Checkpoint.open(reference).nbytes < _available()
    )  # otherwise only what the next command reads is in the page cache
    repeat = 2 if roomy else 1
    if roomy:
        _warm(source, kept)
        _warm(reference, _whole(reference))
    seconds: dict[str, list[float]] = {"prune": [], "inside": [], "cp": []}
    peaks = []
    for run in range(runs):
        for job in ("prune", "cp") if run % 2 else ("cp", "prune"):
            if not roomy:
                _evict(source if job == "cp" else reference)
                _warm(*((reference, _whole(reference)) if job == "cp" else (source, kept)))
            if job == "cp":
                seconds["cp"].append(_timed(copied, repeat, "cp", "-r", reference, copied)[0])
                shutil.rmtree(copied)
                continue
            whole, output = _timed(pruned, repeat, *prune, pruned, given)
            shutil.rmtree(pruned)
            report = json.loads(output)
            seconds["prune"].append(whole)
            seconds["inside"].append(report["seconds"])
            peaks.append(report["peak"])
    bare = int(subprocess.run([sys.executable, "-c", _BARE], check=True, capture_output=True, text=True).stdout)
    medians = {job: statistics.median(times) for job, times in seconds.items()}
    fastest = {job: min(times) for job, times in seconds.items()}
    return {
        "bytes": Checkpoint.open(reference).nbytes,
        "removed": removal,
        "all_seconds": seconds,
        "seconds": medians,
        "fastest_seconds": fastest,
        "ratios": {job: medians[job] / medians["cp"] for job in ("prune", "inside")},
        "fastest_ratios": {job: fastest[job] / fastest["cp"] for job in ("prune", "inside")},
        "peak_mib_above_interpreter": (max(peaks) - bare) / 1024,
        "parameters": report["parameters"],
    }


def table(result: dict[str, Any]) -> Table:
    """Returns the table of the results."""
    units = {
        "median": "s",
        "median / cp": None,
        "fastest": "s",
        "fastest / cp": None,
        "peak above an interpreter": "MiB",
    }
    rows: dict[str, dict[str, Value]] = {}
    for job, name in (("cp", "`cp -r`"), ("inside", "pruning, the call"), ("prune", "pruning, the process")):
        rows[name] = {"median": result["seconds"][job], "fastest": result["fastest_seconds"][job]}
        if job != "cp":
            rows[name] |= {"median / cp": result["ratios"][job], "fastest / cp": result["fastest_ratios"][job]}
    rows["pruning, the process"]["peak above an interpreter"] = result["peak_mib_above_interpreter"]
    return Table("way", units, rows)


def main() -> None:
    """Runs the benchmark and prints it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", type=Path, help="checkpoint folder (default: one is made)")
    parser.add_argument(
        "--family", default="smolvla", help="family of the checkpoint that is made (default: %(default)s)"
    )
    parser.add_argument("--runs", type=int, default=9, help="number of runs of each")
    parser.add_argument("--scratch", type=Path, help="folder for the copies (default: the system's temporary folder)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_output_argument(parser)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="clp_surgery_", dir=arguments.scratch) as scratch:
        source = arguments.checkpoint or Path(scratch, "base")
        if arguments.checkpoint is None:
            _make_checkpoint(arguments.family, source)
        result = measure(source.resolve(), Path(scratch), arguments.runs)
    write_results(arguments.output, [table(result)], [f"{result['bytes'] / 1e6:.0f} MB are written."])
    if arguments.json:
        print(json.dumps(result))
        return
    print(f"pruned checkpoint: {result['bytes'] / 1e6:.1f} MB, removed {result['removed']}, {result['parameters']}")
    for job, times in result["all_seconds"].items():
        print(f"{job:8} {' '.join(f'{one:.3f}' for one in times)} s")
    for kind, label in (("", "median"), ("fastest_", "fastest")):
        times, ratios = result[f"{kind}seconds"], result[f"{kind}ratios"]
        print(
            f"{label:8} cp {times['cp']:.3f} s   prune, the whole process {times['prune']:.3f} s "
            f"= {ratios['prune']:.2f} x cp   the call alone {times['inside']:.3f} s = {ratios['inside']:.2f} x cp"
        )
    print(f"peak memory above the interpreter's: {result['peak_mib_above_interpreter']:.1f} MiB")
    print("goals: 1.2 x cp, 300 MiB")


if __name__ == "__main__":
    main()
