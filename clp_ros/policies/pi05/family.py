# SPDX-License-Identifier: Apache-2.0
"""π0.5 (lerobot): π0 with the state among the words, and the flow's time in the expert's norms (adaRMS)."""

from clp_ros.policies.pi0.family import gemma_family

FAMILY = gemma_family("pi05")
