# SPDX-License-Identifier: Apache-2.0
"""What the policy node says of itself on /diagnostics."""

from __future__ import annotations

from clp_ros.control.inputs import LiveInputs
from clp_ros.control.runner import ChunkRunner

# See ChunkRunner.statistics.
COUNTS = (
    *("chunks", "safe stops", "late", "dropped stale", "dropped deactivated"),
    *("refused", "policy errors", "limits hit"),
)


def report_values(runner: ChunkRunner, inputs: LiveInputs, now_ns: int) -> dict[str, object]:
    """Rates and ages of the inputs, counts, and median and 99th percentile of what is measured, each with its unit."""
    values: dict[str, object] = {}
    for topic, its in inputs.states(now_ns).items():
        values[f"{topic} rate (Hz)"] = its.rate_hz
        values[f"{topic} age (ms)"] = "none yet" if its.age_ms is None else its.age_ms
        values[f"{topic} dropped"] = its.dropped
        if its.refused is not None:
            values[f"{topic} refused"] = its.refused
    counts = runner.statistics.counts()
    values |= {name: counts[name] for name in COUNTS}
    values["faults"] = runner.faults
    for name, spread in runner.statistics.spreads().items():
        quantity, _, unit = name.removesuffix(")").partition(" (")
        values[f"{quantity} p50 ({unit or 'ms'})"] = spread.p50
        values[f"{quantity} p99 ({unit or 'ms'})"] = spread.p99
    return values
