# SPDX-License-Identifier: Apache-2.0
"""The interface of a running policy for calibration, evaluation, benchmark and nodes, independent of the library."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
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
    """The kind of input that a token of a layer stack represents."""

    PADDING = 0
    """Padding: of the instruction, for absent cameras, for actions after the end of an episode. Not counted."""
    IMAGE = 1
    """A patch of a camera's image, or a special token that encloses an image."""
    LANGUAGE = 2
    """A part of the instruction or of the text around it."""
    STATE = 3
    """The robot's state, if it has separate tokens."""
    ACTION = 4
    """A step of the action chunk."""
    LEARNED = 5
    """A learned token without an input."""


def token_modalities(mask: torch.Tensor, *runs: tuple[Modality, int | None]) -> torch.Tensor:
    """Returns the modality of every token of a stack, given the lengths of its runs.

    Args:
        mask: Which tokens are not padding: bool (batch, tokens).
        *runs: A modality and a number of tokens, in order. The number of one run may be None: the remaining tokens.

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
    """The outputs of the layers of one stack for one batch.

    Attributes:
        layers: The states after each layer, in order: float (batch, tokens, dim) each.
        modalities: The modality of each token: int8 (batch, tokens), values of :class:`Modality`.
    """

    layers: list[torch.Tensor]
    modalities: torch.Tensor

    @property
    def mask(self) -> torch.Tensor:
        """Which tokens are not padding: bool (batch, tokens)."""
        return self.modalities != Modality.PADDING


class Policy(ABC):
    """A policy that is loaded and ready to run.

    A subclass implements the abstract members. The defaults of the others describe a policy that needs exactly its
    cameras and sizes, has its own statistics, and supports neither training, compilation nor real-time chunking.

    Cameras are named by the policy's feature keys, such as ``observation.images.cam_high``.

    Attributes:
        device: Where it runs: ``cpu``, ``cuda`` or ``cuda:N``.
    """

    device: str

    # ------------------------------------------------------------------------------------------------ identity

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
        """A hash of the checkpoint's content, by which a calibration of another policy is refused."""

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
        """Parameters that the published model ties and this one stores separately: name -> name of the tied
        parameter."""
        return {}

    # ------------------------------------------------------------------------------------------------ features

    @property
    @abstractmethod
    def camera_sizes(self) -> Mapping[str, tuple[int, int]]:
        """All its cameras, in its own order, with the (height, width) to which it resizes images."""

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
        """The cameras whose images :meth:`batch` needs, in the policy's order."""
        return tuple(self.camera_sizes)

    @property
    def left_out_cameras(self) -> tuple[str, ...]:
        """The cameras of the policy that are left out."""
        return tuple(camera for camera in self.camera_sizes if camera not in self.cameras)

    def check_features(self, cameras: Collection[str], action_size: int, whose: str) -> list[str]:
        """Refuses a robot that does not fit the policy. The error names the features of both.

        Args:
            cameras: The feature keys of the robot's cameras.
            action_size: Number of the robot's joints.
            whose: The robot, for the error.

        Returns:
            Notes for the user, a sentence each.

        Raises:
            ClpError: The cameras or the sizes differ.
        """
        notes = self.check_cameras(cameras, whose)
        if {self.action_size, self.state_size} != {action_size}:
            raise ClpError(
                f"the policy's state has {self.state_size} and its action {self.action_size} components; "
                f"{whose} has {action_size} joints",
                where=self.path,
                hint="use a checkpoint that was trained for this embodiment",
            )
        return notes

    def check_cameras(self, cameras: Collection[str], whose: str) -> list[str]:
        """Checks the cameras alone, as :meth:`check_features` does."""
        if set(cameras) != set(self.camera_sizes):
            raise ClpError(
                f"the policy's cameras are {', '.join(sorted(self.camera_sizes)) or 'none'}; "
                f"{whose} has {', '.join(sorted(cameras)) or 'none'}",
                where=self.path,
                hint="write the policy's feature of each camera into the embodiment",
            )
        return []

    # ------------------------------------------------------------------------------------------------ statistics

    @property
    def raw_features(self) -> tuple[str, ...]:
        """Which of state and action are not normalised, because statistics are missing, although training normalised
        them."""
        return ()

    @property
    def has_statistics(self) -> bool:
        """Whether it has statistics for the state or the actions."""
        return len(self.raw_features) < len((STATE, ACTION))

    def normalise_by(self, statistics: Statistics) -> None:
        """Normalises state and actions by other statistics than the policy's own.

        Raises:
            ClpError: The statistics do not fit, or the policy uses none.
        """
        raise ClpError(
            f"{self.family_name} takes no statistics",
            where=self.path,
            hint="calibrate it without --statistics",
        )

    def describe_statistics(self) -> dict[str, Any]:
        """Returns the origin of its statistics, for JSON: ``source`` (``checkpoint``, ``dataset``, ``bags`` or
        ``none``)."""
        return {"source": "checkpoint"}

    def check_normalised(self) -> None:
        """Refuses a policy whose states and actions would not be normalised.

        Raises:
            ClpError: It has no statistics for the state or the actions.
        """
        if self.raw_features:
            raise ClpError(
                raw_values(self.raw_features),
                where=self.path,
                hint="fine-tune it with lerobot-train --policy.path=…, which saves the data set's statistics with it",
            )

    # ------------------------------------------------------------------------------------------------ inference

    @abstractmethod
    def batch(
        self,
        images: Mapping[str, np.ndarray],
        state: np.ndarray,
        task: str,
        actions: np.ndarray | None = None,
        action_is_pad: np.ndarray | None = None,
    ) -> Any:
        """Returns one sample as a normalised batch on the policy's device.

        Args:
            images: (height, width, 3) uint8 RGB, by camera; all of :attr:`cameras`.
            state: (state_size,) float, in the policy's units.
            task: The instruction.
            actions: (chunk_size, action_size) float, in the policy's units, for the training-time graph.
            action_is_pad: (chunk_size,) bool; True for actions after the end of the episode.

        Raises:
            ClpError: A camera or necessary statistics are missing.
        """

    @abstractmethod
    def predict_batch(self, batch: Any) -> torch.Tensor:
        """Runs the network for one chunk. Returns (batch, chunk_size, width) float, before unnormalisation."""

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
            noise: Initial noise of a flow or diffusion, in the policy's shape; drawn if None.
            elapsed_steps: After :meth:`enable_rtc`: number of steps of the last chunk that have passed. The new chunk
                continues it.
            delay_steps: Steps of the last chunk that will be executed before the new chunk is ready. They are kept.

        Returns:
            (chunk_size, action_size) float32, in the policy's units.

        Raises:
            ClpError: A camera is missing, or the prediction does not fit the robot's actions.
        """

    def predict_chunks(self, observations: Sequence[tuple[Mapping[str, np.ndarray], np.ndarray, str]]) -> np.ndarray:
        """Predicts the chunks of several robots at once, which takes less time than one after the other.

        Args:
            observations: Images, state and task of each, as :meth:`batch` takes them; at least one. Images of a camera
                have one size.

        Returns:
            (robots, chunk_size, action_size) float32, in the policy's units.

        Raises:
            ClpError: As :meth:`predict_chunk`.
        """
        import numpy as np

        return np.stack([self.predict_chunk(*observation) for observation in observations])

    @abstractmethod
    def hidden_states(self, batch: Any, rng: np.random.Generator) -> dict[str, HiddenStates]:
        """Runs the training-time graph once and reads the output of every layer that may be removed.

        Args:
            batch: A result of :meth:`batch` with actions.
            rng: Source of random values in the graph, such as a flow's noise and time.

        Returns:
            The hidden states by name of the layer stack.
        """

    def warm_up(self, task: str = "warm up") -> None:
        """Predicts one chunk from black images, because the first chunk takes several times as long as the next."""
        import numpy as np

        images = {camera: np.zeros((*self.camera_sizes[camera], 3), dtype=np.uint8) for camera in self.cameras}
        self.predict_chunk(images, np.zeros(self.state_size, dtype=np.float32), task)

    def enable_rtc(self, horizon: int) -> None:
        """Enables real-time chunking (arXiv 2506.07339): the policy continues its last chunk.

        Args:
            horizon: Minimum number of steps of the last chunk that guide the next.

        Raises:
            ClpError: The policy does not support it.
        """
        raise ClpError(
            f"{self.family_name} has no real-time chunking", where=self.path, hint="use mode replace or ensemble"
        )

    # ------------------------------------------------------------------------------------------------ training

    @property
    def denoising_step(self) -> str:
        """Attribute path in :attr:`model` of the denoising step, which can be compiled; empty if there is none."""
        return ""

    def training_loss(self, batch: Any) -> torch.Tensor:
        """Returns the training loss of a batch with actions.

        Raises:
            ClpError: The policy cannot be trained here.
        """
        raise self._not_trained()

    def make_optimizer(self) -> torch.optim.Optimizer:
        """Returns the policy's usual optimizer, over its trainable parameters.

        Raises:
            ClpError: The policy cannot be trained here.
        """
        raise self._not_trained()

    def _not_trained(self) -> ClpError:
        return ClpError(
            f"{self.family_name} has no training step",
            where=self.path,
            hint="leave the training step out (--no-train-step)",
        )


def raw_values(features: Collection[str]) -> str:
    """Returns the message for features that are not normalised although training normalised them."""
    names = " and ".join(features)
    return f"no statistics for {names}: lerobot uses raw values, which the policy was not trained on"
