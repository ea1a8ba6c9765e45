# SPDX-License-Identifier: Apache-2.0
"""Config of a π0 whose depth is a field."""

from dataclasses import dataclass

from lerobot.configs.policies import PreTrainedConfig
from lerobot.policies.pi0.configuration_pi0 import PI0Config

from .gemma_sizes import GemmaSizes


@PreTrainedConfig.register_subclass("clp_pi0")
@dataclass
class ClpPi0Config(GemmaSizes, PI0Config):
    """LeRobot's π0 config with the sizes of its model."""
