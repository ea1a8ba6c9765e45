# SPDX-License-Identifier: Apache-2.0
"""The whole idea on the recorded demonstration: calibrate, prune, verify, drive, compare."""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rich.console import Console

from clp_ros.core.errors import ClpError
from clp_ros.core.files import check_output_folder
from clp_ros.core.resources import resource_path

EMBODIMENT = "aloha_bimanual"
TASK = "transfer_cube"
SAMPLES = 24
# How long the rehearsal is given to end the policy node.
_END_S = 30.0


def run_demo(output: Path, overwrite: bool = False) -> None:
    """Runs every step into a folder: ``base``, ``calibration`` and ``pruned`` appear in it.

    Args:
        output: The folder.
        overwrite: Whether what an earlier demo left there may be replaced.

    Raises:
        ClpError: The folder is not empty, or a step fails.
    """
    from clp_ros import cli
    from clp_ros.evaluation.benchmark import benchmark
    from clp_ros.report.tables import comparison_table

    check_output_folder(output, overwrite)
    bag = resource_path(f"rosbags/{EMBODIMENT}")
    base, calibration, pruned = (output / name for name in ("base", "calibration", "pruned"))
    again = ["--overwrite"] if overwrite else []
    console = Console()

    def clp(*arguments: str | Path) -> None:
        words = [str(argument) for argument in arguments]
        console.print(f"$ clp {' '.join(words)}", style="dim", highlight=False, soft_wrap=True)
        cli.run([*words, *again] if words[0] != "verify" else words)

    with _step(console, "1. A SmolVLA with random weights, the real classes, made small (no model hub is asked)"):
        clp("make-checkpoint", "--family", "smolvla", "--size", "tiny", "--embodiment", EMBODIMENT, "--output", base)
    with _step(console, "2. Calibrate: the recorded demonstration through it once, and how alike its layers are"):
        clp(
            *("calibrate", "--checkpoint", base, "--bag", bag, "--embodiment", EMBODIMENT, "--task", TASK),
            *("--samples", str(SAMPLES), "--output", calibration),
        )
    with _step(console, "3. Prune: the checkpoint without its redundant layers"):
        clp("prune", "--checkpoint", base, "--calibration", calibration, "--output", pruned)
    with _step(console, "4. Verify: stock lerobot loads it strictly and runs it"):
        clp("verify", pruned)
    with _step(console, "5. Drive: the demonstration, replayed in real time over DDS, into the policy node"):
        _drive(console, pruned, bag)
    with _step(console, "6. Compare"):
        result = benchmark([base, pruned], device="cpu", runs=10)
        console.print(comparison_table(result["checkpoints"], title="Base beside pruned, on this CPU"))
    console.print(f"\nHeatmaps: {calibration}/heatmap_vlm.png, {calibration}/heatmap_expert.png")
    console.print(f"The whole report: {calibration}/report.html")


@contextmanager
def _step(console: Console, title: str) -> Iterator[None]:
    console.rule(f"[bold]{title}", align="left")
    start = time.monotonic()
    yield
    console.print(f"({time.monotonic() - start:.1f} s)", style="dim", highlight=False)


def _drive(console: Console, checkpoint: Path, bag: Path) -> None:
    if importlib.util.find_spec("rclpy") is None:
        console.print("skipped: rclpy is not installed here")
        return
    environment = dict(os.environ)
    # A domain of its own on this machine alone: a demo must not talk to a robot in the house.
    # Up to 101, above which DDS would use ports that Linux gives to any program.
    environment["ROS_DOMAIN_ID"] = str(60 + secrets.randbelow(42))
    environment["ROS_AUTOMATIC_DISCOVERY_RANGE"] = "LOCALHOST"
    command = [sys.executable, "-m", "clp_ros.nodes.rehearsal", "--checkpoint", str(checkpoint.absolute())]
    command += ["--bag", str(bag), "--embodiment", EMBODIMENT, "--task", TASK]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        printed, log = process.communicate()
    except BaseException:  # Ctrl-C, and to this process alone: not killed, for it has to end the policy node
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(_END_S)
        raise
    if process.returncode:
        said = (log.strip().splitlines() or ["it said nothing"])[-1]
        raise ClpError(f"the policy node could not be driven: {said.removeprefix('error: ')}")
    result = json.loads(printed.strip().splitlines()[-1])
    console.print(f"{result['seconds']:.1f} s of demonstration played")
    for name, got in result["controllers"].items():
        console.print(f"  {name}: {got['trajectories']} trajectories of up to {got['points']} points")
    if not all(got["trajectories"] for got in result["controllers"].values()):
        raise ClpError("a controller got no trajectory", where="/policy", fix=f"see its log: {log[-2000:]}")
