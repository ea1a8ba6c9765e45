# SPDX-License-Identifier: Apache-2.0
"""LeRobot's private names that this plugin uses. They exist in lerobot 0.5.1 and 0.6.1, unless noted otherwise.

A private name may change in any release. Each one is used only here, and has a test in clp_ros' ``test/core/compat``.
The plugin's classes override three private methods: ``GrootPolicy._create_groot_model`` (which builds the model),
``Qwen3Backbone._from_backbone_config`` (0.6.1; which builds the backbone without weights) and
``PreTrainedPolicy._load_as_safetensor`` (which loads a file's tensors into a policy). LeRobot calls them from public
methods that have no parameter for a model, a config or the names of tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


def gemma_names(policy: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors of a π0 or π0.5 under LeRobot's names. Some tensors are left out, some are listed twice.

    LeRobot itself renames only in its ``from_pretrained``, which does not load strictly.

    Args:
        policy: LeRobot's PI0Policy or PI05Policy.
        weights: The tensors by their names in the checkpoint.
    """
    return policy._fix_pytorch_state_dict_keys(weights, policy.config)


def cosmos_reason2_config() -> Any:
    """Returns the config of GR00T N1.7's published backbone (0.6.1), which is in LeRobot's code and in no file."""
    from lerobot.policies.groot.groot_n1_7 import _cosmos_reason2_qwen3_vl_config

    return _cosmos_reason2_qwen3_vl_config()


def tie_lm_head(backbone: nn.Module) -> None:
    """Ties a Qwen3-VL's unused head to its embedding (0.6.1), as LeRobot does after building and after loading."""
    from lerobot.policies.groot.groot_n1_7 import _tie_unused_qwen_lm_head

    _tie_unused_qwen_lm_head(backbone)


def eagle_config(fields: Mapping[str, Any], attention: str) -> Any:
    """Returns a config of GR00T N1.5's backbone (0.5.1) with the given attention.

    The constructor's parameter for the attention is private. Its default, flash-attn, overwrites the public
    ``attn_implementation``.

    Args:
        fields: Fields of LeRobot's Eagle25VLConfig.
        attention: The value of transformers' ``attn_implementation``.
    """
    from lerobot.policies.groot.eagle2_hg_model.configuration_eagle2_5_vl import Eagle25VLConfig

    return Eagle25VLConfig(**fields, _attn_implementation=attention)
