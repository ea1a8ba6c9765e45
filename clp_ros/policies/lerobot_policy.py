# SPDX-License-Identifier: Apache-2.0
"""A policy of lerobot's that is loaded: action chunks out of observations, hidden states out of layers."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any, override

from clp_ros.checkpoints.layer_stack import LayerStack
from clp_ros.core.errors import ClpError
from clp_ros.policies.base import HiddenStates
from clp_ros.policies.hidden_state_hooks import recorded_states
from clp_ros.policies.lerobot_features import LeRobotFeatures
from clp_ros.policies.statistics import STATE

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn

    from clp_ros.policies.rtc import RealTimeChunking


@dataclass
class LeRobotPolicy(LeRobotFeatures):
    """A policy of lerobot's, with its processors; made by :func:`clp_ros.policies.loading.load_policy`."""

    _rtc: RealTimeChunking | None = field(default=None, init=False, repr=False)

    @property
    @override
    def model(self) -> nn.Module:
        return self.policy

    @property
    @override
    def layer_stacks(self) -> tuple[LayerStack, ...]:
        return self.checkpoint.modules

    @property
    def modules(self) -> tuple[LayerStack, ...]:
        """The old name of :attr:`layer_stacks`, for one release."""
        return self.layer_stacks

    @property
    @override
    def tied(self) -> Mapping[str, str]:
        return self.family.tied

    @property
    @override
    def denoising_step(self) -> str:
        return self.family.denoise

    @override
    def batch(
        self,
        images: Mapping[str, np.ndarray],
        state: np.ndarray,
        task: str,
        actions: np.ndarray | None = None,
        action_is_pad: np.ndarray | None = None,
    ) -> dict[str, Any]:
        import numpy as np
        import torch

        self.check_complete()
        missing = sorted(set(self.cameras) - set(images))
        if missing:
            raise ClpError(f"no image for {missing[0]}", where=self.checkpoint.path, fix="connect that camera")
        sample: dict[str, Any] = {"task": [task]}
        for name in self.cameras:
            pixels = torch.from_numpy(np.ascontiguousarray(images[name])).permute(2, 0, 1)
            sample[name] = pixels.unsqueeze(0).to(torch.float32) / 255.0
        sample[STATE] = torch.as_tensor(state, dtype=torch.float32).unsqueeze(0)
        if actions is not None:
            sample["action"] = torch.as_tensor(actions, dtype=torch.float32).unsqueeze(0)
        batch = self.preprocessor(sample)
        if action_is_pad is not None:
            batch["action_is_pad"] = torch.as_tensor(action_is_pad).unsqueeze(0).to(self.device)
        return batch

    @override
    def enable_rtc(self, horizon: int) -> None:
        from clp_ros.policies.rtc import RealTimeChunking

        try:
            self._rtc = RealTimeChunking(self.policy, self.preprocessor, self.postprocessor, horizon, self.family.name)
        except ClpError as error:
            raise ClpError(error.what, where=self.checkpoint.path, fix=error.fix) from error

    @override
    def predict_batch(self, batch: dict[str, Any]) -> torch.Tensor:
        return self.policy.predict_action_chunk(batch)

    @override
    def predict_chunk(
        self,
        images: Mapping[str, np.ndarray],
        state: np.ndarray,
        task: str,
        noise: torch.Tensor | None = None,
        elapsed_steps: int | None = None,
        delay_steps: int = 0,
    ) -> np.ndarray:
        import torch

        given: dict[str, Any] = {} if noise is None else {"noise": noise}  # not every policy takes one
        # Not inference_mode with real-time chunking, whose guidance takes gradients.
        with torch.inference_mode() if self._rtc is None else torch.no_grad():
            batch = self.batch(images, state, task)
            if self._rtc is not None and elapsed_steps is not None:
                given |= self._rtc.guidance(elapsed_steps, delay_steps)
            chunk = self.policy.predict_action_chunk(batch, **given)
            self._check_actions(chunk.shape[-1])
            made = chunk.clone()
            actions = self.postprocessor(chunk)
            if self._rtc is not None:
                self._rtc.remember(made, actions)
            return actions[0].to("cpu", torch.float32).numpy()

    def _check_actions(self, width: int) -> None:
        """Refuses what lerobot 0.4 made of a base model's checkpoint: the base's ``output_features`` stayed."""
        if self.normalisation.output_size not in (None, width):
            raise ClpError(
                f"its actions have {width} components, their statistics {self.normalisation.output_size}",
                where=self.checkpoint.path,
                fix="write the statistics' number into the shape of output_features in config.json",
            )

    @override
    def hidden_states(self, batch: dict[str, Any], rng: np.random.Generator) -> dict[str, HiddenStates]:
        import torch

        from clp_ros.policies.float32_products import fast_products

        recorded = recorded_states(self.policy, self.layer_stacks)
        with torch.inference_mode(), fast_products(self.device), recorded as states:
            modalities = self.family.forward(self.policy, batch, rng)
        for stack in self.layer_stacks:
            if len(states[stack.name]) != stack.layers or None in states[stack.name]:
                raise RuntimeError(f"not every layer of {stack.name} ran: the family's probes do not fit this lerobot")
        return {name: HiddenStates(layers, modalities[name]) for name, layers in states.items()}

    @override
    def training_loss(self, batch: dict[str, Any]) -> torch.Tensor:
        return self.policy.forward(batch)[0]

    @override
    def make_optimizer(self) -> torch.optim.Optimizer:
        trainable = [weight for weight in self.policy.parameters() if weight.requires_grad]
        return self.policy.config.get_optimizer_preset().build(trainable)


# The class's old name, for one release.
LoadedPolicy = LeRobotPolicy


# Names that were here, with the module that has them now; for one release.
_MOVED = {
    **dict.fromkeys(("build_model", "load_policy", "resolve_device"), "loading"),
    "quiet": "quiet",
    "raw_values": "base",
}


def __getattr__(name: str) -> Any:
    if name not in _MOVED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = f"clp_ros.policies.{_MOVED[name]}"
    warnings.warn(f"{name} is now in {module}", DeprecationWarning, stacklevel=2)
    return getattr(import_module(module), name)
