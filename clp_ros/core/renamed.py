# SPDX-License-Identifier: Apache-2.0
"""Old names inside a module, which keep working for one release with a DeprecationWarning."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any


def renamed(module: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """Returns a ``__getattr__`` for a module, which finds the new objects of old names.

    Args:
        module: The module's ``__name__``.
        names: By old name, the new place as ``module:name``, without the leading ``clp_ros.``.
    """

    def find(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        place, _, new = names[name].partition(":")
        warnings.warn(f"{module}.{name} is now clp_ros.{place}.{new}", DeprecationWarning, stacklevel=2)
        return getattr(importlib.import_module(f"clp_ros.{place}"), new)

    return find
