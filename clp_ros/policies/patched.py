# SPDX-License-Identifier: Apache-2.0
"""Attributes of a library's object or module, patched for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def patched(target: Any, **attributes: Any) -> Iterator[None]:
    """Within the block, ``target`` has these attributes; afterwards, those it had. Not for several threads at a time.

    On an instance, an attribute hides the class's method of that name.
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
