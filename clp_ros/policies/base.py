# SPDX-License-Identifier: Apache-2.0
"""What calibration, evaluation, benchmark and nodes need of a running policy, whatever library runs it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any

from clp_ros.core.errors import ClpError
from clp_ros.policies.statistics import ACTION, STATE, Statistics

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    import torch
    from torch import nn

    from clp_ros.checkpoints.layer_stack import LayerStack


class Modality(IntEnum):
    """What a token of a layer stack stands for."""

    PADDING = 0
    """Nothing: padded words, absent cameras, actions after the end of an episode. It does not count."""
    IMAGE = 1
    """A patch of a camera's image, or a special token that encloses an image."""
    LANGUAGE = 2
    """A piece of the instruction and of the text around it."""
    STATE = 3
    """The robot's state, where it has tokens of its own."""
    ACTION = 4
    """A step of the action chunk."""
    LEARNED = 5
    """A learned token that stands for no input."""


def token_modalities(mask: torch.Tensor, *runs: tuple[Modality, int | None]) -> torch.Tensor:
    """What the tokens of a stack stand for, from runs of tokens that stand for the same.

    Args:
        mask: Which tokens are not padding: bool (batch, tokens).
        *runs: A modality and a number of tokens, in order; for one of them the number is None: all that the others
            leave.

    Returns:
        int8 (batch, tokens), values of :class:`Modality`.
    """
    import torch

    left = mask.shape[1] - sum(count for _, count in runs if count is not None)
    values = [int(modality) for modality, count in runs for _ in range(left if count is None else count)]
    labels = torch.tensor(values, dtype=torch.int8, device=mask.device)
    return torch.where(mask, labels, labels.new_tensor(int(Modality.PADDING)))


@dataclass
class HiddenStates:
    """What the layers of one stack put out for one batch.

    Attributes:
        layers: The states after each layer, in order: float (batch, tokens, dim) each.
        modalities: What each token stands for: int8 (batch, tokens), values of :class:`Modality`.
    """

    layers: list[torch.Tensor]
    modalities: torch.Tensor

    @property
    def mask(self) -> torch.Tensor:
        """Which tokens are not padding: bool (batch, tokens)."""
        return self.modalities != Modality.PADDING


