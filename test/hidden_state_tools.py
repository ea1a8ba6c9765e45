# SPDX-License-Identifier: Apache-2.0
"""Hidden states as tests compare them."""

from typing import Any

import numpy as np
import torch

from clp_ros.policies.base import Policy


def states_and_masks(
    policy: Policy, batch: Any, seed: int | list[int] = 0
) -> tuple[dict[str, list[torch.Tensor]], dict[str, torch.Tensor]]:
    """By layer stack: the layers' states, and which tokens are not padding."""
    found = policy.hidden_states(batch, np.random.default_rng(seed))
    return {name: one.layers for name, one in found.items()}, {name: one.mask for name, one in found.items()}
