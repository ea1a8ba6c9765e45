# SPDX-License-Identifier: Apache-2.0
"""The run log: a file per run with a line of JSON for each chunk, safe stop and fault."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any, Self

from clp_ros.core.errors import ClpError


class RunLog:
    """Appends events to ``<folder>/policy-<date>-<time>.jsonl``. Thread-safe.

    If writing fails later, as on a full disk, the log ends and the run continues.

    Args:
        folder: The folder; None: nothing is written.

    Attributes:
        path: The file; None without a folder.
        fault: Why the log has ended early; None otherwise.

    Raises:
        ClpError: The folder or the file cannot be created.
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
                f"the log cannot be written ({error.strerror})", where=self.path, hint="give another log_folder"
            ) from error

    def write(self, event: str, time_ns: int, **values: Any) -> None:
        """Writes one line.

        Args:
            event: Kind of event, such as ``chunk``, ``safe_stop`` or ``fault``.
            time_ns: The time on the robot's clock. The line has it as ``time``, in seconds.
            **values: Further fields, which JSON can express.
        """
        with self._lock:
            if self._file is None:
                return
            try:
                self._file.write(json.dumps({"event": event, "time": time_ns / 1e9, **values}) + "\n")
            except OSError as error:
                self.fault = f"the log ended: {error.strerror}"
                self._file = None

    def close(self) -> None:
        """Closes the file."""
        with self._lock:
            if self._file is not None:
                self._file.close()
                self._file = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
