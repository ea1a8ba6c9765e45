# SPDX-License-Identifier: Apache-2.0
"""A file a run: one JSON object a line for every chunk, hold and change, for plots afterwards."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any, Self

from clp_ros.core.errors import ClpError


class RunLog:
    """Appends events to ``<folder>/policy-<date>-<time>.jsonl``. Thread-safe. A full disk ends the log, not the run.

    Args:
        folder: Where; None: nothing is written.

    Raises:
        ClpError: The folder or the file cannot be made.
    """

    def __init__(self, folder: str | Path | None) -> None:
        self._lock = threading.Lock()
        self.path: Path | None = None
        self.fault: str | None = None
        self._file = None
        if folder is None:
            return
        self.path = Path(folder) / time.strftime("policy-%Y%m%d-%H%M%S.jsonl")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a", encoding="utf-8", buffering=1)
        except OSError as error:
            raise ClpError(
                f"the log cannot be written ({error.strerror})", where=self.path, fix="give another log_folder"
            ) from error

    def write(self, event: str, time_ns: int, **values: Any) -> None:
        """Writes one line: ``event``, ``time`` (seconds on the robot's clock), and the values."""
        with self._lock:
            if self._file is None:
                return
            try:
                self._file.write(json.dumps({"event": event, "time": time_ns / 1e9, **values}) + "\n")
            except OSError as error:
                self.fault = f"the log ended: {error.strerror}"
                self._file = None

    def close(self) -> None:
        """Ends the log."""
        with self._lock:
            if self._file is not None:
                self._file.close()
                self._file = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
