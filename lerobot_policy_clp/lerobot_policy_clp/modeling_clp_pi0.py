# SPDX-License-Identifier: Apache-2.0
"""LeRobot's π0 with the depth of its config, loaded strictly."""

from typing import Any

from lerobot.policies.pi0 import modeling_pi0

from .configuration_clp_pi0 import ClpPi0Config
from .gemma_sizes import sized
from .strict_gemma import StrictGemma


class ClpPi0Policy(StrictGemma, modeling_pi0.PI0Policy):
    """LeRobot's π0 policy with the number of layers from its config."""

    config_class = ClpPi0Config
    name = "clp_pi0"

    def __init__(self, config: ClpPi0Config, **kwargs: Any) -> None:
        with sized(modeling_pi0, config):
            super().__init__(config, **kwargs)
