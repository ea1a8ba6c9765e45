# SPDX-License-Identifier: Apache-2.0
"""Config of a GR00T N1.5 whose depths are fields."""

from dataclasses import dataclass, field
from typing import Any

from lerobot.configs.policies import PreTrainedConfig
from lerobot.policies.groot.configuration_groot import GrootConfig


@PreTrainedConfig.register_subclass("clp_groot")
@dataclass
class ClpGrootConfig(GrootConfig):
    """LeRobot's GR00T N1.5 config with the number of layers, and all else that LeRobot reads from the base model.

    So a checkpoint is whole by itself: nothing is read from ``base_model_path`` to build the model.

    Attributes:
        llm_layers: Layers of the language model; the action head takes the last one's output.
        vl_self_attention_layers: Self-attention blocks over the language model's output.
        dit_layers: Blocks of the diffusion transformer.
        action_head_config: What differs from the published model's ``action_head_cfg``, but for the depths.
        eagle_config: What differs from its Eagle 2.5 backbone's config.
        dtype: Of the parameters.
    """

    chunk_size: int = 16
    n_action_steps: int = 16
    llm_layers: int = 12
    vl_self_attention_layers: int = 4
    dit_layers: int = 16
    action_head_config: dict[str, Any] = field(default_factory=dict)
    eagle_config: dict[str, Any] = field(default_factory=dict)
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        # LeRobot's own default is 50, which its GR00T cuts to the action head's 16 wherever it is used.
        horizon = self.action_head_config.get("action_horizon", 16)
        if self.chunk_size < horizon:
            raise ValueError(f"chunk_size is {self.chunk_size}, the action head gives {horizon} actions")
        self.chunk_size, self.n_action_steps = horizon, min(self.n_action_steps, horizon)
        super().__post_init__()
        if min(self.llm_layers, self.vl_self_attention_layers, self.dit_layers) < 1:
            raise ValueError("a policy has one layer of each kind at least")
