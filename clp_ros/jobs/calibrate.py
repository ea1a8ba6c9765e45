# SPDX-License-Identifier: Apache-2.0
"""Runs a policy on demonstrations, compares the hidden states of its layers, and writes a calibration folder."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import Field

from clp_ros.core import processes
from clp_ros.core.errors import ClpError
from clp_ros.jobs.progress import SILENT, Progress
from clp_ros.jobs.request import FilePath, FilePaths, Request, Result, Seed

if TYPE_CHECKING:
    from clp_ros.calibration.calibration_file import Calibration
    from clp_ros.policies.lerobot_policy import LeRobotPolicy
    from clp_ros.policies.statistics import Statistics
    from clp_ros.robots.embodiment import Embodiment


class CalibrateRequest(Request):
    """Asks for a calibration.

    Attributes:
        checkpoint: Checkpoint folder, or a Hub repository.
        output: Calibration folder to write.
        embodiment: The robot: a name under config/embodiments, or a YAML file.
        task: The instruction: a name under config/tasks, a YAML file, or the sentence itself. None: each bag's
            ``instruction`` in the file ``episodes.csv`` beside it.
        bags: rosbag2 recordings, one episode each. Empty: ``live`` of :func:`run` provides the frames.
        samples: Number of frames.
        seed: Seed of the drawn frames, and of each frame's noise and time.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        dtype: ``auto`` (as lerobot loads it) or ``float32``.
        statistics: A LeRobotDataset's folder, or ``bags``; None: the checkpoint's own statistics.
        tf_prefix: Prefix for the name of every joint.
        topics: Other topic names, by their entry in the embodiment.
        command: The next command, shown in the report; None: ``clp prune …`` for this checkpoint.
        overwrite: Whether an output folder that is not empty is replaced.
    """

    checkpoint: FilePath
    output: FilePath
    embodiment: str | FilePath
    task: str | None = None
    bags: FilePaths = ()
    samples: Annotated[int, Field(ge=1)] = 64
    seed: Seed = 0
    device: str = "auto"
    dtype: str = "auto"
    statistics: str | None = None
    tf_prefix: str = ""
    topics: dict[str, str] = Field(default_factory=dict)
    command: str | None = None
    overwrite: bool = False


class CalibrateResult(Result):
    """The calibration.

    Attributes:
        output: Its folder, absolute.
        meta: calibration.json.
        suggested: 0-based layers that pruning removes by default, by layer stack.
        command: The next command.
        calibration: The scores: :class:`clp_ros.calibration.calibration_file.Calibration`.
        plan: The removal sets: :class:`clp_ros.pruning.plan.Plan`.
    """

    output: Path
    meta: dict[str, Any]
    suggested: dict[str, tuple[int, ...]]
    command: str = Field(default="", exclude=True)
    calibration: Any = Field(default=None, exclude=True)
    plan: Any = Field(default=None, exclude=True)

    def to_json(self) -> dict[str, Any]:
        """Returns the output folder, all of calibration.json, and the layers that pruning would remove."""
        return {"output": str(self.output), **self.meta, "suggested": {k: list(v) for k, v in self.suggested.items()}}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        """See :meth:`Result.from_json`."""
        meta = {name: value for name, value in document.items() if name not in ("output", "suggested")}
        return super().from_json({"output": document["output"], "suggested": document["suggested"], "meta": meta})


def run(
    request: CalibrateRequest,
    progress: Progress = SILENT,
    live: Callable[[LeRobotPolicy, Embodiment, str, Statistics | str | None], Calibration] | None = None,
) -> CalibrateResult:
    """Calibrates in all processes that torchrun or accelerate started. The first process writes the folder.

    Args:
        request: The request.
        progress: Receives the progress, in the first process only.
        live: Calibrates on frames of a live robot if the request has no bags. Called with the policy, the robot, the
            instruction and the statistics.

    Raises:
        ClpError: The checkpoint, the bags and the robot do not fit each other, or the output folder is not empty.
        FailedElsewhereError: Another process has failed.
    """
    with processes.together():
        return _run(request, progress if processes.rank() == 0 else SILENT, live)


def _run(
    request: CalibrateRequest,
    progress: Progress,
    live: Callable[[LeRobotPolicy, Embodiment, str, Statistics | str | None], Calibration] | None,
) -> CalibrateResult:
    from clp_ros.calibration.calibrate import given_statistics
    from clp_ros.core.files import check_apart, check_output_folder
    from clp_ros.policies.loading import load_policy
    from clp_ros.pruning.plan import default_plan
    from clp_ros.report.calibration_report import write_calibration
    from clp_ros.robots.embodiment import load_embodiment

    check_apart(request.output, [request.checkpoint, *request.bags])
    check_output_folder(request.output, request.overwrite)
    embodiment = load_embodiment(request.embodiment, request.tf_prefix, request.topics)
    tasks = _tasks(request, embodiment)  # before the policy is loaded, which takes long
    statistics = given_statistics(request.statistics)
    progress.stage("loading the policy")
    policy = load_policy(request.checkpoint, processes.local_device(request.device), request.dtype, mapped=True)
    if live is not None and not request.bags:
        calibration = live(policy, embodiment, tasks[0], statistics)
    else:
        calibration = _calibrate_bags(request, policy, embodiment, tasks, statistics, progress)
    plan = default_plan(calibration, policy.checkpoint)
    words = ("clp", "prune", "--checkpoint", request.checkpoint, "--calibration", request.output)
    command = request.command or shlex.join([*map(str, words), "--output", f"{request.output}_pruned"])
    if processes.rank() == 0:
        progress.stage("writing the folder")
        shown: Mapping[str, Any] = plan.report()
        write_calibration(calibration, request.output, shown, command=command, overwrite=request.overwrite)
    return CalibrateResult(
        output=request.output.absolute(),
        meta=calibration.meta,
        suggested=plan.removal,
        command=command,
        calibration=calibration,
        plan=plan,
    )


def _tasks(request: CalibrateRequest, embodiment: Embodiment) -> list[str]:
    """Returns each bag's instruction; without bags, that of the live topics. Checks the bags' topics too."""
    from clp_ros.bags.reader import open_bag
    from clp_ros.datasets.episode_tasks import FileTask, TaskFiles
    from clp_ros.datasets.episodes import check_topics
    from clp_ros.robots.task import load_task

    instruction = None if request.task is None else load_task(request.task, embodiment).instruction
    if not request.bags:
        if instruction is None:
            raise ClpError("it is missing", where="task", hint="give the instruction")
        return [instruction]
    files, tasks = TaskFiles(), []
    for bag in request.bags:
        reader = open_bag(bag)
        check_topics(reader, embodiment)
        own = FileTask(reader, files, None)
        tasks.append(own.task(reader.start_ns, reader.end_ns, None) if instruction is None else instruction)
    return tasks


def _calibrate_bags(
    request: CalibrateRequest,
    policy: LeRobotPolicy,
    embodiment: Embodiment,
    tasks: Sequence[str],
    statistics: Statistics | str | None,
    progress: Progress,
) -> Calibration:
    from clp_ros.calibration.calibrate import calibrate_bags

    def advance(done: int, total: int) -> None:
        if not done:
            progress.stage("calibrating", "frame")
        progress.advance(done, total)

    progress.stage("scanning the bags", "s")
    return calibrate_bags(
        policy,
        request.bags,
        embodiment,
        tasks,
        request.samples,
        request.seed,
        advance,
        progress.advance,
        statistics=statistics,
        notify=progress.warn,
    )
