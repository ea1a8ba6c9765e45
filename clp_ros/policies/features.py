# SPDX-License-Identifier: Apache-2.0
"""Describes a policy's inputs and outputs: cameras, state, action and their statistics."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class PolicyFeatures:
    """Cameras, state and action of a policy, with the mean and standard deviation for its processors.

    Attributes:
        cameras: Image size (height, width) by feature, e.g. ``observation.images.cam_high``.
        state_size: Length of ``observation.state``.
        action_size: Length of one action.
        state_mean, state_std, action_mean, action_std: Statistics, one number for each component.
    """

    cameras: dict[str, tuple[int, int]]
    state_size: int
    action_size: int
    state_mean: tuple[float, ...]
    state_std: tuple[float, ...]
    action_mean: tuple[float, ...]
    action_std: tuple[float, ...]

    def lerobot_features(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The ``input_features`` and ``output_features`` of a lerobot policy config."""
        from lerobot.configs.types import FeatureType, PolicyFeature

        inputs = {name: PolicyFeature(type=FeatureType.VISUAL, shape=(3, *size)) for name, size in self.cameras.items()}
        inputs["observation.state"] = PolicyFeature(type=FeatureType.STATE, shape=(self.state_size,))
        return inputs, {"action": PolicyFeature(type=FeatureType.ACTION, shape=(self.action_size,))}

    def lerobot_statistics(self) -> dict[str, dict[str, torch.Tensor]]:
        """Statistics for lerobot's processors. The quantiles, which π0.5 needs, are those of a normal distribution."""
        import torch

        def statistics(mean: tuple[float, ...], std: tuple[float, ...]) -> dict[str, torch.Tensor]:
            middle, deviation = torch.tensor(mean), torch.tensor(std)
            reach = NormalDist().inv_cdf(0.99) * deviation
            return {"mean": middle, "std": deviation, "q01": middle - reach, "q99": middle + reach}

        return {
            "observation.state": statistics(self.state_mean, self.state_std),
            "action": statistics(self.action_mean, self.action_std),
        }


# The paper's Table 1 was measured on LIBERO: two cameras, an 8-D state and a 7-D action.
LIBERO = PolicyFeatures(
    cameras={"observation.images.image": (256, 256), "observation.images.image2": (256, 256)},
    state_size=8,
    action_size=7,
    state_mean=(0.0,) * 8,
    state_std=(1.0,) * 8,
    action_mean=(0.0,) * 7,
    action_std=(1.0,) * 7,
)
