# SPDX-License-Identifier: Apache-2.0
"""LeRobot's π0.5 with the depth of its config, loaded strictly."""

from typing import Any

from lerobot.policies.pi05 import modeling_pi05

from .configuration_clp_pi05 import ClpPi05Config
from .gemma_sizes import sized
from .strict_gemma import StrictGemma


class ClpPi05Policy(StrictGemma, modeling_pi05.PI05Policy):
    """LeRobot's π0.5 policy with the number of layers from its config."""

    config_class = ClpPi05Config
    name = "clp_pi05"

    def __init__(self, config: ClpPi05Config, **kwargs: Any) -> None:
        with sized(modeling_pi05, config):
            super().__init__(config, **kwargs)
