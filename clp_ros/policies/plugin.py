# SPDX-License-Identifier: Apache-2.0
"""The LeRobot plugin with the policy types of pruned π0 and GR00T, a distribution of its own: lerobot_policy_clp/."""

from __future__ import annotations

import importlib

from clp_ros.core.errors import ClpError, NotHereError

PLUGIN = "lerobot_policy_clp"


def register_plugin() -> None:
    """Registers the plugin's policy types with lerobot, as lerobot's own commands do.

    Raises:
        ClpError: The plugin is not installed.
    """
    try:
        importlib.import_module(PLUGIN)
    except ModuleNotFoundError as error:
        if error.name != PLUGIN:
            raise
        raise _not_installed() from error
    # A namespace of that name is the folder around the package, in a checkout on the path.
    if importlib.import_module(PLUGIN).__file__ is None:
        raise _not_installed()


def _not_installed() -> ClpError:
    return NotHereError(
        f"the LeRobot plugin {PLUGIN} is not installed",
        fix=f"pip install ./{PLUGIN}, in the checkout of clp_ros",
    )
