# SPDX-License-Identifier: Apache-2.0
"""Splits work over the processes that torchrun or accelerate starts, and ends all of them together after an error.

Without such a launcher there is one process, and these functions do nothing.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

# The variables that both launchers set and torch.distributed's env:// reads.
_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_FAILED = "clp_ros/failed"
# Time to wait for the last frame of a process on a slower machine. A process that dies ends the others at once.
_TIMEOUT = timedelta(hours=2)

_store: Any = None


class FailedElsewhereError(Exception):
    """Another process has failed, and reports the error."""


@contextmanager
def process_group() -> Iterator[None]:
    """Joins the processes of the launcher, if one started this process, for the time of the block.

    They end together, so that the launcher does not end the process that still has to report its error.
    """
    global _store
    if not all(os.environ.get(name) for name in _VARIABLES):
        yield
        return
    import torch
    import torch.distributed as dist

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    store, rank, world = next(dist.rendezvous("env://", timeout=_TIMEOUT))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    with _stdout_to_stderr():
        dist.init_process_group(
            backend, store=dist.PrefixStore("clp", store), rank=rank, world_size=world, timeout=_TIMEOUT
        )
    _store = store
    try:
        yield
    except SystemExit:
        dist.barrier()
        raise
    else:
        dist.barrier()
    finally:
        _store = None
        dist.destroy_process_group()


@contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Redirects stdout to stderr in the block, also that of compiled code.

    gloo writes messages about its connections to stdout, which is for results.
    """
    sys.stdout.flush()
    stdout = os.dup(1)
    try:
        os.dup2(2, 1)
        yield
        sys.stdout.flush()
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)


def rank() -> int:
    """This process's number, from 0."""
    if _store is None:
        return 0
    import torch.distributed as dist

    return dist.get_rank()


def world_size() -> int:
    """The number of processes."""
    if _store is None:
        return 1
    import torch.distributed as dist

    return dist.get_world_size()


def local_device(device: str) -> str:
    """Returns the device of this process. ``auto`` and ``cuda`` give each process a GPU of its own."""
    if _store is None or device not in ("auto", "cuda"):
        return device
    import torch

    if not torch.cuda.is_available():
        return device
    return f"cuda:{torch.cuda.current_device()}"


def gather(value: Any) -> list[Any]:
    """Returns the values of all processes in the order of ranks. All processes must call it."""
    if _store is None:
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def check_others() -> None:
    """Raises an error soon after another process has failed.

    Raises:
        FailedElsewhereError: Another process has failed.
    """
    if _store is not None and _store.check([_FAILED]):
        raise FailedElsewhereError


def agree() -> None:
    """Waits until all processes have called it. If one has failed before, ends this one with exit code 1."""
    if any(gather(False)):
        raise SystemExit(1)


@contextmanager
def together() -> Iterator[None]:
    """Makes all processes fail if one fails in the block. Only the first that failed raises its own error.

    Code between two calls of :func:`agree`, or between a call and the block's end, must not wait for other processes.
    """
    try:
        yield
    except Exception as error:
        if _store is None:
            raise
        _store.set(_FAILED, "1")
        failed = gather(not isinstance(error, FailedElsewhereError))
        if failed.index(True) == rank():
            raise
        raise SystemExit(1) from None
    else:
        agree()
