# SPDX-License-Identifier: Apache-2.0
"""Real-time chunking (arXiv 2506.07339) with lerobot's implementation: a chunk continues the last one."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from clp_ros.core.errors import ClpError

if TYPE_CHECKING:
    import torch

# Number of steps after the delay in which the last chunk guides the next: lerobot's default horizon. Without them, the
# first step that can change would have no guidance, and the new chunk could begin anywhere.
MARGIN_STEPS = 10


def supports_rtc(policy: Any) -> bool:
    """Whether lerobot supports real-time chunking for a policy, by lerobot's own rule.

    lerobot 0.6.1 decides in lerobot.rollout.inference.rtc.supports_rtc_inference. In earlier versions, a supported
    policy has ``init_rtc_processor``.
    """
    asked = getattr(policy, "supports_rtc", None)
    if not (asked() if callable(asked) else hasattr(policy, "init_rtc_processor")):
        return False
    try:
        inspect.signature(policy.predict_action_chunk).bind(object(), inference_delay=0, prev_chunk_left_over=None)
    except (TypeError, ValueError):
        return False
    return True


class RealTimeChunking:
    """Keeps a policy's last chunk, and returns the guidance for the next one.

    Args:
        policy: lerobot's policy; its ``rtc_config`` is set.
        preprocessor: Its preprocessor.
        postprocessor: Its postprocessor.
        horizon: Minimum number of steps of the last chunk that guide the next. A longer delay increases it.
        family: Name of the policy's family, for errors.

    Raises:
        ClpError: lerobot has no real-time chunking for this policy.
    """

    def __init__(self, policy: Any, preprocessor: Any, postprocessor: Any, horizon: int, family: str) -> None:
        from lerobot.policies.rtc.configuration_rtc import RTCConfig
        from lerobot.processor import NormalizerProcessorStep, RelativeActionsProcessorStep

        if not supports_rtc(policy):
            raise ClpError(f"lerobot has no real-time chunking for {family}", hint="use mode replace or ensemble")
        # lerobot would predict such a chunk without guidance, and only log this.
        is_relative = getattr(policy.config, "use_relative_actions", False) or any(
            getattr(step, "use_relative_action", False) for step in postprocessor.steps
        )
        if is_relative and not hasattr(policy, "init_rtc_processor"):
            raise ClpError(
                f"lerobot has no real-time chunking for {family} with relative actions",
                hint="use mode replace or ensemble",
            )
        steps = preprocessor.steps
        self._relative = next(
            (step for step in steps if isinstance(step, RelativeActionsProcessorStep) and step.enabled), None
        )
        self._normalizer = next((step for step in steps if isinstance(step, NormalizerProcessorStep)), None)
        self._least = horizon
        self._last: tuple[torch.Tensor, torch.Tensor] | None = None  # the model's output, and the actions
        self._config = policy.config.rtc_config = RTCConfig(enabled=True, execution_horizon=horizon)
        if hasattr(policy, "init_rtc_processor"):
            policy.init_rtc_processor()
        policy.requires_grad_(False)  # the guidance needs gradients of the actions only

    def remember(self, chunk: torch.Tensor, actions: torch.Tensor) -> None:
        """Keeps a chunk.

        Args:
            chunk: (1, steps, action_size), the model's output.
            actions: (1, steps, action_size), after the postprocessor.
        """
        self._last = chunk.clone(), actions.clone()

    def guidance(self, elapsed_steps: int, delay_steps: int) -> dict[str, Any]:
        """Returns arguments of ``predict_action_chunk`` for continuing the last chunk; empty if no steps are left.

        Call it after the preprocessor, which caches the state to which relative actions refer.

        Args:
            elapsed_steps: Steps of the last chunk that had passed at the time of the new observation.
            delay_steps: Number of the following steps that will be executed before the new chunk is ready.
        """
        if self._last is None or not 0 <= elapsed_steps < self._last[0].shape[1]:
            return {}
        horizon = max(self._least, delay_steps + MARGIN_STEPS)
        left, absolute = (steps[:, elapsed_steps : elapsed_steps + horizon] for steps in self._last)
        self._config.execution_horizon = horizon = left.shape[1]
        if self._relative is not None:
            left = self._reanchored(absolute.cpu()).to(left.device, left.dtype)
        return {"prev_chunk_left_over": left, "inference_delay": min(delay_steps, horizon)}

    def _reanchored(self, absolute: torch.Tensor) -> torch.Tensor:
        """Returns actions of the last chunk relative to the present state.

        Relative actions refer to the state at the observation. Those of the last chunk refer to an older state, and
        would be wrong by the robot's motion since then.
        """
        from lerobot.processor import TransitionKey, create_transition, to_relative_actions

        from clp_ros.core.compat.lerobot import relative_mask, relative_state

        mask = relative_mask(self._relative, absolute.shape[-1])
        state = relative_state(self._relative).detach().cpu().reshape(1, -1)
        transition = create_transition(action=to_relative_actions(absolute, state, mask))
        if self._normalizer is not None:
            transition = self._normalizer(transition)
        return transition[TransitionKey.ACTION]
