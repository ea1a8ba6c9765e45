# SPDX-License-Identifier: Apache-2.0
"""Config of a GR00T N1.5 whose depths are fields."""

from dataclasses import dataclass, field
from typing import Any

from lerobot.configs.policies import PreTrainedConfig
from lerobot.policies.groot.configuration_groot import GrootConfig


@PreTrainedConfig.register_subclass("clp_groot")
@dataclass
class ClpGrootConfig(GrootConfig):
    """LeRobot's GR00T N1.5 config with the numbers of layers, and with all that LeRobot reads from the base model.

    Therefore a checkpoint is complete: nothing is read from ``base_model_path`` to build the model.

    Attributes:
        llm_layers: Layers of the language model. The output of the last one is the input of the action head.
        vl_self_attention_layers: Self-attention blocks over the language model's output.
        dit_layers: Blocks of the diffusion transformer.
        action_head_config: Differences from the published model's ``action_head_cfg``, without the depths.
        eagle_config: Differences from the config of its Eagle 2.5 backbone.
        dtype: Dtype of the parameters.
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
        # LeRobot's default is 50, but its GR00T uses at most the action head's 16.
        horizon = self.action_head_config.get("action_horizon", 16)
        if self.chunk_size < horizon:
            raise ValueError(f"chunk_size is {self.chunk_size}, but the action head predicts {horizon} actions")
        self.chunk_size, self.n_action_steps = horizon, min(self.n_action_steps, horizon)
        super().__post_init__()
        if min(self.llm_layers, self.vl_self_attention_layers, self.dit_layers) < 1:
            raise ValueError("llm_layers, vl_self_attention_layers and dit_layers must be at least 1")
