# SPDX-License-Identifier: Apache-2.0
"""π0.5 (lerobot): π0 with the state as text, and the flow's time in the expert's norms (adaRMS).

Everything else, the random checkpoints included, is π0's.
"""

from clp_ros.policies.pi0.family import gemma_family

FAMILY = gemma_family(
    "pi05",
    renamed=("action_time_mlp_", "time_mlp_"),
    # The state's projection, and norms of the action expert, which have no weight because the flow's time sets them.
    left_out=r"state_proj\."
    r"|paligemma_with_expert\.gemma_expert\.model\.(layers\.\d+\.(input|post_attention)_layernorm|norm)\.weight",
)
