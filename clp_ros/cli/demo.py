# SPDX-License-Identifier: Apache-2.0
"""Runs the demo and prints each step with its result and duration."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import Any

from clp_ros.cli import commands
from clp_ros.cli.output import print_line, print_notes, stdout_console
from clp_ros.jobs import benchmark, calibrate, demo, make_checkpoint, prune, verify
from clp_ros.jobs.progress import Progress
from clp_ros.jobs.request import Request

# By request: its command, and the field that is a positional argument of the command.
_COMMANDS: dict[type[Request], tuple[str, str]] = {
    make_checkpoint.MakeCheckpointRequest: ("make-checkpoint", ""),
    calibrate.CalibrateRequest: ("calibrate", ""),
    prune.PruneRequest: ("prune", ""),
    verify.VerifyRequest: ("verify", "checkpoint"),
    benchmark.BenchmarkRequest: ("benchmark", "checkpoints"),
}
# Fields whose options have other names.
_OPTIONS = {"bags": "bag"}


class _Steps(Progress):
    def __init__(self) -> None:
        self._console = stdout_console()
        self._began = time.monotonic()

    def stage(self, title: str, unit: str = "") -> None:
        self._began = time.monotonic()
        self._console.rule(f"[bold]{title}", align="left")

    def request(self, request: Any) -> None:
        words = shlex.join(command_words(request))
        self._console.print(f"$ clp {words}", style="dim", highlight=False, soft_wrap=True)

    def result(self, result: Any) -> None:
        if isinstance(result, make_checkpoint.MakeCheckpointResult):
            commands.print_made(result, "tiny")
        elif isinstance(result, calibrate.CalibrateResult):
            commands.print_calibration(result, result.output)
        elif isinstance(result, prune.PruneResult):
            print_notes(result.plan)
            commands.print_removal(result, result.output)
        elif isinstance(result, verify.VerifyResult):
            commands.print_verification(result, result.path)
        elif isinstance(result, demo.DriveResult):
            _print_drive(result)
        elif isinstance(result, benchmark.BenchmarkResult):
            commands.print_comparison(result, title="Base beside pruned, on this CPU")
        self._console.print(f"({time.monotonic() - self._began:.1f} s)", style="dim", highlight=False)


def command_words(request: Request) -> list[str]:
    """Returns the command line after ``clp`` that is equivalent to a request of a demo's step."""
    command, given = _COMMANDS[type(request)]
    words = [command]
    for field, value in request:
        if field not in request.model_fields_set or value is False:
            continue
        if field != given:
            words.append(f"--{_OPTIONS.get(field, field)}")
        if value is not True:
            words += map(str, value if isinstance(value, tuple) else [value])
    return words


def _print_drive(result: demo.DriveResult) -> None:
    if result.seconds is None:
        print_line("skipped: rclpy is not installed here")
        return
    print_line(f"{result.seconds:.1f} s of demonstration played")
    for name, sent in result.controllers.items():
        print_line(f"  {name}: {sent['trajectories']} trajectories of up to {sent['points']} points")


def run_demo(output: Path, overwrite: bool = False) -> None:
    """Runs the demo and prints it.

    Raises:
        ClpError: The folder is not empty, or a step fails.
    """
    demo.run(demo.DemoRequest(output=output, overwrite=overwrite), _Steps())
    folder = output / "calibration"
    print_line(f"\nHeatmaps: {folder}/heatmap_vlm.png, {folder}/heatmap_expert.png")
    print_line(f"The whole report: {folder}/report.html")
