# SPDX-License-Identifier: Apache-2.0
"""Fine-tunes a checkpoint on a LeRobotDataset with lerobot's own training function."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from clp_ros.core import processes
from clp_ros.core.errors import ClpError
from clp_ros.jobs.progress import SILENT, Progress
from clp_ros.jobs.request import FilePath, Request, Result, Seed

if TYPE_CHECKING:
    from clp_ros.policies.checkpoint import Checkpoint
    from clp_ros.training.finetuning import TrainingSettings
    from clp_ros.training.run_folder import RunFolder
    from clp_ros.training.trainable import TrainableWeights

_Number = Annotated[int, Field(ge=1)]


class FinetuneRequest(Request):
    """Asks for a fine-tuning.

    Attributes:
        checkpoint: Checkpoint folder, pruned or not.
        dataset: Folder of a LeRobotDataset (version 3).
        output: Checkpoint folder to write. The run's files are in ``<output>.training`` until it is done.
        steps: Number of training steps.
        batch_size: Number of frames in a batch of each process.
        train: ``default`` (as config.json says), ``all``, ``expert``, ``last=K`` (the last K layers of each stack and
            the output projections) or ``lora=R`` (adapters of rank R).
        merge: Whether adapters are added to the weights. Otherwise the output is the adapter alone, which stock
            lerobot loads, and the other commands do not.
        episodes: Number of episodes to use, from the first; None: all.
        held_out: Share of the episodes of each task on which the loss is only measured.
        held_out_every: Number of steps between these measurements; None: ten measurements.
        learning_rate: Highest learning rate; None: the checkpoint's.
        save_every: Number of steps between the points from which a killed run is resumed; None: ten points; 0: none.
        keep_checkpoints: Whether ``<output>.training`` stays, with all checkpoints.
        workers: Number of processes that load frames; None: lerobot's 4, but fewer than the cores.
        seed: Seed of the order of frames, of noise and of times.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        options: More options of ``lerobot-train``, such as ``--policy.scheduler_warmup_steps=100``.
        resume: Whether an unfinished run with this output is taken up. A finished one is left as it is.
        overwrite: Whether an output folder that is not empty, or an unfinished run, is replaced.
    """

    checkpoint: FilePath
    dataset: FilePath
    output: FilePath
    steps: _Number = 20_000
    batch_size: _Number = 8
    train: str = "default"
    merge: bool = True
    episodes: _Number | None = None
    held_out: Annotated[float, Field(ge=0, lt=1)] = 0.0
    held_out_every: _Number | None = None
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    save_every: Annotated[int, Field(ge=0)] | None = None
    keep_checkpoints: bool = False
    workers: Annotated[int, Field(ge=0)] | None = None
    seed: Seed = 1000
    device: str = "auto"
    options: Annotated[tuple[str, ...], Field(strict=False)] = ()
    resume: bool = False
    overwrite: bool = False


class FinetuneResult(Result):
    """A fine-tuned checkpoint.

    Attributes:
        output: The folder, absolute.
        steps: Number of training steps.
        train: Which weights were trained, as in the request.
        trainable: Number of trained parameters; ``total``: of all.
        parts: Number of ``trained`` and of ``total`` parameters by layer stack, and of the ``other`` weights.
        loss_first: Mean loss of the first steps (a tenth, at most 50); ``loss_last``: of the last ones.
        held_out_last: The last loss on the held-out episodes; None if none are held out.
        seconds: Time of the training since it was started or taken up.
        resumed_from: The step from which this process went on; None if it began the run.
        notes: What the user should know, a sentence each.
    """

    output: str
    steps: int
    train: str
    trainable: int
    total: int
    parts: dict[str, dict[str, int]]
    loss_first: float
    loss_last: float
    held_out_last: float | None
    seconds: float
    resumed_from: int | None
    notes: list[str]


def run(request: FinetuneRequest, progress: Progress = SILENT) -> FinetuneResult:
    """Fine-tunes in all processes that torchrun or accelerate started. The first process writes the folder.

    Raises:
        ClpError: The checkpoint, the dataset or an option does not fit, the output folder is not empty, the training
            fails, or a frozen weight has changed.
    """
    from clp_ros.policies.checkpoint import Checkpoint
    from clp_ros.training.output import RECORD_FILE, check_source
    from clp_ros.training.run_folder import RunFolder
    from clp_ros.training.trainable import parse_trainable

    progress = progress if processes.rank() == 0 else SILENT
    with processes.together():
        weights = parse_trainable(request.train)
        checkpoint = Checkpoint.open(request.checkpoint)
        check_source(checkpoint)
        folder = RunFolder.of(request.output)
        settings = _settings(request)
        record = _record(request, checkpoint, settings)
        if request.resume and (request.output / RECORD_FILE).is_file():
            return _finished(request, record)
        _check_output(request, checkpoint, folder)
    with ExitStack() as stack:
        with processes.together():
            if processes.rank() == 0:
                stack.enter_context(folder.locked())
                if not (request.resume and folder.check_same(record)):
                    folder.begin(record)
                folder.clear_partial()
        # processes.together() does not fit here: the training's own processes wait for each other.
        seconds, resumed_from = _train(checkpoint, weights, settings, folder, request, progress)
        with processes.together():
            result = None
            if processes.rank() == 0:
                result = _result(request, folder, seconds, resumed_from)
                _write(request, checkpoint, weights, folder, record, result)
        return processes.gather(result)[0]


def _settings(request: FinetuneRequest) -> TrainingSettings:
    from clp_ros.policies.loading import resolve_device
    from clp_ros.training.finetuning import TrainingSettings

    dataset = request.dataset.absolute()
    episodes = _count_episodes(dataset)
    if request.episodes is not None and request.episodes > episodes:
        raise ClpError(f"the dataset has {episodes} episodes", where="--episodes", hint="give a smaller number")
    workers = min(4, max(len(os.sched_getaffinity(0)) - 1, 0)) if request.workers is None else request.workers
    tenth = max(request.steps // 10, 1)
    return TrainingSettings(
        dataset=dataset,
        steps=request.steps,
        device=resolve_device(processes.local_device(request.device)),
        batch_size=request.batch_size,
        seed=request.seed,
        workers=workers,
        save_every=tenth if request.save_every is None else request.save_every,
        episodes=request.episodes,
        held_out=request.held_out,
        held_out_every=request.held_out_every or tenth,
        learning_rate=request.learning_rate,
        options=request.options,
    )


def _count_episodes(dataset: Path) -> int:
    from clp_ros.core.json_object import read_json_object

    info = dataset / "meta" / "info.json"
    if not info.is_file():
        raise ClpError(
            "there is no LeRobotDataset here",
            where=dataset,
            hint="give the folder with meta/info.json, or convert bags",
        )
    document = read_json_object(info)
    version = str(document.get("codebase_version", ""))
    if not version.startswith("v3"):
        raise ClpError(
            f"the dataset has version {version or 'unknown'}, not v3",
            where=info,
            hint="convert it with lerobot's convert_dataset_v21_to_v30",
        )
    if not document.get("total_episodes"):
        raise ClpError("the dataset has no episodes", where=info, hint="give a complete dataset")
    return int(document["total_episodes"])


def _record(request: FinetuneRequest, checkpoint: Checkpoint, settings: TrainingSettings) -> dict[str, Any]:
    """Returns what decides the result of a run, for JSON: a run is resumed with the same values only."""
    return {
        "checkpoint": str(checkpoint.path),
        "fingerprint": checkpoint.fingerprint(),
        "dataset": str(settings.dataset),
        "steps": request.steps,
        "batch_size": request.batch_size,
        "processes": processes.world_size(),
        "train": request.train,
        "episodes": request.episodes,
        "held_out": request.held_out,
        "held_out_every": settings.held_out_every if request.held_out else None,
        "learning_rate": request.learning_rate,
        "seed": request.seed,
        "options": list(request.options),
    }


def _check_output(request: FinetuneRequest, checkpoint: Checkpoint, folder: RunFolder) -> None:
    from clp_ros.core.files import check_apart, check_output_folder

    check_apart(request.output, [checkpoint.path, request.dataset])
    check_output_folder(request.output, request.overwrite)
    if folder.newest() is not None and not (request.resume or request.overwrite):
        raise ClpError(
            "an unfinished fine-tuning is here", where=folder.path, hint="take it up with --resume, or add --overwrite"
        )


def _finished(request: FinetuneRequest, record: dict[str, Any]) -> FinetuneResult:
    from clp_ros.core.json_object import read_json_object
    from clp_ros.training.output import RECORD_FILE

    path = request.output / RECORD_FILE
    found = read_json_object(path)
    differing = [name for name in record if found["request"].get(name) != record[name]]
    if differing:
        raise ClpError(
            f"the output was made with another {differing[0]}", where=path, hint="give another --output, or --overwrite"
        )
    return FinetuneResult.from_json(found["result"])


def _train(
    checkpoint: Checkpoint,
    weights: TrainableWeights,
    settings: TrainingSettings,
    folder: RunFolder,
    request: FinetuneRequest,
    progress: Progress,
) -> tuple[float, int | None]:
    """Trains the steps that are left. Returns the seconds, and the step after which an earlier process was ended."""
    from clp_ros.training.finetuning import FineTuning, resume_arguments
    from clp_ros.training.lerobot_train import run_lerobot_train, supports_exact_resume
    from clp_ros.training.run_folder import LOG

    newest = folder.newest()
    done = 0 if newest is None else newest[0]
    if newest is None:
        arguments = settings.arguments(checkpoint, weights, folder.run)
        shutil.rmtree(folder.run, ignore_errors=True)  # a run that was killed before its first checkpoint
    else:
        arguments = resume_arguments(newest[1], settings)
        progress.note(f"resuming after step {done} of {request.steps}")
        if not supports_exact_resume():
            progress.warn("this lerobot does not resume the order of frames, so the result differs from one run's")
    if processes.rank() == 0:
        folder.keep_losses_until(done)
    processes.agree()

    def begins() -> None:
        progress.note(describe_weights(folder.weights() or {}))
        progress.stage("fine-tuning", "step")
        progress.advance(done, request.steps)

    tuning = FineTuning(
        checkpoint=checkpoint,
        weights=weights,
        folder=folder,
        first_step=done,
        keep_checkpoints=request.keep_checkpoints,
        advance=lambda step: progress.advance(step, request.steps),
        begins=begins,
    )
    progress.stage("loading the policy and the dataset")
    start = time.monotonic()
    if done < request.steps:
        run_lerobot_train(arguments, tuning, folder.path / LOG)
    return time.monotonic() - start, None if newest is None else done


def describe_weights(counts: Mapping[str, Any]) -> str:
    """Returns a sentence on which weights are trained: ``trainable`` and ``total``, also by ``parts``."""

    def share(part: Mapping[str, int]) -> str:
        return f"{part['trainable'] / 1e6:.2f} M of {part['total'] / 1e6:.2f} M"

    parts = ", ".join(f"{name} {share(part)}" for name, part in counts["parts"].items())
    return f"{share(counts)} weights are trained: {parts}"


def _result(request: FinetuneRequest, folder: RunFolder, seconds: float, resumed_from: int | None) -> FinetuneResult:
    counts = folder.weights() or {}
    rows = folder.losses()
    losses = [row["loss"] for row in rows if "loss" in row]
    held_out = [row["held_out"] for row in rows if "held_out" in row]
    few = min(max(len(losses) // 10, 1), 50)
    return FinetuneResult(
        output=str(request.output.absolute()),
        steps=request.steps,
        train=request.train,
        trainable=counts["trainable"],
        total=counts["total"],
        parts=counts["parts"],
        loss_first=fmean(losses[:few]),
        loss_last=fmean(losses[-few:]),
        held_out_last=held_out[-1] if held_out else None,
        seconds=round(seconds, 3),
        resumed_from=resumed_from,
        notes=[describe_weights(counts)],
    )


def _write(
    request: FinetuneRequest,
    checkpoint: Checkpoint,
    weights: TrainableWeights,
    folder: RunFolder,
    record: Mapping[str, Any],
    result: FinetuneResult,
) -> None:
    """Writes the output folder, and deletes the run's."""
    from clp_ros import __version__
    from clp_ros.core.files import atomic_folder
    from clp_ros.report.training_report import write_training_page
    from clp_ros.training.output import PAGE_FILE, assemble, copy_adapter, write_record

    newest = folder.newest()
    if newest is None or newest[0] != request.steps:
        raise ClpError(
            "lerobot has not saved the last step", where=folder.run, hint="do not give --save_checkpoint=false"
        )
    saved, target = newest[1] / "pretrained_model", request.output.absolute()
    try:
        with atomic_folder(target, request.overwrite) as output:
            if weights.kind == "lora" and not request.merge:
                copy_adapter(saved, output)
            else:
                # `last` trains with other fields of config.json, which are no property of the policy.
                assemble(
                    checkpoint, saved, output, target, tuple(checkpoint.family.train_all) * (weights.kind == "last")
                )
            training: dict[str, Any] = {
                "schema_version": 1,
                "request": dict(record),
                "result": result.to_json(),
                "losses": folder.losses(),
                "versions": {"clp_ros": __version__, "lerobot": version("lerobot"), "torch": version("torch")},
            }
            write_record(output, training)
            write_training_page(output / PAGE_FILE, training)
    except OSError as error:
        raise ClpError(
            f"the checkpoint cannot be written ({error.strerror or error})",
            where=error.filename or target,
            hint="make room on the disk, and add --resume",
        ) from error
    if weights.kind != "lora" or request.merge:
        _check_loads(target)
    if not request.keep_checkpoints:
        shutil.rmtree(folder.path)


def _check_loads(output: Path) -> None:
    """Refuses an output that does not load. The run's folder stays then."""
    from clp_ros.policies.loading import load_policy

    load_policy(output, weights=False).check_normalised()
