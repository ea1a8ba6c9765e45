# SPDX-License-Identifier: Apache-2.0
"""Registers the LeRobot plugin lerobot_policy_clp, a separate distribution with policy types for pruned π0 and
GR00T."""

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
    # If it is a namespace package, the folder around the package in a checkout was imported.
    if importlib.import_module(PLUGIN).__file__ is None:
        raise _not_installed()


def _not_installed() -> ClpError:
    return NotHereError(
        "the LeRobot plugin is not installed",
        where=PLUGIN,
        hint=f"run `pip install ./{PLUGIN}` in the checkout of clp_ros",
    )
