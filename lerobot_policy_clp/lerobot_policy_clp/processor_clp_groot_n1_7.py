# SPDX-License-Identifier: Apache-2.0
"""Processors of a GR00T N1.7 whose depths are fields: those of LeRobot's GR00T."""

from lerobot.policies.groot.processor_groot import (
    make_groot_pre_post_processors as make_clp_groot_n1_7_pre_post_processors,
)

__all__ = ["make_clp_groot_n1_7_pre_post_processors"]
