# SPDX-License-Identifier: Apache-2.0
"""Config of a π0.5 whose depth is a field."""

from dataclasses import dataclass

from lerobot.configs.policies import PreTrainedConfig
from lerobot.policies.pi05.configuration_pi05 import PI05Config

from .gemma_sizes import GemmaSizes


@PreTrainedConfig.register_subclass("clp_pi05")
@dataclass
class ClpPi05Config(GemmaSizes, PI05Config):
    """LeRobot's π0.5 config with the sizes of its model."""
