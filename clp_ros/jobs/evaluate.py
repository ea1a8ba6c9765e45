# SPDX-License-Identifier: Apache-2.0
"""Success rates of checkpoints in closed loop, with intervals and paired comparisons, on simulated tasks."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, ValidationError

from clp_ros.core.errors import ClpError
from clp_ros.evaluation.intervals import compare_paired, success_interval
from clp_ros.evaluation.outcome import EpisodeOutcome
from clp_ros.jobs.progress import SILENT, Progress
from clp_ros.jobs.request import FilePath, FilePaths, Request, Result, Seed

if TYPE_CHECKING:
    from clp_ros.evaluation.evaluate import PolicyOutcomes
    from clp_ros.evaluation.evaluation_folder import EvaluationFolder
    from clp_ros.robots.embodiment import Embodiment
    from clp_ros.simulation.task import SimulatedTask

ALL_TASKS = "all"
"""Stands for every task of the robot."""

# Defaults: the paper's execution length, and the number of episodes that are played together.
_REPLAN_STEPS, _BATCH = 10, 10

_Pixels = Annotated[int, Field(ge=16, le=4096)]


class EvaluateRequest(Request):
    """Asks for the success of checkpoints.

    Attributes:
        checkpoints: Checkpoint folders. An earlier evaluation (its folder or ``evaluation.json``) may be given in the
            place of one: its outcomes are compared, and not played again.
        embodiment: A robot that can be simulated: a name or a YAML file. None with ``env``.
        tasks: Names of simulated tasks; ``all``: every task of the robot. Empty with ``env``.
        env: An environment of LeRobot in the place of robot and tasks: its type, ``:``, and its task or suite.
        env_options: Other fields of the environment's config, by name.
        episodes: Number of episodes of each task.
        seed: Seed of the first start. The others follow: ``seed + 1``, …
        latency: Time from an observation until its chunk is sent, in milliseconds; None: the measured time of a chunk
            of each policy on this machine.
        mode: How chunks are joined, as the policy node's parameter; None: ``replace``.
        replan_steps: Control steps between the observations of two chunks, as the policy node's parameter; 0: as soon
            as possible. None: 10; with ``env``: the checkpoint's ``n_action_steps``.
        size: Width and height of the policies' images in pixels; None: each policy's own.
        workers: Number of processes; 0: in this process; None: the number of cores that this process may use, or 1
            with a GPU.
        batch: Number of episodes that a process plays together; None: 10, or 1 in mode ``rtc``; with ``env``: copies of
            the environment, of which each has a process unless ``workers`` is 0; None: 1.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        output: Folder for the outcomes and a contact sheet. A folder of the same evaluation is continued. None:
            nothing is kept.
        overwrite: Whether an output folder that is not empty is emptied first.
    """

    checkpoints: Annotated[FilePaths, Field(min_length=1)]
    embodiment: str | FilePath | None = None
    tasks: Annotated[tuple[str, ...], Field(strict=False)] = ()
    env: str | None = None
    env_options: dict[str, Any] = Field(default_factory=dict)
    episodes: Annotated[int, Field(ge=1)] = 50
    seed: Seed = 0
    latency: Annotated[float, Field(ge=0)] | None = None
    mode: Literal["replace", "ensemble", "rtc"] | None = None
    replan_steps: Annotated[int, Field(ge=0)] | None = None
    size: tuple[_Pixels, _Pixels] | None = None
    workers: Annotated[int, Field(ge=0)] | None = None
    batch: Annotated[int, Field(ge=1)] | None = None
    device: str = "auto"
    output: FilePath | None = None
    overwrite: bool = False


class SuccessRate(Result):
    """A success rate.

    Attributes:
        episodes: Number of episodes.
        successes: Number of successes.
        success_rate: Their share.
        interval: Wilson's 95 % interval of the success rate.
        mean_time_s: Mean time to success, in seconds; None if there is none.
    """

    episodes: int
    successes: int
    success_rate: float
    interval: tuple[float, float] = Field(strict=False)
    mean_time_s: float | None


class TaskSuccess(SuccessRate):
    """The success rate of one task.

    Attributes:
        task: Name of the task.
    """

    task: str


class CheckpointSuccess(SuccessRate):
    """The success of one checkpoint over all tasks.

    Attributes:
        path: The checkpoint, as it was given.
        fingerprint: Its fingerprint.
        latency_ms: Time from an observation until its chunk is sent, in milliseconds.
        smoothness: Mean log dimensionless jerk of the commanded motion; nearer to 0 is smoother. None if not known.
        chunks: Number of chunks that were sent.
        late: Number of chunks that came too late to be sent.
        refused: Number of chunks that the chunk control refused.
        limits_hit: Number of positions that were clipped to the joints' limits.
        tasks: The success rate of each task.
        outcomes: Each episode's seed and outcome.
        seconds: Where the computer's time went.
    """

    path: str
    fingerprint: str
    latency_ms: float | None
    smoothness: float | None
    chunks: int
    late: int
    refused: int
    limits_hit: int
    tasks: list[TaskSuccess]
    outcomes: list[EpisodeOutcome]
    seconds: dict[str, float]


class PairedSuccess(Result):
    """Two checkpoints on the same starts; see :class:`~clp_ros.evaluation.intervals.PairedComparison`.

    Attributes:
        a, b: The checkpoints.
        both, only_a, only_b, neither: Number of starts that both, only one or none solved.
        difference: Success rate of ``b`` minus that of ``a``.
        interval: 95 % interval of the difference.
        p_value: p-value of McNemar's exact test.
    """

    a: str
    b: str
    both: int
    only_a: int
    only_b: int
    neither: int
    difference: float
    interval: tuple[float, float] = Field(strict=False)
    p_value: float


class EvaluateResult(Result):
    """The success of all checkpoints.

    Attributes:
        checkpoints: Each checkpoint's success, in the order given.
        paired: The comparison of each pair.
        embodiment: The robot's name, or the type of LeRobot's environment.
        task: The tasks' names, separated by commas.
        seed: Seed of the first start.
        mode: How chunks are joined; ``steps``: one action a step, in an environment of LeRobot.
        replan_steps: Control steps between the observations of two chunks; None: the checkpoints' own.
        output: The folder, absolute.
        contact_sheet: The picture of successes and failures; None without a folder.
    """

    checkpoints: list[CheckpointSuccess]
    paired: list[PairedSuccess]
    embodiment: str
    task: str
    seed: int
    mode: str
    replan_steps: int | None
    output: Path | None = None
    contact_sheet: Path | None = None


def run(request: EvaluateRequest, progress: Progress = SILENT) -> EvaluateResult:
    """Plays the episodes, and compares the checkpoints.

    Raises:
        ClpError: A checkpoint does not load or does not fit the robot, the robot cannot do a task, the output folder
            has something else, or an earlier evaluation has other starts.
    """
    from clp_ros.evaluation.evaluation_folder import RESULT_FILE, write_json

    earlier = {path: _earlier(path) for path in request.checkpoints}
    played = [path for path in request.checkpoints if earlier[path] is None]
    if request.env is not None:
        facts, folder, found = _play_env(request, request.env, played, progress)
    else:
        facts, folder, found = _play_tasks(request, played, progress)
    fresh = dict(zip(played, map(_checkpoint_success, found), strict=True))
    rows: list[CheckpointSuccess] = []
    for path in request.checkpoints:
        rows += [fresh[path]] if path in fresh else earlier[path] or []
    output = None if folder is None else folder.path
    result = EvaluateResult(checkpoints=rows, paired=_paired(rows), seed=request.seed, output=output, **facts)
    if folder is not None:
        from clp_ros.report.contact_sheet import write_contact_sheet

        sheet = folder.path / "contact_sheet.png"
        episodes = [
            (row.path, one, folder.picture_file(row.fingerprint, one.task, one.seed))
            for row in fresh.values()
            for one in row.outcomes
        ]
        if write_contact_sheet(sheet, episodes):
            result = result.model_copy(update={"contact_sheet": sheet})
        write_json(folder.path / RESULT_FILE, result.to_json())
    return result


_Played = tuple[dict[str, Any], "EvaluationFolder | None", "list[PolicyOutcomes]"]


def _play_tasks(request: EvaluateRequest, played: Sequence[Path], progress: Progress) -> _Played:
    """Plays simulated tasks. Returns fields of the result, the folder, and the outcomes."""
    from clp_ros.evaluation.closed_loop import LoopSettings
    from clp_ros.evaluation.evaluate import EvaluationPlan, evaluate
    from clp_ros.robots.embodiment import load_embodiment

    if request.embodiment is None or not request.tasks:
        raise ClpError("nothing to play is given", hint="give --embodiment and --task, or --env")
    if request.env_options:
        raise ClpError("env options are for an environment of LeRobot", hint="give --env, or leave --env-option out")
    embodiment = load_embodiment(request.embodiment)
    mode = request.mode or "replace"
    steps = _REPLAN_STEPS if request.replan_steps is None else request.replan_steps
    batch = request.batch or (1 if mode == "rtc" else _BATCH)
    if mode == "rtc" and batch > 1:
        raise ClpError("in mode rtc a policy continues its last chunk", where="batch", hint="leave --batch out")
    plan = EvaluationPlan(
        embodiment,
        _tasks(request.tasks, embodiment),
        request.episodes,
        request.seed,
        LoopSettings(mode, steps, size=request.size),
        None if request.latency is None else request.latency / 1e3,
        batch,
        request.device,
    )
    folder = _folder(request, plan.document())
    workers = _workers(request) if request.workers is None else request.workers
    pictures = None if folder is None else math.inf
    found = evaluate(played, plan, workers, folder, pictures, progress.stage, progress.advance)
    task = ",".join(one.name for one in plan.tasks)
    return {"embodiment": embodiment.name, "task": task, "mode": mode, "replan_steps": steps}, folder, found


def _play_env(request: EvaluateRequest, env: str, played: Sequence[Path], progress: Progress) -> _Played:
    """Plays an environment of LeRobot. Returns as :func:`_play_tasks`."""
    from clp_ros.evaluation.lerobot_envs import EnvPlan, evaluate_in_env

    for name in ("embodiment", "latency", "mode", "size"):
        if getattr(request, name) is not None:
            raise ClpError(
                f"an environment of LeRobot has no {name}",
                where=env,
                hint=f"leave --{name} out; --env-option sets the environment's own options",
            )
    kind, _, task = env.partition(":")
    if not kind or not task or request.tasks:
        raise ClpError("the task is missing or given twice", where=env, hint="write --env TYPE:TASK, without --task")
    batch = min(request.batch or 1, request.episodes)
    plan = EnvPlan(
        kind,
        task,
        request.env_options,
        request.episodes,
        request.seed,
        batch,
        batch > 1 and request.workers != 0,
        request.replan_steps,
        request.device,
    )
    folder = _folder(request, plan.document())
    found = evaluate_in_env(played, plan, folder, progress.stage, progress.advance)
    return {"embodiment": kind, "task": task, "mode": "steps", "replan_steps": request.replan_steps}, folder, found


def _folder(request: EvaluateRequest, plan: Mapping[str, Any]) -> EvaluationFolder | None:
    from clp_ros.evaluation.evaluation_folder import EvaluationFolder

    return None if request.output is None else EvaluationFolder(request.output.absolute(), plan, request.overwrite)


def _tasks(names: Sequence[str], embodiment: Embodiment) -> tuple[SimulatedTask, ...]:
    from clp_ros.simulation.task_registry import simulated_task, tasks_for

    if ALL_TASKS in names:
        if not (tasks := tasks_for(embodiment.name)):
            raise ClpError(f"{embodiment.name} has no simulated tasks", where="task", hint="give another --embodiment")
        return tuple(tasks.values())
    return tuple(simulated_task(name, embodiment) for name in dict.fromkeys(names))


def _workers(request: EvaluateRequest) -> int:
    from clp_ros.policies.loading import resolve_device

    return 1 if resolve_device(request.device) != "cpu" else len(os.sched_getaffinity(0))


def _earlier(path: Path) -> list[CheckpointSuccess] | None:
    """Returns the checkpoints of an earlier evaluation; None if the path is not one."""
    from clp_ros.evaluation.evaluation_folder import RESULT_FILE

    file = path / RESULT_FILE if path.is_dir() else path
    if not file.is_file():
        return None
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        return [CheckpointSuccess.from_json(one) for one in document["checkpoints"]]
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        raise ClpError(
            "the file is not an evaluation of this version",
            where=file,
            hint="give a checkpoint's folder, or an evaluation's",
        ) from error


def _checkpoint_success(found: PolicyOutcomes) -> CheckpointSuccess:
    outcomes = found.outcomes
    smoothness = [one.smoothness for one in outcomes if one.smoothness is not None]
    counts = {name: sum(getattr(one, name) for one in outcomes) for name in ("chunks", "late", "refused", "limits_hit")}
    by_task = {name: [one for one in outcomes if one.task == name] for name in dict.fromkeys(o.task for o in outcomes)}
    return CheckpointSuccess(
        path=found.path,
        fingerprint=found.fingerprint,
        latency_ms=found.latency_ms,
        smoothness=sum(smoothness) / len(smoothness) if smoothness else None,
        tasks=[TaskSuccess(task=name, **_rate(episodes)) for name, episodes in by_task.items()],
        outcomes=outcomes,
        seconds=found.seconds,
        **counts,
        **_rate(outcomes),
    )


def _rate(outcomes: Sequence[EpisodeOutcome]) -> dict[str, Any]:
    times = [one.seconds for one in outcomes if one.success]
    return {
        "episodes": len(outcomes),
        "successes": len(times),
        "success_rate": len(times) / len(outcomes),
        "interval": success_interval(len(times), len(outcomes)),
        "mean_time_s": round(sum(times) / len(times), 3) if times else None,
    }


def _paired(rows: Sequence[CheckpointSuccess]) -> list[PairedSuccess]:
    """Compares each pair.

    Raises:
        ClpError: They were played from different starts.
    """
    pairs = []
    for a, b in itertools.combinations(rows, 2):
        starts_a, starts_b = ({(one.task, one.seed): one for one in row.outcomes} for row in (a, b))
        if starts_a.keys() != starts_b.keys() or any(starts_a[key].start != starts_b[key].start for key in starts_a):
            raise ClpError(
                f"it was played from other starts than {a.path}, so the two cannot be compared",
                where=b.path,
                hint="evaluate both with the same robot, tasks, number of episodes, --seed and version",
            )
        compared = compare_paired([one.success for one in starts_a.values()], [starts_b[k].success for k in starts_a])
        pairs.append(PairedSuccess(a=a.path, b=b.path, **vars(compared)))
    return pairs
