# SPDX-License-Identifier: Apache-2.0
"""Suppresses the output of libraries in the thread that loads a model, and in no other thread."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import warnings
from collections.abc import Iterator
from typing import Any, cast

from clp_ros.policies.patched import patched

_thread = threading.local()
_lock = threading.Lock()
_users = 0
_undo = contextlib.ExitStack()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppresses this thread's prints, Python warnings, and log records up to WARNING.

    Output of other threads is not suppressed, because a node's other callbacks run meanwhile.
    """
    _thread.depth = getattr(_thread, "depth", 0) + 1
    _enter()
    try:
        yield
    finally:
        _leave()
        _thread.depth -= 1


def _is_quiet() -> bool:
    return getattr(_thread, "depth", 0) > 0


def _enter() -> None:
    global _users
    with _lock:
        _users += 1
        if _users > 1:
            return
        for replace in (_filter_stdout, _filter_records, _filter_warnings):
            _undo.enter_context(replace())


def _leave() -> None:
    global _users
    with _lock:
        _users -= 1
        if not _users:
            _undo.close()


class _Stdout:
    """stdout without the output of quiet threads."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        return len(text) if _is_quiet() else self._stream.write(text)

    def writelines(self, lines: Any) -> None:
        if not _is_quiet():
            self._stream.writelines(lines)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def _filter_stdout() -> Iterator[None]:
    stream = sys.stdout
    sys.stdout = filtered = _Stdout(stream)
    try:
        yield
    finally:
        if sys.stdout is filtered:  # otherwise other code has replaced it
            sys.stdout = stream


@contextlib.contextmanager
def _filter_records() -> Iterator[None]:
    handle, handlers = logging.Logger.handle, list(logging.root.handlers)

    def handle_unless_quiet(logger: logging.Logger, record: logging.LogRecord) -> None:
        if record.levelno > logging.WARNING or not _is_quiet():
            handle(logger, record)

    try:
        with patched(logging.Logger, handle=handle_unless_quiet):
            yield
    finally:
        # lerobot calls logging.warning(), which adds a stderr handler to a root logger without handlers.
        for handler in list(logging.root.handlers):
            if handler not in handlers and type(handler) is logging.StreamHandler:
                logging.root.removeHandler(handler)


class _QuietThread:
    """Replaces the message pattern of a warning filter, and matches all warnings of a quiet thread."""

    def match(self, _: str) -> bool:
        return _is_quiet()


@contextlib.contextmanager
def _filter_warnings() -> Iterator[None]:
    entry = ("ignore", _QuietThread(), Warning, None, 0)
    filters = cast("list[object]", warnings.filters)  # a list, although the stub has another type
    filters.insert(0, entry)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # other code has reset the filters
            filters.remove(entry)
