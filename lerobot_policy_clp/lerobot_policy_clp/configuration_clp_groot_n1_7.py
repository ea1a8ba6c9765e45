# SPDX-License-Identifier: Apache-2.0
"""Config of a GR00T N1.7 whose depths are fields."""

from dataclasses import dataclass, field
from typing import Any

from lerobot.configs.policies import PreTrainedConfig
from lerobot.policies.groot.configuration_groot import GrootConfig


@PreTrainedConfig.register_subclass("clp_groot_n1_7")
@dataclass
class ClpGrootN17Config(GrootConfig):
    """LeRobot's GR00T N1.7 config with the numbers of layers, and with all that LeRobot reads from the base model.

    Therefore a checkpoint is complete: nothing is read from ``base_model_path`` to build the model.

    Attributes:
        llm_layers: Layers of the language model. The output of the last one is the input of the action head.
        vl_self_attention_layers: Self-attention blocks over the language model's output.
        dit_layers: Blocks of the diffusion transformer.
        model_config: Differences from LeRobot's ``GR00T_N1_7_DEFAULTS``, without the depths.
        backbone_config: Config of the Qwen3-VL backbone, as transformers writes it; empty for Cosmos-Reason2-2B's.
    """

    llm_layers: int = 16
    vl_self_attention_layers: int = 4
    dit_layers: int = 32
    model_config: dict[str, Any] = field(default_factory=dict)
    backbone_config: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.llm_layers, self.vl_self_attention_layers, self.dit_layers) < 1:
            raise ValueError("llm_layers, vl_self_attention_layers and dit_layers must be at least 1")
