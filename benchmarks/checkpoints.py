# SPDX-License-Identifier: Apache-2.0
"""Records parameters, GFLOPs, latency and memory of checkpoints as results.

    python benchmarks/checkpoints.py BASE PRUNED ... [options of clp benchmark] --output FILE.json

Runs ``clp benchmark --json`` with the same arguments. All figures come from this command.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from results import Table, add_output_argument, write_results

# Key in the command's JSON -> (column, unit, the unit's size).
COLUMNS = {
    "parameters": ("parameters", "M", 1e6),
    "parameters_tied": ("parameters, tied ones once", "M", 1e6),
    "trainable": ("trainable", "M", 1e6),
    "gflops": ("work of a chunk", "GFLOP", 1),
    "latency_ms": ("latency", "ms", 1),
    "latency_p90_ms": ("latency, 90th percentile", "ms", 1),
    "train_step_ms": ("training step", "ms", 1),
    "peak_memory": ("peak memory", "GB", 1e9),
    "bytes": ("checkpoint", "GB", 1e9),
}


def main() -> int:
    """Runs the command, prints its JSON and writes the results; returns its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="All other arguments are passed to clp benchmark."
    )
    add_output_argument(parser)
    options, arguments = parser.parse_known_args()
    command = [sys.executable, "-m", "clp_ros.cli", "benchmark", *arguments, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        return done.returncode
    print(done.stdout, end="")
    measured = json.loads(done.stdout)["checkpoints"]
    there = [key for key in COLUMNS if any(one.get(key) is not None for one in measured)]
    table = Table("checkpoint", {COLUMNS[key][0]: COLUMNS[key][1] for key in there})
    for one in measured:
        table.rows[Path(one["path"]).name] = {
            COLUMNS[key][0]: one[key] / COLUMNS[key][2] for key in there if one.get(key) is not None
        }
    notes = [f"Weights are {one['dtype']}; {one['threads']} threads." for one in measured[:1] if "threads" in one]
    write_results(options.output, [table], notes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
