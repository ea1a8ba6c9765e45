# SPDX-License-Identifier: Apache-2.0
"""The folder of a fine-tuning in progress: lerobot's checkpoints, the losses, and what was asked for."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clp_ros.core.errors import ClpError
from clp_ros.core.json_object import read_json_object

SUFFIX = ".training"
LOG = "train.log"
_RECORD, _WEIGHTS, _LOSSES, _RUN = "request.json", "weights.json", "losses.jsonl", "lerobot"
_PARTIAL = ".partial"


@dataclass(frozen=True)
class RunFolder:
    """``<output>.training``, beside the output.

    A checkpoint of lerobot appears under its name only when it is complete, so that a run that was killed at any
    instant is resumed from the newest one.

    Attributes:
        path: The folder, absolute.
    """

    path: Path

    @classmethod
    def of(cls, output: Path) -> RunFolder:
        """Returns the folder for an output."""
        output = output.absolute()
        return cls(output.with_name(output.name + SUFFIX))

    @property
    def run(self) -> Path:
        """lerobot's ``--output_dir``."""
        return self.path / _RUN

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Creates the folder and keeps other runs out of it for the time of the block.

        Raises:
            ClpError: Another run works in it, or it cannot be created.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise ClpError(
                f"the folder cannot be written ({error.strerror})", where=self.path, hint="give another --output"
            ) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ClpError(
                "another fine-tuning with this output is running", where=self.path, hint="give another --output"
            ) from error
        except OSError:
            pass  # a file system without locks
        try:
            yield
        finally:
            os.close(descriptor)

    def begin(self, record: Mapping[str, Any]) -> None:
        """Empties the folder and notes what was asked for."""
        for path in self.path.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        _write(self.path / _RECORD, record)

    def check_same(self, record: Mapping[str, Any]) -> bool:
        """Returns whether a run was begun here.

        Raises:
            ClpError: It was asked for something else.
        """
        if not (self.path / _RECORD).is_file():
            return False
        found = read_json_object(self.path / _RECORD)
        differing = [name for name in record if found.get(name) != record[name]]
        if differing:
            name = differing[0]
            raise ClpError(
                f"the unfinished run has another {name}: {found.get(name)!r}, not {record[name]!r}",
                where=self.path,
                hint="resume it with the same arguments, or start again with --overwrite",
            )
        return True

    def newest(self) -> tuple[int, Path] | None:
        """Returns the step of the newest complete checkpoint and its folder; None if there is none yet."""
        found = [path for path in (self.run / "checkpoints").glob("*") if path.name.isdecimal() and path.is_dir()]
        newest = max(found, key=lambda path: int(path.name), default=None)
        return None if newest is None else (int(newest.name), newest)

    def clear_partial(self) -> None:
        """Deletes the checkpoints that a killed process did not complete."""
        for path in (self.run / "checkpoints").glob(f"*{_PARTIAL}"):
            shutil.rmtree(path)

    @contextlib.contextmanager
    def complete_checkpoint(self, folder: Path, keep_older: bool) -> Iterator[Path]:
        """Yields a folder to write a checkpoint into, which is then renamed to ``folder``.

        Args:
            folder: The checkpoint's folder.
            keep_older: Whether the checkpoints of earlier steps stay.
        """
        partial = folder.with_name(folder.name + _PARTIAL)
        yield partial
        # The rename must not reach the disk before the content.
        for path in partial.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        if folder.exists():
            shutil.rmtree(folder)  # a resumed run has come to the same step again
        partial.rename(folder)
        if not keep_older:
            for path in folder.parent.iterdir():
                if path.name.isdecimal() and int(path.name) < int(folder.name):
                    shutil.rmtree(path)

    # ------------------------------------------------------------------------------------------ weights

    def weights(self) -> dict[str, Any] | None:
        """Returns what :meth:`write_weights` wrote; None before."""
        path = self.path / _WEIGHTS
        return read_json_object(path) if path.is_file() else None

    def write_weights(self, document: Mapping[str, Any]) -> None:
        """Notes how many weights are trained, and the hashes of the frozen ones."""
        _write(self.path / _WEIGHTS, document)

    # ------------------------------------------------------------------------------------------ losses

    def losses(self) -> list[dict[str, float]]:
        """Returns the rows of the loss curve: ``step`` with ``loss``, or with ``held_out``."""
        path = self.path / _LOSSES
        rows: list[dict[str, float]] = []
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
            with contextlib.suppress(ValueError):  # the last line of a killed process
                rows.append(json.loads(line))
        return rows

    def keep_losses_until(self, step: int) -> None:
        """Deletes the losses of later steps, which a resumed run computes again."""
        rows = [json.dumps(row) + "\n" for row in self.losses() if row["step"] <= step]
        partial = self.path / (_LOSSES + _PARTIAL)
        partial.write_text("".join(rows), encoding="utf-8")
        partial.replace(self.path / _LOSSES)

    def append_loss(self, row: Mapping[str, float]) -> None:
        """Appends a row."""
        with (self.path / _LOSSES).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def _write(path: Path, document: Mapping[str, Any]) -> None:
    partial = path.with_name(path.name + _PARTIAL)
    partial.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
