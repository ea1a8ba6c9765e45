# SPDX-License-Identifier: Apache-2.0
"""Copies byte ranges between files, as fast as `cp` copies files, and slices of tensors."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable
from dataclasses import dataclass

from clp_ros.core.errors import ClpError

_CHUNK = 8 * 2**20  # small, so that Ctrl-C and progress are immediate
_BUFFER = 128 * 2**10  # fits into the processor's cache

# Errors of a kernel, file system or sandbox that cannot allocate.
_UNSUPPORTED = {errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EPERM}


@dataclass(frozen=True)
class Cut:
    """The indices of one dimension of a tensor that stay.

    Attributes:
        rows: Product of the dimensions before it.
        count: Number of its indices.
        width: Number of bytes of one index, including all later dimensions.
        kept: The indices that stay, sorted.
    """

    rows: int
    count: int
    width: int
    kept: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Number of bytes that stay."""
        return self.rows * len(self.kept) * self.width


def reserve(target: int, size: int) -> None:
    """Allocates the blocks of the file with descriptor ``target``, if the file system supports it.

    Writing is then a third faster than with allocation at each write, and a full disk is an error at once.
    :func:`os.posix_fallocate` is not used: without support by the file system, the C library writes every block.

    Raises:
        OSError: The disk is full.
    """
    fallocate = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)
    if fallocate is None:
        return
    fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    if fallocate(target, 0, 0, size):
        number = ctypes.get_errno()
        if number not in _UNSUPPORTED:
            raise OSError(number, os.strerror(number))


class RangeCopier:
    """Appends byte ranges of other files to one file.

    Args:
        target: Descriptor of the file, positioned at its end.
        progress: Called with the number of bytes just copied.
    """

    def __init__(self, target: int, progress: Callable[[int], None] | None = None) -> None:
        self._target = target
        self._progress = progress
        self._buffer = memoryview(bytearray(_BUFFER))

    def append(self, source: int, start: int, end: int, where: object) -> None:
        """Appends bytes ``start`` to ``end`` of the file with descriptor ``source``.

        Raises:
            ClpError: The source ends too early (``where`` names it).
            OSError: Reading or writing fails.
        """
        while start < end:
            copied = self._copy(source, start, min(end - start, _CHUNK))
            if not copied:
                raise ClpError("the file became shorter while it was read", where=where, hint="try again")
            start += copied
            if self._progress is not None:
                self._progress(copied)

    def append_slice(self, source: int, start: int, cut: Cut, where: object) -> None:
        """Appends the remaining part of a tensor whose bytes begin at ``start``. Raises as :meth:`append`."""
        if cut.rows == 1:
            for index in cut.kept:
                self.append(source, start + index * cut.width, start + (index + 1) * cut.width, where)
            return
        import numpy as np  # imported here: it takes half the start of a process, and removing layers does not need it

        row = cut.count * cut.width
        step = max(1, _CHUNK // row)  # rows read at once
        for first in range(0, cut.rows, step):
            rows = min(step, cut.rows - first)
            block = os.pread(source, rows * row, start + first * row)
            if len(block) < rows * row:
                raise ClpError("the file became shorter while it was read", where=where, hint="try again")
            kept = np.frombuffer(block, np.uint8).reshape(rows, cut.count, cut.width).take(cut.kept, axis=1)
            self._write(memoryview(kept.reshape(-1)))
            if self._progress is not None:
                self._progress(kept.nbytes)

    def _copy(self, source: int, start: int, count: int) -> int:
        copied = 0
        while copied < count:
            read = os.preadv(source, [self._buffer[: count - copied]], start + copied)
            if not read:
                break
            self._write(self._buffer[:read])
            copied += read
        return copied

    def _write(self, content: memoryview) -> None:
        while content:
            content = content[os.write(self._target, content) :]
