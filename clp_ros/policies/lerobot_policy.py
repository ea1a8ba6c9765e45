# SPDX-License-Identifier: Apache-2.0
"""A loaded lerobot policy, which predicts action chunks and returns hidden states."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, override

from clp_ros.checkpoints.layer_stack import LayerStack
from clp_ros.core.errors import ClpError
from clp_ros.core.renamed import renamed
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
    """A lerobot policy with its processors, created by :func:`clp_ros.policies.loading.load_policy`."""

    _rtc: RealTimeChunking | None = field(default=None, init=False, repr=False)

    @property
    @override
    def model(self) -> nn.Module:
        return self.policy

    @property
    @override
    def layer_stacks(self) -> tuple[LayerStack, ...]:
        return self.checkpoint.layer_stacks

    @property
    def modules(self) -> tuple[LayerStack, ...]:
        """Old name of :attr:`layer_stacks`."""
        warnings.warn("LeRobotPolicy.modules is now layer_stacks", DeprecationWarning, stacklevel=2)
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
        import torch

        sample = self._sample([(images, state, task)])
        if actions is not None:
            sample["action"] = torch.as_tensor(actions, dtype=torch.float32).unsqueeze(0)
        batch = self.preprocessor(sample)
        if action_is_pad is not None:
            batch["action_is_pad"] = torch.as_tensor(action_is_pad).unsqueeze(0).to(self.device)
        return batch

    def _sample(self, observations: Sequence[tuple[Mapping[str, np.ndarray], np.ndarray, str]]) -> dict[str, Any]:
        """Returns observations as one sample for the preprocessor. See :meth:`Policy.predict_chunks`."""
        import numpy as np
        import torch

        self.check_complete()
        for images, _, _ in observations:
            if missing := sorted(set(self.cameras) - set(images)):
                raise ClpError(
                    f"the observation has no image for {missing[0]}",
                    where=self.checkpoint.path,
                    hint="connect this camera",
                )
        sample: dict[str, Any] = {"task": [task for _, _, task in observations]}
        for name in self.cameras:
            pixels = torch.from_numpy(np.stack([images[name] for images, _, _ in observations])).permute(0, 3, 1, 2)
            sample[name] = pixels.to(torch.float32) / 255.0
        states = np.stack([np.asarray(state, dtype=np.float32) for _, state, _ in observations])
        sample[STATE] = torch.from_numpy(states)
        return sample

    @override
    def enable_rtc(self, horizon: int) -> None:
        from clp_ros.policies.rtc import RealTimeChunking

        try:
            self._rtc = RealTimeChunking(self.policy, self.preprocessor, self.postprocessor, horizon, self.family.name)
        except ClpError as error:
            raise error.at(self.checkpoint.path) from error

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

        given: dict[str, Any] = {} if noise is None else {"noise": noise}  # not every policy accepts noise
        # Real-time chunking needs gradients for its guidance, so inference_mode is not used with it.
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

    @override
    def predict_chunks(self, observations: Sequence[tuple[Mapping[str, np.ndarray], np.ndarray, str]]) -> np.ndarray:
        import numpy as np
        import torch

        groups: dict[str, list[int]] = {}
        for index, (_, _, task) in enumerate(observations):
            groups.setdefault("" if self.family.ignores_padding else task, []).append(index)
        chunks: dict[int, np.ndarray] = {}
        with torch.inference_mode():
            for indices in groups.values():
                batch = self.preprocessor(self._sample([observations[index] for index in indices]))
                chunk = self.policy.predict_action_chunk(batch)
                self._check_actions(chunk.shape[-1])
                chunks |= zip(indices, self.postprocessor(chunk).to("cpu", torch.float32).numpy(), strict=True)
        return np.stack([chunks[index] for index in range(len(observations))])

    def _check_actions(self, width: int) -> None:
        """Refuses fine-tuned checkpoints of lerobot 0.4, which kept the base model's ``output_features``."""
        if self.normalisation.output_size not in (None, width):
            raise ClpError(
                f"the actions have {width} components, their statistics {self.normalisation.output_size}",
                where=self.checkpoint.path,
                hint="correct the shape of the action in output_features of config.json",
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


__getattr__ = renamed(
    __name__,
    {
        "LoadedPolicy": "policies.lerobot_policy:LeRobotPolicy",
        "build_model": "policies.loading:build_model",
        "load_policy": "policies.loading:load_policy",
        "quiet": "policies.quiet:quiet",
        "raw_values": "policies.base:raw_values",
        "resolve_device": "policies.loading:resolve_device",
    },
)
