# SPDX-License-Identifier: Apache-2.0
"""Patches attributes of a library's object or module temporarily."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def patched(target: Any, **attributes: Any) -> Iterator[None]:
    """Sets attributes of ``target`` in the block, and restores them afterwards. Not thread-safe.

    An attribute of an instance hides the class's method of the same name.
    """
    own = {name: vars(target)[name] for name in attributes if name in vars(target)}
    try:
        for name, value in attributes.items():
            setattr(target, name, value)
        yield
    finally:
        for name in attributes:
            if name in own:
                setattr(target, name, own[name])
            elif name in vars(target):
                delattr(target, name)
