# SPDX-License-Identifier: Apache-2.0
"""Success of checkpoints in closed loop, over the same seeded starts of simulated tasks."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from clp_ros import __version__
from clp_ros.checkpoints.hub import local_folder
from clp_ros.control.replan import ReplanConfig
from clp_ros.core.errors import ClpError
from clp_ros.core.strict_model import StrictModel
from clp_ros.evaluation.closed_loop import LoopSettings
from clp_ros.evaluation.evaluation_folder import EvaluationFolder
from clp_ros.evaluation.outcome import EpisodeOutcome
from clp_ros.evaluation.player import Block, PolicySetting
from clp_ros.evaluation.workers import Workers
from clp_ros.policies.checkpoint import Checkpoint
from clp_ros.robots.embodiment import Embodiment
from clp_ros.simulation.task import SimulatedTask


@dataclass(frozen=True)
class EvaluationPlan:
    """What is played, the same for all checkpoints.

    Attributes:
        embodiment: The robot.
        tasks: The tasks.
        episodes: Number of episodes of each task.
        seed: Seed of the first start. The others follow: ``seed + 1``, …
        settings: How the policies drive the robot. Its latency is not used.
        latency_s: Time from an observation until its chunk is sent, in seconds; None: the measured one of each policy.
        batch: Number of episodes that are played together. They share the runs of the policy.
        device: The policies' device.
    """

    embodiment: Embodiment
    tasks: tuple[SimulatedTask, ...]
    episodes: int
    seed: int
    settings: LoopSettings
    latency_s: float | None
    batch: int
    device: str

    def document(self) -> dict[str, Any]:
        """Returns what must be the same when an evaluation goes on. More episodes and tasks may be added then."""
        settings = asdict(self.settings)
        del settings["latency_s"]
        return {
            "clp_ros": __version__,
            "embodiment": self.embodiment.model_dump(mode="json"),
            "seed": self.seed,
            "settings": settings,
            "latency_s": self.latency_s,
            "batch": self.batch,
        }

    def seeds(self) -> list[tuple[int, ...]]:
        """Returns the seeds of each block."""
        end = self.seed + self.episodes
        return [tuple(range(first, min(first + self.batch, end))) for first in range(self.seed, end, self.batch)]


class PolicyOutcomes(StrictModel):
    """The outcomes of one checkpoint.

    Attributes:
        path: The checkpoint, as it was given.
        fingerprint: Its fingerprint.
        latency_ms: Time from an observation until its chunk is sent, in milliseconds; None: no latency is simulated.
        outcomes: The outcomes of all tasks, by task and seed.
        seconds: Where the computer's time went, by what it was for.
    """

    path: str
    fingerprint: str
    latency_ms: float | None
    outcomes: list[EpisodeOutcome]
    seconds: dict[str, float]


def evaluate(
    checkpoints: Sequence[Path],
    plan: EvaluationPlan,
    workers: int,
    folder: EvaluationFolder | None = None,
    picture_every_s: float | None = None,
    stage: Callable[[str, str], None] = lambda title, unit: None,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> list[PolicyOutcomes]:
    """Plays all episodes of all checkpoints.

    Args:
        checkpoints: Checkpoints' folders.
        plan: What is played.
        workers: Number of processes; 0: in this process.
        folder: Where outcomes are kept. Those that it has are not played again. None: they are kept in memory.
        picture_every_s: See :class:`~clp_ros.evaluation.player.Block`. Pictures need a folder.
        stage: Called with the name of a stage and the unit of ``advance``.
        advance: Called with the number of episodes done and in total.

    Returns:
        The outcomes of each checkpoint, in the order given.

    Raises:
        ClpError: A checkpoint does not load or does not fit the robot, its latency is too long for the chunk control,
            or rendering fails.
    """
    paths = [local_folder(path) for path in checkpoints]
    prints = [Checkpoint.open(path).fingerprint() for path in paths]
    if len(set(prints)) < len(prints):
        raise ClpError("two of the checkpoints are the same", where="checkpoints", hint="give each checkpoint once")
    done: dict[tuple[str, str, tuple[int, ...]], tuple[list[EpisodeOutcome], dict[str, float]]] = {}
    if folder is not None:
        for fingerprint, task, seeds in itertools.product(prints, plan.tasks, plan.seeds()):
            if (found := folder.block(fingerprint, task.name, seeds)) is not None:
                done[fingerprint, task.name, seeds] = found
    latencies: dict[str, float] = {}
    with Workers(workers) as players:
        blocks: list[tuple[str, Block]] = []
        for path, fingerprint in zip(paths, prints, strict=True):
            setting = PolicySetting(path, plan.device, plan.settings.mode, max(plan.settings.replan_steps, 1))
            missing = [
                (task, seeds)
                for task in plan.tasks
                for seeds in plan.seeds()
                if (fingerprint, task.name, seeds) not in done
            ]
            stage(f"loading {path}", "")
            latencies[fingerprint] = _latency_s(players, setting, plan, fingerprint, folder, bool(missing))
            settings = replace(plan.settings, latency_s=latencies[fingerprint])
            blocks += [
                (fingerprint, Block(setting, plan.embodiment, task.name, seeds, settings, picture_every_s))
                for task, seeds in missing
            ]
        total = len(prints) * len(plan.tasks) * plan.episodes
        stage("playing", "episode")
        finished = sum(len(seeds) for _, _, seeds in done)
        advance(finished, total)
        whose = {id(block): fingerprint for fingerprint, block in blocks}
        for block, result in players.play([block for _, block in blocks]):
            fingerprint, seconds = whose[id(block)], asdict(result.seconds)
            if folder is not None:
                folder.add_block(fingerprint, block.task, result.outcomes, seconds, result.pictures)
            done[fingerprint, block.task, block.seeds] = result.outcomes, seconds
            finished += len(block.seeds)
            advance(finished, total)
    return [
        _collected(str(given), fingerprint, latencies[fingerprint], plan, done)
        for given, fingerprint in zip(checkpoints, prints, strict=True)
    ]


def _latency_s(
    players: Workers,
    setting: PolicySetting,
    plan: EvaluationPlan,
    fingerprint: str,
    folder: EvaluationFolder | None,
    is_played: bool,
) -> float:
    """Returns the latency of a policy. It is measured once for a folder, so that later episodes have the same."""
    known = None if folder is None else folder.policy(fingerprint)
    latency_s = plan.latency_s if known is None else known["latency_s"]
    if is_played or latency_s is None:
        measured_s = players.prepare(setting, plan.embodiment, latency_s is None)  # also checks that the policy fits
        latency_s = measured_s if latency_s is None else latency_s
    assert latency_s is not None
    most_s = ReplanConfig(0).max_latency_s
    if latency_s > most_s:
        raise ClpError(
            f"a chunk takes {latency_s:.2f} s; the policy node drops chunks older than {most_s:g} s (max_latency)",
            where=setting.checkpoint,
            hint="give the latency of the robot's computer (--latency), or evaluate on it",
        )
    if folder is not None and known is None:
        folder.add_policy(fingerprint, {"path": str(setting.checkpoint), "latency_s": latency_s})
    return latency_s


def _collected(
    path: str,
    fingerprint: str,
    latency_s: float,
    plan: EvaluationPlan,
    done: dict[tuple[str, str, tuple[int, ...]], tuple[list[EpisodeOutcome], dict[str, float]]],
) -> PolicyOutcomes:
    outcomes: list[EpisodeOutcome] = []
    total: dict[str, float] = {}
    for task in plan.tasks:
        for seeds in plan.seeds():
            block, seconds = done[fingerprint, task.name, seeds]
            outcomes += block
            for name, value in seconds.items():
                total[name] = total.get(name, 0.0) + value
    return PolicyOutcomes(
        path=path,
        fingerprint=fingerprint,
        latency_ms=round(latency_s * 1e3, 3),
        outcomes=outcomes,
        seconds={name: round(value, 3) for name, value in total.items()},
    )
