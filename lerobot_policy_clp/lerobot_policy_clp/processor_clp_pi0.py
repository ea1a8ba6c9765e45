# SPDX-License-Identifier: Apache-2.0
"""LeRobot's own processors of π0, under the name LeRobot looks for."""

from lerobot.policies.pi0.processor_pi0 import make_pi0_pre_post_processors as make_clp_pi0_pre_post_processors

__all__ = ["make_clp_pi0_pre_post_processors"]
