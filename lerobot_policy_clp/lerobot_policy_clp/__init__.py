# SPDX-License-Identifier: Apache-2.0
"""LeRobot policy types for layer-pruned checkpoints. Importing registers those that LeRobot supports."""

from importlib import import_module
from importlib.util import find_spec

# The module that each type subclasses. LeRobot 0.5 has GR00T N1.5, LeRobot 0.6 has N1.7 instead.
_SUBCLASSED = {
    "pi0": "lerobot.policies.pi0.modeling_pi0",
    "pi05": "lerobot.policies.pi05.modeling_pi05",
    "groot": "lerobot.policies.groot.groot_n1",
    "groot_n1_7": "lerobot.policies.groot.groot_n1_7",
}

for _name, _module in _SUBCLASSED.items():
    if find_spec(_module):
        import_module(f"{__name__}.configuration_clp_{_name}")
        if _name == "groot":  # registers the steps that its saved processors name
            import_module(f"{__name__}.processor_clp_groot")
