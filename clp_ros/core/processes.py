# SPDX-License-Identifier: Apache-2.0
"""Work split over the processes that torchrun or accelerate starts: which of them this is, and how all end together.

Without such a launcher there is one process, and everything here does nothing.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

# What both launchers set, and what torch.distributed's env:// reads.
_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_FAILED = "clp_ros/failed"
# A process may have to wait for another's last frame, on a slower machine. One that dies ends the others at once.
_TIMEOUT = timedelta(hours=2)

_store: Any = None


class FailedElsewhereError(Exception):
    """Another process has failed, and tells why."""


@contextmanager
def process_group() -> Iterator[None]:
    """Joins the processes of the launcher, if one started this process, for the time of the block.

    They leave together, so that the launcher does not end the one that still has to tell what went wrong.
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
    """What is written to stdout within the block goes to stderr, from compiled code, too.

    gloo tells on stdout that it is connected, in pieces that mix with the other processes'. stdout is the caller's.
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
    """The device of this process, where ``device`` leaves open which: with CUDA, each process has its own."""
    if _store is None or device not in ("auto", "cuda"):
        return device
    import torch

    if not torch.cuda.is_available():
        return device
    return f"cuda:{torch.cuda.current_device()}"


def gather(value: Any) -> list[Any]:
    """Every process's value, in the order of ranks. All must call it."""
    if _store is None:
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def check_others() -> None:
    """Ends this process's work soon after another has failed.

    Raises:
        FailedElsewhereError: One has.
    """
    if _store is not None and _store.check([_FAILED]):
        raise FailedElsewhereError


def agree() -> None:
    """Waits for all processes to come here; where one has failed on the way, ends this one with exit code 1."""
    if any(gather(False)):
        raise SystemExit(1)


@contextmanager
def together() -> Iterator[None]:
    """What fails within the block in one process fails in all; only the first that failed raises its own error.

    What lies between two calls of :func:`agree`, or a call and the block's end, must not wait for other processes.
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
