# SPDX-License-Identifier: Apache-2.0
"""How many threads torch computes with on a CPU: as many as the machine has cores, unless told otherwise."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from clp_ros.core.errors import ClpError

_VARIABLE = "OMP_NUM_THREADS"
_default: int | None = None  # torch's own, before it was told otherwise


def set_threads(number: int) -> int | None:
    """Lets torch compute with so many threads from now on, in threads that are started after this too.

    Args:
        number: How many; 0: as many as torch takes by itself.

    Returns:
        How many torch computes with now, by its own account; None where it was never told otherwise.

    Raises:
        ClpError: It is negative.
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
    """Within the block, torch computes with so many threads, in processes started in it too; 0 changes nothing.

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
