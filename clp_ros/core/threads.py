# SPDX-License-Identifier: Apache-2.0
"""Sets the number of PyTorch's threads on a CPU, by default the number of cores."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from clp_ros.core.errors import ClpError

_VARIABLE = "OMP_NUM_THREADS"
_default: int | None = None  # PyTorch's number before it was set


def set_threads(number: int) -> int | None:
    """Sets the number of PyTorch's threads, for the threads that exist and those started later.

    Args:
        number: The number; 0: PyTorch's default.

    Returns:
        PyTorch's number of threads; None if it was never set.

    Raises:
        ClpError: The number is negative.
    """
    global _default
    if number < 0:
        raise ClpError(
            f"the number is {number}", where="threads", hint="give a number of threads, or 0 for PyTorch's default"
        )
    if not number and _default is None:
        return None
    import torch

    _default = _default or torch.get_num_threads()
    torch.set_num_threads(number or _default)
    return torch.get_num_threads()


@contextmanager
def using_threads(number: int) -> Iterator[None]:
    """Sets the number of PyTorch's threads in the block, also for processes started in it; 0 changes nothing.

    Does not import torch.
    """
    if not number:
        yield
        return
    before = os.environ.get(_VARIABLE)
    torch = sys.modules.get("torch")
    had = torch.get_num_threads() if torch else None
    os.environ[_VARIABLE] = str(number)
    if torch:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        if before is None:
            del os.environ[_VARIABLE]
        else:
            os.environ[_VARIABLE] = before
        if torch and had:
            torch.set_num_threads(had)
