# SPDX-License-Identifier: Apache-2.0
"""A fine-tuning run: its arguments for lerobot, its loss curve, its checkpoints, and the check of frozen weights."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from clp_ros.core import processes
from clp_ros.core.errors import ClpError
from clp_ros.training.lerobot_train import TrainingObserver, supports_held_out
from clp_ros.training.run_folder import RunFolder
from clp_ros.training.trainable import (
    TrainableWeights,
    check_frozen,
    count_by_part,
    count_parameters,
    frozen_hashes,
)

if TYPE_CHECKING:
    from torch import nn

    from clp_ros.policies.checkpoint import Checkpoint


@dataclass(frozen=True)
class TrainingSettings:
    """The settings of a run that become options of ``lerobot-train``. None: lerobot's default.

    Attributes:
        dataset: Folder of the LeRobotDataset.
        steps: Number of training steps.
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        batch_size: Number of frames in a batch of each process.
        seed: Seed of the order of frames, of noise and of times.
        workers: Number of processes that load frames, for each process that trains.
        save_every: Number of steps between checkpoints; 0: only at the end.
        episodes: Number of episodes to use, from the first; None: all.
        held_out: Share of the episodes of each task on which the loss is only measured.
        held_out_every: Number of steps between these measurements.
        learning_rate: Highest learning rate.
        options: More options of ``lerobot-train``.
    """

    dataset: Path
    steps: int
    device: str
    batch_size: int
    seed: int
    workers: int
    save_every: int
    episodes: int | None = None
    held_out: float = 0.0
    held_out_every: int = 0
    learning_rate: float | None = None
    options: tuple[str, ...] = ()

    def arguments(self, checkpoint: Checkpoint, weights: TrainableWeights, run: Path) -> list[str]:
        """Returns the arguments of ``lerobot-train`` for a new run in the folder ``run``.

        Raises:
            ClpError: The installed lerobot or the family does not support a setting.
        """
        arguments = [
            f"--policy.path={checkpoint.path}",
            "--policy.push_to_hub=false",
            f"--policy.device={self.device}",
            f"--dataset.repo_id={_repository(self.dataset)}",
            f"--dataset.root={self.dataset}",
            f"--output_dir={run}",
            f"--steps={self.steps}",
            f"--batch_size={self.batch_size}",
            f"--seed={self.seed}",
            f"--num_workers={self.workers}",
            f"--save_freq={self.save_every or self.steps}",
            *weights.arguments(checkpoint),
        ]
        if self.episodes is not None:
            arguments.append(f"--dataset.episodes={list(range(self.episodes))}")
        if self.learning_rate is not None:
            if "optimizer_lr" not in checkpoint.config:
                raise ClpError(
                    f"the config of {checkpoint.family.name} has no optimizer_lr",
                    where="--learning-rate",
                    hint="give lerobot's own option after --",
                )
            arguments.append(f"--policy.optimizer_lr={self.learning_rate}")
        if self.held_out:
            if not supports_held_out():
                raise ClpError(
                    "the installed lerobot cannot hold out episodes", where="--held-out", hint="install lerobot 0.6.1"
                )
            arguments += [f"--dataset.eval_split={self.held_out}", f"--eval_steps={self.held_out_every}"]
        return [*arguments, *self.options]


def resume_arguments(checkpoint: Path, settings: TrainingSettings) -> list[str]:
    """Returns the arguments of ``lerobot-train`` that resume a run.

    Args:
        checkpoint: The folder of a step, which lerobot wrote.
        settings: The settings of the run. What depends on the machine is given again.
    """
    return [
        f"--config_path={checkpoint / 'pretrained_model' / 'train_config.json'}",
        "--resume=true",
        f"--policy.device={settings.device}",
        f"--num_workers={settings.workers}",
        f"--dataset.root={settings.dataset}",
        f"--output_dir={checkpoint.parents[1]}",
    ]


@dataclass
class FineTuning(TrainingObserver):
    """Watches a run, keeps its folder and checks its frozen weights.

    Attributes:
        checkpoint: The checkpoint that is fine-tuned.
        weights: Which weights are trained.
        folder: The run's folder.
        first_step: Number of steps that were done before this process.
        keep_checkpoints: Whether the checkpoints of earlier steps stay.
        advance: Called after each step with the number of steps done.
        begins: Called before the first step, when the folder has the numbers of weights.
    """

    checkpoint: Checkpoint
    weights: TrainableWeights
    folder: RunFolder
    first_step: int
    keep_checkpoints: bool
    advance: Callable[[int], None]
    begins: Callable[[], None]
    _frozen: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._step = self.first_step

    def policy_made(self, policy: nn.Module) -> None:
        """Freezes what is not trained."""
        self.weights.freeze(policy, self.checkpoint)

    def training_begins(self, policy: nn.Module) -> None:
        """Counts the weights, and notes the frozen ones or compares them with those of the first process."""
        if processes.rank() > 0:
            return
        trained, total = count_parameters(policy)
        if trained == 0:
            raise ClpError("no weight is trained", where=f"--train {self.weights}", hint="use --train all")
        noted = self.folder.weights() if self.first_step else None
        if noted is None:
            parts = count_by_part(policy, self.checkpoint)
            self._frozen = frozen_hashes(policy)
            self.folder.write_weights(
                {"trainable": trained, "total": total, "parts": parts, "frozen": self._frozen},
            )
        else:
            self._frozen = noted["frozen"]
            check_frozen(policy, self._frozen)
        self.begins()

    def step_done(self, loss: float, learning_rate: float, gradient_norm: float) -> None:
        """Appends the loss to the curve."""
        self._step += 1
        if processes.rank() > 0:
            return
        self.folder.append_loss(
            {"step": self._step, "loss": loss, "learning_rate": learning_rate, "gradient_norm": gradient_norm}
        )
        self.advance(self._step)

    def held_out(self, step: int, loss: float) -> None:
        """Appends the loss on the held-out episodes to the curve."""
        if processes.rank() == 0:
            self.folder.append_loss({"step": step, "held_out": loss})

    @contextlib.contextmanager
    def saving(self, folder: Path, step: int, policy: nn.Module) -> Iterator[Path]:
        """Checks the frozen weights, and lets the checkpoint appear when it is complete."""
        if not _is_sharded(policy):
            check_frozen(policy, self._frozen)
        with self.folder.complete_checkpoint(folder, self.keep_checkpoints) as partial:
            yield partial


def _is_sharded(policy: nn.Module) -> bool:
    """Whether the parameters are those of one process only (FSDP)."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    return any(isinstance(module, FullyShardedDataParallel) for module in policy.modules())


def _repository(dataset: Path) -> str:
    """Returns a repository name for a local dataset. lerobot requires one, and does not use it."""
    return "local/" + (re.sub(r"[^A-Za-z0-9._-]+", "-", dataset.name).strip("-.") or "dataset")
