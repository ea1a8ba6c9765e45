# SPDX-License-Identifier: Apache-2.0
"""LeRobot's private names that this plugin uses, as lerobot 0.5.1 and 0.6.1 have them, unless said otherwise.

A private name may change in any release. Each one is used here only; clp_ros' ``test/core/compat`` has a test a name.
The plugin's classes override three private methods: ``GrootPolicy._create_groot_model`` (which builds the model),
``Qwen3Backbone._from_backbone_config`` (0.6.1; which builds the backbone without weights) and
``PreTrainedPolicy._load_as_safetensor`` (which puts a file's tensors into a policy). LeRobot calls them from public
ones that have no parameter for a model, a config or the names of tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


def gemma_names(policy: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A π0's or π0.5's tensors under the names that LeRobot gives them; some are left out, some doubled.

    LeRobot renames in its own ``from_pretrained`` only, which then loads without being strict.

    Args:
        policy: LeRobot's PI0Policy or PI05Policy.
        weights: By their names in a checkpoint.
    """
    return policy._fix_pytorch_state_dict_keys(weights, policy.config)


def cosmos_reason2_config() -> Any:
    """The config of GR00T N1.7's published backbone (0.6.1), which LeRobot has in its code, not in a file."""
    from lerobot.policies.groot.groot_n1_7 import _cosmos_reason2_qwen3_vl_config

    return _cosmos_reason2_qwen3_vl_config()


def tie_lm_head(backbone: nn.Module) -> None:
    """Ties a Qwen3-VL's unused head to its embedding (0.6.1), as LeRobot does after building and after loading."""
    from lerobot.policies.groot.groot_n1_7 import _tie_unused_qwen_lm_head

    _tie_unused_qwen_lm_head(backbone)


def eagle_config(fields: Mapping[str, Any], attention: str) -> Any:
    """A config of GR00T N1.5's backbone (0.5.1), whose constructor has a private name for the attention.

    It overwrites the public ``attn_implementation`` by the private parameter's default, flash-attn.

    Args:
        fields: Of LeRobot's Eagle25VLConfig.
        attention: As transformers' ``attn_implementation``.
    """
    from lerobot.policies.groot.eagle2_hg_model.configuration_eagle2_5_vl import Eagle25VLConfig

    return Eagle25VLConfig(**fields, _attn_implementation=attention)
