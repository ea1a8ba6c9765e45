# SPDX-License-Identifier: Apache-2.0
"""What tests of policies share: hidden states as they compare them, a random observation, lerobot's own loading."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from clp_ros.policies.base import Policy
from clp_ros.policies.lerobot_policy import LeRobotPolicy
from clp_ros.policies.quiet import quiet


def states_and_masks(
    policy: Policy, batch: Any, seed: int | list[int] = 0
) -> tuple[dict[str, list[torch.Tensor]], dict[str, torch.Tensor]]:
    """By layer stack: the layers' states, and which tokens are not padding."""
    found = policy.hidden_states(batch, np.random.default_rng(seed))
    return {name: one.layers for name, one in found.items()}, {name: one.mask for name, one in found.items()}


def random_sample(policy: LeRobotPolicy) -> dict[str, Any]:
    """The arguments of ``predict_chunk``: random pixels and a random state."""
    rng = np.random.default_rng(1)
    return {
        "images": {slot: rng.integers(0, 256, (48, 64, 3), dtype=np.uint8) for slot in policy.image_slots},
        "state": rng.standard_normal(policy.state_size).astype(np.float32),
        "task": "Fold the shorts.",
    }


def plugin_policy(folder: Path) -> Any:
    """As lerobot's own commands load it."""
    from lerobot.configs.policies import PreTrainedConfig
    from lerobot.policies.factory import get_policy_class

    with quiet():
        return get_policy_class(PreTrainedConfig.from_pretrained(folder).type).from_pretrained(folder)
