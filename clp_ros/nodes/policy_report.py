# SPDX-License-Identifier: Apache-2.0
"""The policy node's report on /diagnostics."""

from __future__ import annotations

from clp_ros.control.inputs import LiveInputs
from clp_ros.control.runner import ChunkRunner
from clp_ros.nodes.diagnostics import Level, Report

# See ChunkRunner.statistics.
COUNTS = (
    *("chunks", "safe stops", "late", "dropped stale", "dropped deactivated"),
    *("refused", "policy errors", "limits hit"),
)


def node_report(
    state: str, fault: str | None, runner: ChunkRunner | None, inputs: LiveInputs | None, now_ns: int, dry_run: bool
) -> Report:
    """Returns the policy node's report.

    Args:
        state: The lifecycle's state.
        fault: Why the node could not be configured or activated, or gave up; None otherwise.
        runner: The runner; None while the node is not configured.
        inputs: The robot's messages; None while the node is not configured.
        now_ns: The time.
        dry_run: Whether trajectories go to the preview topic only.
    """
    if runner is None or inputs is None:
        if fault is not None:
            return Report(Level.ERROR, f"{state}: {fault}")
        return Report(Level.OK, "loading the policy" if state == "configuring" else state)
    values: dict[str, object] = {
        "state": state,
        "instruction": runner.instruction,
        "speed scaling": "not published" if runner.speed_scaling is None else runner.speed_scaling,
        "dry run": dry_run,
    }
    values |= _measured(runner, inputs, now_ns)
    if runner.stopped:
        return Report(Level.WARN, "stopped by ~/stop", values)
    if state == "inactive" and fault is not None:
        return Report(Level.ERROR, f"not activated: {fault}", values)
    if state == "active" and runner.fault_reason is not None:
        return Report(Level.WARN, f"safe stop: {runner.fault_reason}", values)
    return Report(Level.OK, state, values)


def _measured(runner: ChunkRunner, inputs: LiveInputs, now_ns: int) -> dict[str, object]:
    """Returns rates and ages of the inputs, counts, and median and 99th percentile of each measured quantity."""
    values: dict[str, object] = {}
    for topic, state in inputs.states(now_ns).items():
        values[f"{topic} rate (Hz)"] = state.rate_hz
        values[f"{topic} age (ms)"] = "none yet" if state.age_ms is None else state.age_ms
        values[f"{topic} dropped"] = state.dropped
        if state.refused is not None:
            values[f"{topic} refused"] = state.refused
    counts = runner.statistics.counts()
    values |= {name: counts[name] for name in COUNTS}
    values["faults"] = runner.faults
    for name, spread in runner.statistics.spreads().items():
        quantity, _, unit = name.removesuffix(")").partition(" (")
        values[f"{quantity} p50 ({unit or 'ms'})"] = spread.p50
        values[f"{quantity} p99 ({unit or 'ms'})"] = spread.p99
    return values
