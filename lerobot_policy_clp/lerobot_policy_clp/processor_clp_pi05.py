# SPDX-License-Identifier: Apache-2.0
"""LeRobot's own processors of π0.5, under the name LeRobot looks for."""

from lerobot.policies.pi05.processor_pi05 import make_pi05_pre_post_processors as make_clp_pi05_pre_post_processors

__all__ = ["make_clp_pi05_pre_post_processors"]
