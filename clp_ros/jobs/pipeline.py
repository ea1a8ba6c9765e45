# SPDX-License-Identifier: Apache-2.0
"""Runs the whole way from recorded bags to a fine-tuned pruned checkpoint: convert, calibrate, prune, finetune, verify.

Every finished step is recorded in ``pipeline.json``. A run that was interrupted goes on where it was.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, ValidationError

from clp_ros.core.errors import ClpError
from clp_ros.core.files import check_apart
from clp_ros.core.json_object import read_json_object
from clp_ros.core.strict_model import StrictModel, describe, place
from clp_ros.jobs import calibrate, convert, finetune, prune, verify
from clp_ros.jobs.progress import SILENT, Progress
from clp_ros.jobs.request import FilePath, FilePaths, Request, Result, Seed

STATE_FILE = "pipeline.json"
# The folder that a step writes, in the output folder.
OUTPUTS = {"convert": "dataset", "calibrate": "calibration", "prune": "pruned", "finetune": "finetuned"}


class PipelineRequest(Request):
    """Asks for all steps.

    Attributes:
        bags: rosbag2 recordings, one episode each.
        checkpoint: Checkpoint folder, or a Hub repository.
        embodiment: The robot: a name under config/embodiments, or a YAML file.
        task: The instruction: a name under config/tasks, a YAML file, or the sentence itself.
        output: Folder of the results: ``dataset``, ``calibration``, ``pruned``, ``finetuned``. If an earlier run with
            the same arguments was interrupted, its remaining steps are run.
        samples: Number of frames for the calibration.
        budgets: Number of layers to remove, by module; empty, and no threshold: the paper's share.
        threshold: Least score of a layer that may be removed.
        steps: Training steps.
        batch_size: Frames of a training step.
        train: Which weights are trained: see :class:`clp_ros.jobs.finetune.FinetuneRequest`.
        seed: Seed of everything that is drawn at random.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
    """

    bags: FilePaths
    checkpoint: FilePath
    embodiment: str | FilePath
    task: str
    output: FilePath
    samples: Annotated[int, Field(ge=1)] = 64
    budgets: dict[str, int] = Field(default_factory=dict)
    threshold: float | None = None
    steps: Annotated[int, Field(ge=1)] = 20_000
    batch_size: Annotated[int, Field(ge=1)] = 8
    train: str = "default"
    seed: Seed = 0
    device: str = "auto"


class PipelineResult(Result):
    """The results of all steps.

    Attributes:
        output: The folder, absolute.
        checkpoint: The fine-tuned pruned checkpoint, absolute.
        steps: Each step's Result in its JSON form, by the step's name.
        skipped: Names of the steps that an earlier run had finished.
    """

    output: Path
    checkpoint: Path
    steps: dict[str, dict[str, Any]]
    skipped: tuple[str, ...] = ()


class _State(StrictModel):
    version: Literal[1]
    request: dict[str, Any]
    steps: dict[str, dict[str, Any]]


class _Step(NamedTuple):
    name: str
    title: str
    job: Any
    request: Request


def run(request: PipelineRequest, progress: Progress = SILENT) -> PipelineResult:
    """Runs the steps that no earlier run has finished.

    Args:
        request: The request.
        progress: Receives the stages of all steps. Each step's Request and Result are reported too.

    Raises:
        ClpError: A step fails, a bag is left out of the dataset, or ``output`` holds a run with other arguments.
    """
    check_apart(request.output, [request.checkpoint, *request.bags])
    done, skipped = _finished(request), []
    for number, step in enumerate(_steps(request), 1):
        if step.name in done:
            progress.note(f"{step.name}: done before")
            skipped.append(step.name)
            continue
        titled = _Titled(progress, f"{number}/5 {step.name}")
        titled.stage(step.title)
        progress.request(step.request)
        result = step.job.run(step.request, titled)
        progress.result(result)
        if step.job is convert:
            _check_complete(result)
        done[step.name] = result.to_json()
        _record(request, done)
    return PipelineResult(
        output=request.output.absolute(),
        checkpoint=(request.output / "finetuned").absolute(),
        steps=done,
        skipped=tuple(skipped),
    )


def _steps(request: PipelineRequest) -> Iterator[_Step]:
    dataset, calibration, pruned, finetuned = (request.output / folder for folder in OUTPUTS.values())
    yield _Step(
        "convert",
        "converting the bags",
        convert,
        convert.ConvertRequest(bags=request.bags, embodiment=request.embodiment, task=request.task, output=dataset),
    )
    yield _Step(
        "calibrate",
        "comparing the layers",
        calibrate,
        calibrate.CalibrateRequest(
            checkpoint=request.checkpoint,
            bags=request.bags,
            embodiment=request.embodiment,
            task=request.task,
            samples=request.samples,
            seed=request.seed,
            device=request.device,
            statistics=str(dataset),  # fine-tuning normalises by them too
            output=calibration,
        ),
    )
    yield _Step(
        "prune",
        "writing the checkpoint without its redundant layers",
        prune,
        prune.PruneRequest(
            checkpoint=request.checkpoint,
            calibration=calibration,
            budgets=request.budgets,
            threshold=request.threshold,
            output=pruned,
        ),
    )
    yield _Step(
        "finetune",
        "fine-tuning",
        finetune,
        finetune.FinetuneRequest(
            checkpoint=pruned,
            dataset=dataset,
            output=finetuned,
            steps=request.steps,
            batch_size=request.batch_size,
            train=request.train,
            seed=request.seed,
            device=request.device,
            resume=True,
        ),
    )
    yield _Step("verify", "loading the result", verify, verify.VerifyRequest(checkpoint=finetuned))


def _finished(request: PipelineRequest) -> dict[str, dict[str, Any]]:
    """Returns the results that an earlier run with the same arguments has recorded, by step."""
    path, output = request.output / STATE_FILE, request.output
    if not path.exists():
        if output.exists() and any(output.iterdir()):
            raise ClpError(f"not empty, and without {STATE_FILE}", where=output, hint="give another output")
        return {}
    try:
        state = _State.model_validate_json(json.dumps(read_json_object(path)))
    except ValidationError as error:
        fault = error.errors()[0]
        raise ClpError(f"{place(fault)} {describe(fault)}", where=path, hint="give another output") from error
    asked = request.model_dump(mode="json", exclude={"output"})
    changed = [f"{name} = {state.request.get(name)}" for name in asked if state.request.get(name) != asked[name]]
    if changed:
        raise ClpError(
            f"the folder holds a run with other arguments: {', '.join(changed)}",
            where=output,
            hint="give the same arguments, or another output",
        )
    for name in state.steps:
        folder = output / OUTPUTS.get(name, "")
        if not folder.exists():
            raise ClpError("the folder of a finished step is missing", where=folder, hint="give another output")
    return dict(state.steps)


def _record(request: PipelineRequest, done: dict[str, dict[str, Any]]) -> None:
    state = _State(version=1, request=request.model_dump(mode="json", exclude={"output"}), steps=done)
    path = request.output / STATE_FILE
    temporary = path.with_suffix(".tmp")
    temporary.write_text(state.model_dump_json(indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)


def _check_complete(result: convert.ConvertResult) -> None:
    if result.left_out:
        first = result.left_out[0]
        raise ClpError(
            f"{len(result.left_out)} of the bags cannot be used: {first.why}",
            where=first.bag,
            hint="run again without it",
        )


class _Titled(Progress):
    """Puts a step's name before the titles of its stages."""

    def __init__(self, progress: Progress, step: str) -> None:
        self._progress, self._step = progress, step

    def stage(self, title: str, unit: str = "") -> None:
        self._progress.stage(f"{self._step}: {title}", unit)

    def advance(self, done: int, total: int) -> None:
        self._progress.advance(done, total)

    def note(self, text: str) -> None:
        self._progress.note(text)

    def warn(self, text: str) -> None:
        self._progress.warn(text)