class Policy(ABC):
    """A policy that is loaded and ready to run.

    A subclass gives the abstract members. The others have defaults: a policy that takes exactly its cameras and sizes,
    brings its own statistics, and can be neither trained, compiled, nor asked for real-time chunking.

    Images go by the policy's own names for its cameras (feature keys such as ``observation.images.cam_high``).

    Attributes:
        device: Where it runs: ``cpu``, ``cuda`` or ``cuda:N``.
    """

    device: str

    # ------------------------------------------------------------------------------------------------ what it is

    @property
    @abstractmethod
    def family_name(self) -> str:
        """The policy's family, as files and messages name it."""

    @property
    @abstractmethod
    def path(self) -> Path:
        """The folder that it was loaded from."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A hash of what it was loaded from: a calibration is refused for another policy."""

    @property
    @abstractmethod
    def model(self) -> nn.Module:
        """The network: its parameters are counted, measured and trained."""

    @property
    @abstractmethod
    def layer_stacks(self) -> tuple[LayerStack, ...]:
        """The stacks whose layers are compared, and may be removed."""

    @property
    def dtype(self) -> str:
        """The dtype of its first parameter, e.g. ``float32``."""
        return str(next(self.model.parameters()).dtype).removeprefix("torch.")

    @property
    def tied(self) -> Mapping[str, str]:
        """Parameters that the published model ties to another and this one stores apart, with that other."""
        return {}

    # ------------------------------------------------------------------------------------------------ its features

    @property
    @abstractmethod
    def camera_sizes(self) -> Mapping[str, tuple[int, int]]:
        """All cameras that it knows, in its own order, with the (height, width) it works at; other sizes fit too."""

    @property
    @abstractmethod
    def state_size(self) -> int:
        """Length of ``observation.state``."""

    @property
    @abstractmethod
    def action_size(self) -> int:
        """Length of one action."""

    @property
    @abstractmethod
    def chunk_size(self) -> int:
        """Actions in a chunk."""

    @property
    def cameras(self) -> tuple[str, ...]:
        """The cameras whose images it must be given, in its own order."""
        return tuple(self.camera_sizes)

    @property
    def left_out_cameras(self) -> tuple[str, ...]:
        """The cameras that it knows and runs without."""
        return tuple(camera for camera in self.camera_sizes if camera not in self.cameras)

    def check_features(self, cameras: Collection[str], action_size: int, whose: str) -> list[str]:
        """Refuses a robot that does not fit the policy, with both sides named.

        Args:
            cameras: The features that the robot's cameras feed.
            action_size: Number of the robot's joints.
            whose: The robot, for the error.

        Returns:
            What the user should know: a sentence each.

        Raises:
            ClpError: The cameras or the sizes differ.
        """
        notes = self.check_cameras(cameras, whose)
        if {self.action_size, self.state_size} != {action_size}:
            raise ClpError(
                f"the policy's state has {self.state_size} and its action {self.action_size} components; "
                f"{whose} has {action_size} joints",
                where=self.path,
                fix="use a checkpoint that was trained for this embodiment",
            )
        return notes

    def check_cameras(self, cameras: Collection[str], whose: str) -> list[str]:
        """The part of :meth:`check_features` that is about cameras."""
        if set(cameras) != set(self.camera_sizes):
            raise ClpError(
                f"the policy's cameras are {', '.join(sorted(self.camera_sizes)) or 'none'}; "
                f"{whose} has {', '.join(sorted(cameras)) or 'none'}",
                where=self.path,
                fix="give each camera the policy's feature that it feeds, in the embodiment",
            )
        return []

    # ------------------------------------------------------------------------------------------------ its statistics

    @property
    def raw_features(self) -> tuple[str, ...]:
        """Which of state and actions it takes raw, for want of statistics, though it was trained on normalised ones."""
        return ()

    @property
    def has_statistics(self) -> bool:
        """Whether it has statistics of its own, for the state or the actions."""
        return len(self.raw_features) < len((STATE, ACTION))

    def normalise_by(self, statistics: Statistics) -> None:
        """Normalises state and actions by other statistics than the policy's own.

        Raises:
            ClpError: They do not fit, or the policy takes none.
        """
        raise ClpError(
            f"a {self.family_name} takes no statistics",
            where=self.path,
            fix="calibrate it without --statistics",
        )

    def describe_statistics(self) -> dict[str, Any]:
        """Where its statistics come from, for JSON: ``source`` (``checkpoint``, ``dataset``, ``bags`` or ``none``)."""
        return {"source": "checkpoint"}

    def check_normalised(self) -> None:
        """Refuses a policy that would be given raw joint positions, and whose actions would be taken for raw ones.

        Raises:
            ClpError: It has no statistics for the state or the actions.
        """
        if self.raw_features:
            raise ClpError(
                raw_values(self.raw_features),
                where=self.path,
                fix="fine-tune it with lerobot-train --policy.path=…, which saves the data set's statistics with it",
            )

    # ------------------------------------------------------------------------------------------------ running it

    @abstractmethod
    def batch(
        self,
        images: Mapping[str, np.ndarray],
        state: np.ndarray,
        task: str,
        actions: np.ndarray | None = None,
        action_is_pad: np.ndarray | None = None,
    ) -> Any:
        """One sample as a batch of the policy's own, normalised and on its device.

        Args:
            images: (height, width, 3) uint8 RGB, by camera; all of :attr:`cameras`.
            state: (state_size,) float, in the policy's units.
            task: The instruction.
            actions: (chunk_size, action_size) float, in the policy's units, for the training-time graph.
            action_is_pad: (chunk_size,) bool; True for actions after the end of the episode.

        Raises:
            ClpError: A camera is missing, or statistics that it cannot do without.
        """

    @abstractmethod
    def predict_batch(self, batch: Any) -> torch.Tensor:
        """The network's work for one chunk: (batch, chunk_size, width) float, before it is turned into actions."""

    @abstractmethod
    def predict_chunk(
        self,
        images: Mapping[str, np.ndarray],
        state: np.ndarray,
        task: str,
        *,
        noise: torch.Tensor | None = None,
        elapsed_steps: int | None = None,
        delay_steps: int = 0,
    ) -> np.ndarray:
        """Predicts an action chunk.

        Args:
            images: As :meth:`batch` takes them.
            state: As :meth:`batch` takes it.
            task: The instruction.
            noise: Where a flow or diffusion starts, in the policy's own shape; drawn when not given.
            elapsed_steps: After :meth:`enable_rtc`: continue the last chunk, of which so many steps have passed.
            delay_steps: Steps of it that will have been executed by the time this chunk is there: they are kept.

        Returns:
            (chunk_size, action_size) float32, in the policy's units.

        Raises:
            ClpError: A camera is missing, or the policy cannot make actions of what it predicts.
        """

    @abstractmethod
    def hidden_states(self, batch: Any, rng: np.random.Generator) -> dict[str, HiddenStates]:
        """Runs the training-time graph once and reads the output of every layer that may be removed.

        Args:
            batch: From :meth:`batch`, with actions.
            rng: Source of whatever the graph draws, such as a flow's noise and time.

        Returns:
            By name of the layer stack.
        """

    def warm_up(self, task: str = "warm up") -> None:
        """Predicts one chunk from black images: the first chunk takes several times as long as the next."""
        import numpy as np

        images = {camera: np.zeros((*self.camera_sizes[camera], 3), dtype=np.uint8) for camera in self.cameras}
        self.predict_chunk(images, np.zeros(self.state_size, dtype=np.float32), task)

    def enable_rtc(self, horizon: int) -> None:
        """Lets the policy continue its last chunk: real-time chunking (arXiv 2506.07339).

        Args:
            horizon: Steps of the last chunk that guide the next, at least.

        Raises:
            ClpError: The policy cannot.
        """
        raise ClpError(f"{self.family_name} has no real-time chunking", fix="use mode replace or ensemble")

    # ------------------------------------------------------------------------------------------------ changing it

    @property
    def denoising_step(self) -> str:
        """Path, below :attr:`model`, of what runs once a denoising step and is worth compiling; empty: nothing is."""
        return ""

    def training_loss(self, batch: Any) -> torch.Tensor:
        """The loss of a batch with actions, for a training step.

        Raises:
            ClpError: The policy cannot be trained here.
        """
        raise self._not_trained()

    def make_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer that the policy is usually trained with, over its trainable parameters.

        Raises:
            ClpError: The policy cannot be trained here.
        """
        raise self._not_trained()

    def _not_trained(self) -> ClpError:
        return ClpError(
            f"a {self.family_name} cannot be trained here",
            where=self.path,
            fix="leave the training step out (--no-train-step)",
        )


def raw_values(features: Collection[str]) -> str:
    """The sentence for features that a policy does not normalise, though it was trained on normalised ones."""
    names = " and ".join(features)
    return f"no statistics for {names}: lerobot uses raw values, which the policy was not trained on"
