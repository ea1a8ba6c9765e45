# SPDX-License-Identifier: Apache-2.0
"""Runs all steps on the recorded demonstration: calibrate, prune, verify, drive, compare."""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import Field

from clp_ros.core.errors import ClpError
from clp_ros.core.files import check_output_folder
from clp_ros.core.resources import resource_path
from clp_ros.jobs import benchmark, calibrate, make_checkpoint, prune, verify
from clp_ros.jobs.progress import SILENT, Progress
from clp_ros.jobs.request import FilePath, Request, Result

EMBODIMENT = "aloha_bimanual"
TASK = "transfer_cube"
SAMPLES = 24
# Seconds that the rehearsal has to end the policy node.
_END_S = 30.0


class DemoRequest(Request):
    """Asks for the demo.

    Attributes:
        output: The folder for ``base``, ``calibration`` and ``pruned``.
        overwrite: Whether results of an earlier demo may be replaced.
    """

    output: FilePath
    overwrite: bool = False


class DriveResult(Result):
    """The trajectories that the policy node sent while the demonstration was played.

    Attributes:
        seconds: Length of the demonstration; None if ROS is not installed and the step was skipped.
        controllers: By controller, the number of ``trajectories`` and the maximum number of ``points``.
    """

    seconds: float | None
    controllers: dict[str, dict[str, int]] = Field(default_factory=dict)


class DemoResult(Result):
    """The results of all steps.

    Attributes:
        output: The folder.
        calibration: The calibration.
        pruned: The removed layers.
        drive: The trajectories that the policy node sent.
        comparison: The measurements of the base and the pruned checkpoint.
    """

    output: Path
    calibration: calibrate.CalibrateResult
    pruned: prune.PruneResult
    drive: DriveResult
    comparison: benchmark.BenchmarkResult


def run(request: DemoRequest, progress: Progress = SILENT) -> DemoResult:
    """Runs every step. Each step's Request and Result are reported to ``progress``.

    Raises:
        ClpError: The folder is not empty, or a step fails.
    """
    check_output_folder(request.output, request.overwrite)
    bag = resource_path(f"rosbags/{EMBODIMENT}")
    base, calibration, pruned = (request.output / name for name in ("base", "calibration", "pruned"))
    again = request.overwrite

    def part(job: Any, asked: Request) -> Any:
        progress.request(asked)
        result = job.run(asked)
        progress.result(result)
        return result

    progress.stage("1. A SmolVLA with random weights, the real classes, made small (no model hub is asked)")
    part(
        make_checkpoint,
        make_checkpoint.MakeCheckpointRequest(
            family="smolvla", size="tiny", embodiment=EMBODIMENT, output=base, overwrite=again
        ),
    )
    progress.stage("2. Calibrate: the recorded demonstration through it once, and how alike its layers are")
    to_calibrate = calibrate.CalibrateRequest(
        checkpoint=base,
        bags=(bag,),
        embodiment=EMBODIMENT,
        task=TASK,
        samples=SAMPLES,
        output=calibration,
        overwrite=again,
    )
    calibrated = part(calibrate, to_calibrate)
    progress.stage("3. Prune: the checkpoint without its redundant layers")
    removed = part(prune, prune.PruneRequest(checkpoint=base, calibration=calibration, output=pruned, overwrite=again))
    progress.stage("4. Verify: stock lerobot loads it strictly and runs it")
    part(verify, verify.VerifyRequest(checkpoint=pruned))
    progress.stage("5. Drive: the demonstration, replayed in real time over DDS, into the policy node")
    driven = _drive(pruned, bag)
    progress.result(driven)
    progress.stage("6. Compare")
    compared = part(benchmark, benchmark.BenchmarkRequest(checkpoints=(base, pruned), device="cpu"))
    return DemoResult(output=request.output, calibration=calibrated, pruned=removed, drive=driven, comparison=compared)


def _drive(checkpoint: Path, bag: Path) -> DriveResult:
    if importlib.util.find_spec("rclpy") is None:
        return DriveResult(seconds=None)
    environment = dict(os.environ)
    # A separate domain on this machine only, because a demo must not command a robot in the network. Up to 101, because
    # higher domains use ports that Linux assigns to other programs.
    environment["ROS_DOMAIN_ID"] = str(60 + secrets.randbelow(42))
    environment["ROS_AUTOMATIC_DISCOVERY_RANGE"] = "LOCALHOST"
    command = [sys.executable, "-m", "clp_ros.nodes.rehearsal", "--checkpoint", str(checkpoint.absolute())]
    command += ["--bag", str(bag), "--embodiment", EMBODIMENT, "--task", TASK]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        printed, log = process.communicate()
    except BaseException:  # such as Ctrl-C; the process is terminated, not killed, because it must end the policy node
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(_END_S)
        raise
    if process.returncode:
        said = (log.strip().splitlines() or ["no output"])[-1]
        raise ClpError(
            f"the policy node could not be driven: {said.removeprefix('error: ')}",
            where=checkpoint,
        )
    result = json.loads(printed.strip().splitlines()[-1])
    driven = DriveResult(seconds=result["seconds"], controllers=result["controllers"])
    if not all(sent["trajectories"] for sent in driven.controllers.values()):
        raise ClpError("a controller received no trajectory", where="/policy", hint=f"read its log: {log[-2000:]}")
    return driven
